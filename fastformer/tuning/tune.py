"""The command ``fastformer tune``: measure the plans of the feed-forward block on this GPU, and keep them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from fastformer.backends import HAS_TRITON
from fastformer.console import Table, track
from fastformer.data.files import atomic_file

_DESCRIPTION = """\
Measure, on this machine's GPU, where one fused kernel beats a library's matrix product followed by one fused pass, for
every part of the feed-forward block and every class of shapes. Until then a rule decides, which was modelled, not
measured. Takes a few minutes, most of them compiling. What is found is kept for this GPU's architecture and this
version of triton in FASTFORMER_CACHE/plans.json (by default ~/.cache/fastformer/plans.json), and used from then on.

examples:
  fastformer tune
  fastformer tune --dtypes bfloat16 float32      # also products of float32, exact (or tf32 with --tf32)
  CUDA_VISIBLE_DEVICES=1 fastformer tune         # another GPU of this machine
  FASTFORMER_CACHE=/shared/cache fastformer tune # one file for several machines
"""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    from triton.testing import do_bench

    from fastformer.tuning.measurement import measure, problems

    if options.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = architecture_of(torch.empty(0, device=device)).name
    print(f"{torch.cuda.get_device_name(device)} ({architecture})")
    found = list(
        measure(
            problems(_DTYPES[name] for name in options.dtypes),
            device,
            lambda call: do_bench(call, return_mode="median") / 1000.0,
            partial(track, description="measuring"),
        )
    )
    store_plans(plans_path(), architecture, {problem.key: {"fused": plan == "fused"} for problem, plan, _ in found})
    forget_plans_read()
    print(_summary((problem.operation, plan, advantage) for problem, plan, advantage in found))
    print(f"kept in {plans_path()}")


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


def _summary(found: Iterable[tuple[str, str, float]]) -> Table:
    advantages: dict[str, dict[str, list[float]]] = {}
    for operation, plan, advantage in found:
        advantages.setdefault(operation, {"fused": [], "library": []})[plan].append(advantage)
    rows = [
        (
            operation,
            *(
                cell
                for plan in ("fused", "library")
                for cell in (f"{len(of[plan])} classes", f"{max(of[plan], default=1.0):.2f}x")
            ),
        )
        for operation, of in advantages.items()
    ]
    return Table(("operation", "fused is faster", "at best", "library is faster", "at best"), rows, "lrrrr")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastformer tune", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=["bfloat16"], help="what to measure; 16-bit dtypes share plans"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow tf32 in products of float32, as PyTorch's switch does"
    )
    return parser
