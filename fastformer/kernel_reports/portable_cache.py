"""A Triton cache of kernels compiled ahead of time, for use on another machine or at another path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastformer.kernel_reports.compilation import Failure, Track, Work, compile_ahead, compiled_by

_MARK = ".fastformer-kernels"  # marks a cache made here, which may be reduced


@dataclass(frozen=True)
class MadeCache:
    """The result of `make_cache`.

    Attributes:
        kernels: the number of compiled kernels.
        failures: the kernels that cannot run.
        missed: names of kernels that a launch would still compile. Empty if there are failures: then they are unknown.
    """

    kernels: int
    failures: list[Failure]
    missed: list[str]


def make_cache(
    work: Sequence[Work], architectures: Sequence[str], cache: Path, home: Path | None, processes: int, track: Track
) -> MadeCache:
    """Compile the kernels that `work` launches into `cache`, delete other files, and check that no kernel is missing.

    Args:
        work, architectures, processes, track: see `compile_ahead`.
        cache: a new folder, or one that this function has made; its kernels are kept.
        home: the absolute path at which the cache will be used; None for that of `cache`.

    Raises:
        ValueError: `cache` holds something else.
    """
    _claim(cache)
    kernels, failures = compile_ahead(work, architectures, cache, processes, track)
    reduce_to_launches(cache)
    # The same launches, as on a GPU machine, must find every kernel in the cache.
    missed = [] if failures else compiled_by(work, architectures, cache)
    if home and not missed:
        relocate(cache, home)
    return MadeCache(len(kernels), failures, missed)


def _claim(cache: Path) -> None:
    """Make a folder for kernels; refuse any other folder, even Triton's own cache, so that nothing is lost."""
    if cache.is_dir() and any(cache.iterdir()) and not (cache / _MARK).exists():
        names = ", ".join(sorted(path.name for path in cache.iterdir())[:3])
        raise ValueError(
            f"--out {cache} was not made by `fastformer kernels compile`: it holds {names}; give a new folder"
        )
    cache.mkdir(parents=True, exist_ok=True)
    (cache / _MARK).touch()


def relocate(cache: Path, new_home: Path) -> None:
    """Prepare `cache` for use at the absolute path `new_home`, on this machine or another one."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        moved = {name: str(new_home / group.parent.name / Path(path).name) for name, path in paths.items()}
        group.write_text(json.dumps({"child_paths": moved}))


def reduce_to_launches(cache: Path) -> None:
    """Delete the files of `cache` that no launch needs: sources and intermediate representations."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        kept = {name: path for name, path in paths.items() if Path(name).suffix in (".json", ".cubin", ".hsaco")}
        group.write_text(json.dumps({"child_paths": kept}))
        for name in set(paths) - set(kept):
            (group.parent / name).unlink(missing_ok=True)
