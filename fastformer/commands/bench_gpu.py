"""The command ``fastformer bench gpu``: the most important measurements on a GPU, in a few minutes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import torch

from fastformer.arguments import CommandParser
from fastformer.benchmarking.gpu.records import ends, entries
from fastformer.benchmarking.gpu.run import begin_run, cache_variables, imported_steps, run_to_results
from fastformer.benchmarking.gpu.runner import Place
from fastformer.benchmarking.gpu.steps import STEPS, module_of
from fastformer.benchmarking.gpu.table import short_table

_DESCRIPTION = """\
Compare Fastformer with its peers on the GPU of this machine, in a given time. Steps run in order of importance, each in
a separate process. Every measurement is written to disk at once, so a step that crashes or hangs loses nothing of the
others. Writes records.jsonl, results.json, table.md and log.txt into a folder, and prints a short table.
"""
_EPILOG = """\
Time that a step does not use goes to the steps after it. The command always ends within --minutes.
Exit status 1 if a step failed or did not finish in its time.

examples:
  fastformer bench gpu --minutes 9 --out runs/gpu --cache cache
  fastformer bench gpu --minutes 2 --out runs/attention --steps environment,attention
  fastformer bench gpu --minutes 5 --out runs/gpu --resume       the steps that did not finish
  fastformer bench gpu --dry-run --out runs/dry                  on a CPU: does every line run?

The kernels are compiled beforehand, on any machine with the same triton:
  fastformer kernels compile --arch sm_90 --bench-gpu all --out cache
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer bench gpu``.

    Args:
        arguments: the command line after ``gpu``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    options = _parser().parse_args(arguments)
    known, broken = imported_steps(options.steps)
    if options.list:
        for each in known:
            print(f"{each.step.name:<14} {each.step.seconds:>4.0f} s  {each.step.title}")
        for name, error in broken.items():
            print(f"{name:<14}    0 s  cannot run: {error}")
        return
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU; --dry-run runs the steps on a CPU")
    place = Place(options.out, "cpu" if options.dry_run else "cuda", options.dry_run, _variables(options))
    left = begin_run(known, broken, place, minutes=options.minutes, resume=options.resume)
    begin = _process_began(begin)
    try:
        run_to_results(left, place, begin + 60 * options.minutes, lambda name: _say(name, place))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        _conclude(place, begin)
    if any(end["end"] != "ok" for end in ends(entries(place.records)).values()):
        raise SystemExit(1)


def _variables(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment variables of the steps."""
    if options.dry_run:
        if options.cache:
            raise ValueError("--cache has no use with --dry-run, which interprets the kernels")
        return {"TRITON_INTERPRET": "1", "FASTFORMER_BACKEND": "triton"}
    return {} if options.cache is None else cache_variables(options.cache)


def _process_began(known: float) -> float:
    """Return `time.monotonic()` at the start of this process, before imports; `known` if the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return known
    return time.monotonic() - age


def _say(name: str, place: Place) -> None:
    end = ends(entries(place.records))[name]
    print(f"{name}: {end['end']}, {end['seconds']:.0f} s", file=sys.stderr, flush=True)


def _conclude(place: Place, begin: float) -> None:
    print(short_table(entries(place.records)))
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
    parser.add_argument("--minutes", type=_positive, default=9.0, help="total time (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--steps", type=_steps, default=list(STEPS), metavar="NAME,...", help=f"some of {', '.join(STEPS)}"
    )
    parser.add_argument("--list", action="store_true", help="show what each step measures, and stop")
    parser.add_argument("--resume", action="store_true", help="keep the results of finished steps in --out")
    parser.add_argument("--cache", type=Path, help="precompiled kernels; a step that compiles others reports it")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU; the figures have no meaning")
    return parser


def _steps(text: str) -> list[str]:
    """Parse the value of ``--steps``; return the steps in the order in which they run."""
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
