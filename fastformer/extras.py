"""Packages that the core does not need, and the extras of fastformer that install them."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "train": (
        *("datasets", "filelock", "jsonargparse", "lightning", "matplotlib", "pyarrow", "rouge_score"),
        *("sacrebleu", "scipy", "seqeval", "sklearn", "tensorboard", "tokenizers", "yaml"),
    ),
    "lora": ("peft",),
    "privacy": ("opacus",),
    "interpret": ("captum", "matplotlib"),
    "tensorflow": ("tensorflow",),
}
"""The packages that each extra adds of its own, by the names that are imported."""


def require(package: str) -> None:
    """Check that `package`, which one of the extras installs, is there.

    Raises:
        ModuleNotFoundError: `package` is not installed. The message says what to install.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: {remedy(package)}", name=package)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package of an extra whose absence caused `error`; None if the error has another cause."""
    package = (error.name or "").partition(".")[0]
    known = any(package in packages for packages in EXTRAS.values())
    return package if known and find_spec(package) is None else None


def remedy(package: str) -> str:
    """The pip command for the smallest extra that installs `package`."""
    extra = min((name for name in EXTRAS if package in EXTRAS[name]), key=lambda name: len(EXTRAS[name]))
    return f'pip install "fastformer[{extra}]"'
