"""The command ``fastformer tune``: measure launch configurations on this GPU, and keep the fastest."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastformer.arguments import CommandParser
from fastformer.backends import HAS_TRITON
from fastformer.console import track
from fastformer.kernel_reports.tuning.measurement import event_timer
from fastformer.kernel_reports.tuning.results import store_plans, summary

if TYPE_CHECKING:
    from fastformer.kernel_reports.tuning.measurement import Finding, Unmeasured
    from fastformer.kernel_reports.tuning.problem import Group, Problem

_DESCRIPTION = """\
Measure on this machine's GPU, for every class of shapes, which of a dozen launch configurations of a kernel is the
fastest. For the parts of a feed-forward block, also measure whether one fused kernel is faster than a library's matrix
product followed by one pass, and for attention in Hugging Face models, whether PyTorch's own is faster. Without this,
shipped defaults are used. A configuration wins only if its results agree
with the default's. Compiling takes most of the time: some minutes on 16 cores. The winners are kept for this GPU's
architecture and this version of triton in FASTFORMER_CACHE/plans.json (default: ~/.cache/fastformer/plans.json), and
are used from then on.

examples:
  fastformer tune
  fastformer tune --operations attention norm    # only these; earlier results of others are kept
  fastformer tune --dtypes bfloat16 float32      # also float32, exact (or tf32 with --tf32)
  CUDA_VISIBLE_DEVICES=1 fastformer tune         # another GPU of this machine
  FASTFORMER_CACHE=/shared/cache fastformer tune # one file for several machines
"""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OPERATIONS = ("attention", "decode", "norm", "cross_entropy", "feed_forward", "softmax")


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer tune``.

    Raises:
        ValueError: there is no GPU, or triton is not installed.
    """
    options = _parser().parse_args(arguments)
    if not HAS_TRITON:
        raise ValueError("tune measures Triton kernels, but triton is not installed; pip install triton")
    if not torch.cuda.is_available():
        raise ValueError("tune measures kernels on a GPU, but PyTorch sees none; there is nothing to tune")
    from fastformer_kernels.configurations import forget_plans_read, plans_path
    from fastformer_kernels.launch import architecture_of

    from fastformer.kernel_reports.tuning.compilation import compiled_ahead
    from fastformer.kernel_reports.tuning.isolation import measure_apart
    from fastformer.kernel_reports.tuning.measurement import winners

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
    from fastformer.kernel_reports.tuning.problems import problems

    if tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return problems([_DTYPES[name] for name in dtypes], operations)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer tune", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--operations", nargs="+", choices=_OPERATIONS, default=_OPERATIONS, help="operations to measure (default: all)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=["bfloat16"], help="dtypes to measure; 16-bit ones share plans"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow tf32 in float32 matrix products, as PyTorch's setting does"
    )
    return parser
