"""Packages that the core does without, and the extras of fastformer that bring them."""

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
"""What each extra brings beside what other extras bring it, by the names that are imported."""


def require(package: str) -> None:
    """Do nothing if `package`, one of an extra's, is installed.

    Raises:
        ModuleNotFoundError: it is not; the error says what to install.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: {remedy(package)}", name=package)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package of an extra that `error` is for want of; None if the error has another cause."""
    package = (error.name or "").partition(".")[0]
    known = any(package in packages for packages in EXTRAS.values())
    return package if known and find_spec(package) is None else None


def remedy(package: str) -> str:
    """The command that installs `package`, by the smallest extra that has it."""
    extra = min((name for name in EXTRAS if package in EXTRAS[name]), key=lambda name: len(EXTRAS[name]))
    return f'pip install "fastformer[{extra}]"'
