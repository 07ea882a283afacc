"""A run of the GPU benchmark in its folder: begun or resumed, ended by a signal or not, and its results."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastformer.benchmarking.gpu.records import append, ends, entries, write_results
from fastformer.benchmarking.gpu.runner import Known, Place, run_steps
from fastformer.benchmarking.gpu.steps import load, module_of
from fastformer.benchmarking.gpu.table import long_table
from fastformer.console import in_a_line

# Seconds for writing the results after the last step.
_RESERVE = 4.0


def imported_steps(names: Sequence[str]) -> tuple[list[Known], dict[str, str]]:
    """Import the steps; return them, and the errors of those that cannot be imported."""
    known, broken = [], {}
    for name in names:
        try:
            known.append(Known(module_of(name), load(name)))
        except Exception as error:
            broken[name] = in_a_line(error)
    return known, broken


def cache_variables(cache: Path) -> dict[str, str]:
    """Prepare a folder of kernels for use at its path, and return the environment variables of steps that use it.

    Raises:
        ValueError: `fastformer kernels compile` has not made the folder.
    """
    from fastformer.kernel_reports.portable_cache import relocate

    home = cache.absolute()
    if not any(home.glob("*/__grp__*.json")):
        raise ValueError(f"--cache must be a folder made by `fastformer kernels compile`, got {cache}")
    relocate(home, home)
    return {"TRITON_CACHE_DIR": str(home)}


def begin_run(
    known: Sequence[Known], broken: Mapping[str, str], place: Place, *, minutes: float, resume: bool
) -> list[Known]:
    """Record the start of a run, and the steps that cannot be imported. Return the steps that still have to run.

    Args:
        known, broken: the imported steps, and the errors of the others; see `imported_steps`.
        place: the settings of all steps. Its folder must be new, unless the run is resumed.
        minutes: the time of the run.
        resume: whether to keep the results of finished steps in the folder.

    Raises:
        ValueError: the folder holds other files, or a run that may not be resumed.
    """
    left = _left(known, place, resume)
    run = {"minutes": minutes, "steps": [each.step.name for each in left], "dry": place.dry}
    append(place.records, run={**run, "cache": place.variables.get("TRITON_CACHE_DIR")})
    for name, error in broken.items():
        append(place.records, step=name, end="failed", error=error, seconds=0.0, modules=0)
    return left


def _left(known: Sequence[Known], place: Place, resume: bool) -> list[Known]:
    """Return the steps that have not finished in the run's folder. Make the folder if it does not exist."""
    place.out.mkdir(parents=True, exist_ok=True)
    if place.records.exists():
        if not resume:
            raise ValueError(f"--out must be a new folder, or give --resume to continue; {place.records} exists")
        found = entries(place.records)
        if any(entry["run"]["dry"] != place.dry for entry in found if "run" in entry):
            raise ValueError(f"--dry-run must be the same as in the run to resume, {place.records}")
        done = [name for name, entry in ends(found).items() if entry["end"] == "ok"]
        return [each for each in known if each.step.name not in done]
    if others := sorted(os.listdir(place.out)):
        raise ValueError(f"--out must be a new folder; {place.out} holds other files: {', '.join(others[:3])}")
    return list(known)


def run_to_results(known: Sequence[Known], place: Place, end: float, say: Callable[[str], None]) -> None:
    """Run the steps, and write results.json and table.md, even if SIGINT or SIGTERM ends the run.

    Args:
        known: the steps to run.
        place, say: see `run_steps`.
        end: the `time.monotonic()` at which the results must have been written.

    Raises:
        KeyboardInterrupt: a signal has ended the run.
    """
    try:
        with _sigterm_interrupts():
            run_steps(known, place, end - _RESERVE, say)
    finally:
        found = entries(place.records)
        write_results(place.out / "results.json", found)
        (place.out / "table.md").write_text(long_table(found))


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM interrupt within the block as SIGINT does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
