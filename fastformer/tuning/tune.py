"""The command ``fastformer tune``: measure launch configurations on this GPU, and keep the fastest."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastformer.arguments import CommandParser
from fastformer.backends import HAS_TRITON
from fastformer.console import Table, track
from fastformer.data.files import atomic_file

if TYPE_CHECKING:
    from fastformer.tuning.measurement import Finding, Timer, Unmeasured
    from fastformer.tuning.problem import Group, Problem

_DESCRIPTION = """\
Measure on this machine's GPU, for every class of shapes, which of a dozen launch configurations of a kernel is the
fastest, and for the parts of a feed-forward block whether one fused kernel beats a library's matrix product followed by
one pass. Until then shipped defaults decide. A configuration wins only if it computes what the default does. Compiling
takes most of the time: some minutes on 16 cores. What is found is kept for this GPU's architecture and this version of
triton in FASTFORMER_CACHE/plans.json (by default ~/.cache/fastformer/plans.json), and used from then on.

examples:
  fastformer tune
  fastformer tune --operations attention norm    # these alone; what is known of others is kept
  fastformer tune --dtypes bfloat16 float32      # also float32, exact (or tf32 with --tf32)
  CUDA_VISIBLE_DEVICES=1 fastformer tune         # another GPU of this machine
  FASTFORMER_CACHE=/shared/cache fastformer tune # one file for several machines
"""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OPERATIONS = ("attention", "decode", "norm", "cross_entropy", "feed_forward", "softmax")
_NOT_LAUNCHED = "not launched: what does not compile, needs more than the GPU has, hangs, or computes something else."
# Of measuring a configuration.
_SECONDS = 0.03


def main(arguments: list[str], begin: float) -> None:
    """Run the command.

    Raises:
        ValueError: no GPU, or no triton.
    """
    options = _parser().parse_args(arguments)
    if not HAS_TRITON:
        raise ValueError("tune measures Triton kernels, but triton is not installed; pip install triton")
    if not torch.cuda.is_available():
        raise ValueError("tune measures kernels on a GPU, and PyTorch sees none; without one there is nothing to tune")
    from fastformer_kernels.configurations import forget_plans_read, plans_path
    from fastformer_kernels.launch import architecture_of

    from fastformer.tuning.compilation import compiled_ahead
    from fastformer.tuning.isolation import measure_apart
    from fastformer.tuning.measurement import winners

    device = torch.device("cuda", torch.cuda.current_device())
    architecture = architecture_of(torch.empty(0, device=device)).name
    print(f"{torch.cuda.get_device_name(device)} ({architecture})")
    make_problems = partial(_problems, tuple(options.dtypes), tuple(options.operations), options.tf32)
    to_solve = make_problems()
    findings: list[Finding | Unmeasured] = []
    try:
        with compiled_ahead(to_solve, architecture, os.cpu_count() or 1) as prepare:
            measured = measure_apart(make_problems, device, event_timer, prepare)
            for finding in track(measured, "measuring", len(to_solve)):
                findings.append(finding)
    finally:
        store_plans(plans_path(), architecture, winners(findings))
        forget_plans_read()
    print(summary(findings))
    print(f"kept in {plans_path()}")


def _problems(dtypes: Sequence[str], operations: Sequence[Group], tf32: bool) -> list[Problem]:
    from fastformer.tuning.problems import problems

    if tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return problems([_DTYPES[name] for name in dtypes], operations)


def event_timer(device: torch.device) -> Timer:
    """Times the GPU's work by events."""
    from fastformer.benchmarking.gpu.timing import timed

    return lambda runs: timed(runs, device, _SECONDS).median


def store_plans(path: Path, architecture: str, measured: dict[str, dict[str, int]]) -> None:
    """Add configurations measured on `architecture` with this triton to the file, atomically; those of other triton go.

    A damaged file, or one of another format, is reported on standard error and replaced.

    Raises:
        OSError: the file cannot be written.
    """
    import triton
    from fastformer_kernels.configurations import FORMAT, read_plans

    try:
        architectures = read_plans(path)
    except ValueError as error:
        print(f"fastformer tune: {error}; it is replaced", file=sys.stderr)
        architectures = {}
    before = architectures.get(architecture, {"triton": None, "configurations": {}})
    kept = before["configurations"] if before["triton"] == triton.__version__ else {}
    architectures[architecture] = {"triton": triton.__version__, "configurations": {**kept, **measured}}
    with atomic_file(path) as file:
        file.write(json.dumps({"format": FORMAT, "architectures": architectures}, indent=2, sort_keys=True).encode())


def summary(findings: Sequence[Finding | Unmeasured]) -> Table:
    """A row for each operation; what could not be measured is in the note."""
    from fastformer.tuning.measurement import Unmeasured

    by_operation: dict[str, list[Finding]] = {}
    lost = []
    for finding in findings:
        if isinstance(finding, Unmeasured):
            lost.append(f"{finding.problem.case} could not be measured: {finding.reason}.")
        else:
            by_operation.setdefault(finding.problem.operation, []).append(finding)
    rows = []
    for operation, found in by_operation.items():
        best = max(found, key=lambda finding: finding.gain)
        faster = [finding for finding in found if finding.winner != finding.default]
        mean = exp(sum(log(finding.gain) for finding in found) / len(found))
        failed = sum(len(finding.failures) for finding in found)
        rows.append(
            (
                operation,
                f"{len(faster)} of {len(found)}",
                f"{mean:.2f}x",
                f"{best.gain:.2f}x",
                best.problem.case if faster else "",
                f"{failed}",
            )
        )
    return Table(
        ("operation", "classes with a faster configuration", "mean gain", "best gain", "at", "not launched"),
        rows,
        "lrrrlr",
        note=" ".join([_NOT_LAUNCHED, *lost]),
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer tune", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--operations", nargs="+", choices=_OPERATIONS, default=_OPERATIONS, help="what to measure (default: all)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=["bfloat16"], help="in which dtypes; 16-bit ones share plans"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow tf32 in products of float32, as PyTorch's switch does"
    )
    return parser
