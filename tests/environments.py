"""Environments with a few of the installed packages and their dependencies, made quickly from links."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import venv
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


class Environment:
    """A Python that finds `requirements`, their dependencies and the checkout, and nothing else.

    Args:
        folder: the folder of the environment, which must not exist.
        requirements: the packages, written as in pyproject.toml.
    """

    def __init__(self, folder: Path, requirements: Iterable[str]) -> None:
        venv.create(folder, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        for distribution in _closure(requirements):
            for entry in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
                link = packages / entry
                if not link.exists():
                    link.symlink_to(distribution.locate_file(entry))
        self.python = folder / "bin/python"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run this Python in the repository's root."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )


def _closure(requirements: Iterable[str]) -> Iterator[importlib.metadata.Distribution]:
    """Return the installed distributions of `requirements` and of all their dependencies. Extras add nothing."""
    todo, seen = [Requirement(each) for each in requirements], set()
    while todo:
        requirement = todo.pop()
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield distribution
        todo += [Requirement(each) for each in distribution.requires or ()]
