"""Export of Fastformer's layers as a kernel that Hugging Face's `kernels` package loads.

A kernel is a folder ``build/torch-BACKEND`` for each backend, with `metadata.json` and a Python package. Ours consists
of copies of `layers.py` and of the modules that it imports. They import each other relatively and register their
operators in a separate namespace: a process may also have Fastformer itself, or two versions of the kernel.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path, PurePosixPath

import fastformer_kernels

from fastformer.files import atomic_folder
from fastformer.integrations.hub import layers as hub_layers
from fastformer.version import __version__

BACKENDS = ("cpu", "cuda", "rocm")
_PACKAGES = {
    "fastformer": Path(__file__).parents[2],
    "fastformer_kernels": Path(fastformer_kernels.__file__).parent,
}
_IMPORT = re.compile(r"^( *)from (fastformer(?:_kernels)?(?:\.\w+)*) import ", re.MULTILINE)
_OPERATOR = re.compile(r'"fastformer::')

Files = dict[PurePosixPath, str]


def export(folder: Path) -> None:
    """Write the kernel to `folder`.

    Raises:
        ValueError: `folder` exists.
        OSError: it could not be written; nothing of it remains.
    """
    if folder.exists():
        raise ValueError(f"DIR must be a folder that does not exist yet; got {folder}")
    files = package()
    names = _layer_names()
    with atomic_folder(folder) as whole:
        for backend in BACKENDS:
            variant = whole / "build" / f"torch-{backend}"
            for path, text in {**files, PurePosixPath("metadata.json"): _metadata(files, backend)}.items():
                file = variant / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        (whole / "README.md").write_text(_readme(names))
    print(f"{folder}: {', '.join(names)} for {', '.join(BACKENDS)}")


def package() -> Files:
    """Return the package's files by their paths: the layers, and all that they import, rewritten to stand alone."""
    layers = PurePosixPath("layers.py")
    sources: Files = {layers: Path(hub_layers.__file__).read_text()}
    waiting = [layers]
    while waiting:
        for name in _imported(sources[waiting.pop()]):
            path, file = _locate(name)
            if path not in sources:
                sources[path] = file.read_text()
                waiting.append(path)
    version = hashlib.sha256("".join(sources[path] for path in sorted(sources)).encode()).hexdigest()[:10]
    files = {path: _standing_alone(text, path, version) for path, text in sources.items()}
    for path in list(files):
        for parent in path.parents:
            # The package's modules do not need the imports that an __init__ has for its users' convenience.
            files.setdefault(parent / "__init__.py", "")
    files[PurePosixPath("__init__.py")] = (
        f'"""Fastformer {__version__}: fused Triton kernels for the Transformer, as layers."""\n\n'
        'from . import layers\n\n__all__ = ["layers"]\n'
    )
    return files


def _imported(source: str) -> set[str]:
    """Return those of our modules that a source imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and _is_ours(node.module):
            names.add(node.module)
            # A name imported from a package may be a module.
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(member for member in members if _locate(member)[1].exists())
    return names


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in _PACKAGES


def _locate(name: str) -> tuple[PurePosixPath, Path]:
    """Return the place of one of our modules in the kernel's package, and its file."""
    top, *rest = name.split(".")
    file = _PACKAGES[top].joinpath(*rest)
    inside = PurePosixPath(*([] if top == "fastformer" else [top]), *rest)
    if file.is_dir():
        return inside / "__init__.py", file / "__init__.py"
    return inside.with_suffix(".py"), file.with_suffix(".py")


def _standing_alone(source: str, path: PurePosixPath, version: str) -> str:
    """Rewrite a source: its imports of our modules become relative, its operators move to the kernel's namespace."""
    up = "." * len(path.parts)

    def relative(found: re.Match[str]) -> str:
        name = found[2].removeprefix("fastformer.")
        return f"{found[1]}from {up}{name} import "

    rewritten = _OPERATOR.sub(f'"fastformer_hub_{version}::', _IMPORT.sub(relative, source))
    left = _imported(rewritten)
    if left:
        raise ValueError(f"{path} imports {', '.join(sorted(left))} in a way that is not rewritten")
    return rewritten


def _metadata(files: Files, backend: str) -> str:
    digest = hashlib.sha256("".join(files[path] for path in sorted(files)).encode()).hexdigest()[:10]
    return json.dumps(
        {
            "id": f"_fastformer_{backend}_{digest}",
            "name": "fastformer",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        },
        indent=1,
    )


def _layer_names() -> list[str]:
    public = {name: value for name, value in vars(hub_layers).items() if not name.startswith("_")}
    return [name for name, value in public.items() if getattr(value, "__module__", "") == hub_layers.__name__]


def _readme(names: list[str]) -> str:
    lines = [f"- `{name}`: {getattr(hub_layers, name).__doc__}" for name in names]
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "tags: [kernels]",
            "---",
            "",
            f"# Fastformer {__version__}",
            "",
            *lines,
            "",
        ]
    )
