"""The command ``fastformer bench gpu``: everything worth knowing of a GPU, in the few minutes that one has it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastformer.arguments import CommandParser
from fastformer.benchmarking.gpu.records import append, ends, entries, write_results
from fastformer.benchmarking.gpu.runner import Known, Place, run_steps
from fastformer.benchmarking.gpu.steps import STEPS, load, module_of
from fastformer.benchmarking.gpu.table import long_table, short_table
from fastformer.console import in_a_line

_DESCRIPTION = """\
Measure Fastformer beside its peers on the GPU of this machine, in a given time: steps in order of worth, each in a
process of its own. What a step finds is on disk the moment it is found; a step that crashes or hangs loses nothing of
the others. Leaves records.jsonl, results.json, table.md and log.txt in a folder, and prints a short table.
"""
_EPILOG = """\
Time that a step leaves is shared out to those that follow. The command ends within --minutes in any case.
Exit status 1 if a step failed or was not finished in its time.

examples:
  fastformer bench gpu --minutes 9 --out runs/gpu --cache cache
  fastformer bench gpu --minutes 2 --out runs/attention --steps environment,attention
  fastformer bench gpu --minutes 5 --out runs/gpu --resume       the steps that did not finish
  fastformer bench gpu --dry-run --out runs/dry                  on a CPU: does every line run?

The kernels are compiled beforehand, on any machine with the same triton:
  fastformer kernels compile --arch sm_90 --bench-gpu all --out cache
"""
# Seconds for what comes after the last step.
_RESERVE = 4.0


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer bench gpu``.

    Args:
        arguments: those of the command line after ``gpu``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: in what the user gave.
    """
    options = _parser().parse_args(arguments)
    known, broken = _imported(options.steps)
    if options.list:
        for each in known:
            print(f"{each.step.name:<14} {each.step.seconds:>4.0f} s  {each.step.title}")
        for name, error in broken.items():
            print(f"{name:<14}    0 s  cannot run: {error}")
        return
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("no GPU is visible to PyTorch; --dry-run walks through the steps on a CPU")
    place = Place(options.out, "cpu" if options.dry_run else "cuda", options.dry_run, _variables(options))
    known = _left(known, place, options)
    for name, error in broken.items():
        append(place.records, step=name, end="failed", error=error, seconds=0.0, modules=0)
    begin = _process_began(begin)
    try:
        with _signals():
            run_steps(known, place, begin + 60 * options.minutes - _RESERVE, lambda name: _say(name, place))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        _conclude(place, begin)
    if any(end["end"] != "ok" for end in ends(entries(place.records)).values()):
        raise SystemExit(1)


def _imported(names: list[str]) -> tuple[list[Known], dict[str, str]]:
    """The steps, and the errors of those that cannot be imported."""
    known, broken = [], {}
    for name in names:
        try:
            known.append(Known(module_of(name), load(name)))
        except Exception as error:
            broken[name] = in_a_line(error)
    return known, broken


def _variables(options: argparse.Namespace) -> dict[str, str]:
    """Environment variables of the steps."""
    if options.dry_run:
        if options.cache:
            raise ValueError("--cache is of no use to a --dry-run, whose kernels are interpreted")
        return {"TRITON_INTERPRET": "1", "FASTFORMER_BACKEND": "triton"}
    if options.cache is None:
        return {}
    from fastformer.kernel_reports.compilation import relocate

    cache = options.cache.absolute()
    if not any(cache.glob("*/__grp__*.json")):
        raise ValueError(f"--cache must be a folder that `fastformer kernels compile` has made, got {options.cache}")
    relocate(cache, cache)
    return {"TRITON_CACHE_DIR": str(cache)}


def _left(known: list[Known], place: Place, options: argparse.Namespace) -> list[Known]:
    """The steps that are still to be run; the start of this run is written down."""
    place.out.mkdir(parents=True, exist_ok=True)
    if place.records.exists():
        if not options.resume:
            raise ValueError(f"--out must be a new folder, or continued with --resume; {place.records} is there")
        found = entries(place.records)
        if any(entry["run"]["dry"] != place.dry for entry in found if "run" in entry):
            raise ValueError(f"--dry-run must be as in the run to resume, {place.records}")
        done = [name for name, entry in ends(found).items() if entry["end"] == "ok"]
        known = [each for each in known if each.step.name not in done]
    elif others := sorted(os.listdir(place.out)):
        raise ValueError(f"--out must be a new folder; {place.out} holds {', '.join(others[:3])}, of something else")
    run = {"minutes": options.minutes, "steps": [each.step.name for each in known], "dry": place.dry}
    append(place.records, run={**run, "cache": place.variables.get("TRITON_CACHE_DIR")})
    return known


def _process_began(known: float) -> float:
    """`time.monotonic()` when this process began, imports and all; `known` where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return known
    return time.monotonic() - age


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM interrupts as SIGINT does, so that what was found is put together."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say(name: str, place: Place) -> None:
    end = ends(entries(place.records))[name]
    print(f"{name}: {end['end']}, {end['seconds']:.0f} s", file=sys.stderr, flush=True)


def _conclude(place: Place, begin: float) -> None:
    found = entries(place.records)
    write_results(place.out / "results.json", found)
    (place.out / "table.md").write_text(long_table(found))
    print(short_table(found))
    print(
        f"{place.out}: {', '.join(sorted(os.listdir(place.out)))}; {time.monotonic() - begin:.0f} s in all", flush=True
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer bench gpu",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=_positive, default=9.0, help="for everything (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=_steps, default=list(STEPS), metavar="NAME,...", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--list", action="store_true", help="say what each step measures, and stop")
    parser.add_argument("--resume", action="store_true", help="keep what --out has of steps that finished")
    parser.add_argument("--cache", type=Path, help="kernels compiled beforehand; a step that compiles more says so")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU; the figures mean nothing")
    return parser


def _steps(text: str) -> list[str]:
    """In the order in which they are run."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must name one of {', '.join(STEPS)}; got {text!r}")
    try:
        for name in names:
            module_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return [name for name in STEPS if name in names]


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if (value := float(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
