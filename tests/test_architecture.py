"""Imports between modules go down the floors of docs/architecture.md, and no files import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
# Files at the top of the package that every module may import: settings, the terminal, files on a disk.
TOOLS = {
    "arguments",
    "backends",
    "console",
    "cuda_graphs",
    "debugging",
    "extras",
    "files",
    "gpu_timing",
    "lines",
    "markdown",
    "stopping",
    "version",
}
# The floors from the ground up. A room imports only from lower floors and from itself.
FLOORS = [
    {"fastformer_kernels"},
    {"tools"},
    {"ops", "data"},
    {"nn", "evaluation"},
    {"models"},
    {"generation", "integrations", "explanation"},
    {"fastformer"},  # the names that `import fastformer` gives
    {"registry", "training"},
    {"kernel_reports", "diagnostics"},
    {"planning"},
    {"benchmarking"},
    {"commands"},
    {"cli"},
]
# The rooms that may import kernels; all others use operators.
KNOW_KERNELS = {
    "benchmarking",
    "commands",
    "diagnostics",
    "fastformer_kernels",
    "integrations",
    "kernel_reports",
    "ops",
    "planning",
}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> dict[str, Path]:
    """Return the file of each module."""
    files = {}
    for root, package in ((ROOT, "fastformer"), (ROOT / "kernels", "fastformer_kernels")):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


SOURCES = sources()


def imports(name: str) -> set[str]:
    """Return the project's modules that a module imports anywhere, except imports for type checkers only."""
    return {found for node in _running(ast.parse(SOURCES[name].read_text())) for found in _named(node)}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a program, except those under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _running(child)


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        members = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [member if member in SOURCES else node.module for member in members]
    else:
        names = []
    yield from (name for name in names if name in SOURCES)


def room(name: str) -> str:
    """Return the folder of a module; for a file at the top, the room that it counts as."""
    package, *rest = name.split(".")
    if package != "fastformer" or not rest:
        return package
    return "tools" if rest[0] in TOOLS else rest[0]


@pytest.mark.quick
def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in SOURCES} == set(chain.from_iterable(FLOORS))


@pytest.mark.quick
def test_the_page_has_the_same_floors() -> None:
    page, _, _ = (ROOT / "docs/architecture.md").read_text().partition("### The anatomy")
    rows = re.findall(r"^\| (?:\d+|tools|ground) \| (.*?) \|", page, flags=re.MULTILINE)
    files = {
        "cli.py": "cli",
        "fastformer/__init__.py": "fastformer",
        "kernels/fastformer_kernels/": "fastformer_kernels",
    }
    names = ([files.get(name, name.rstrip("/")) for name in re.findall(r"`([^`]+)`", row)] for row in rows)
    shown = [{"tools" if name.removesuffix(".py") in TOOLS else name for name in floor} for floor in names]
    assert shown == FLOORS[::-1]


@pytest.mark.quick
def test_the_page_names_the_rooms_that_know_kernels() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    (sentence,) = re.findall(r"Only eight rooms import kernels: (.*?)\. ", page, flags=re.DOTALL)
    assert {*re.findall(r"`(\w+)/`", sentence), "fastformer_kernels"} == KNOW_KERNELS


@pytest.mark.quick
def test_imports_go_down() -> None:
    up = [
        f"{name} imports {imported}"
        for name in SOURCES
        for imported in imports(name)
        if room(imported) != room(name) and FLOOR[room(imported)] >= FLOOR[room(name)]
    ]
    assert not up


@pytest.mark.quick
def test_no_files_import_each_other() -> None:
    # `from package import name` reads the __init__ of the package, which imports the files of the package.
    graph = {name: imports(name) - {name} for name in SOURCES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.quick
def test_few_rooms_know_kernels() -> None:
    users = {room(name) for name in SOURCES if any(room(found) == "fastformer_kernels" for found in imports(name))}
    assert users == KNOW_KERNELS


@pytest.mark.quick
def test_every_command_is_found_by_its_name() -> None:
    from fastformer.cli import COMMANDS

    assert all(f"fastformer.commands.{name}" in SOURCES for name in COMMANDS)
