"""The command ``fastformer numerics``: measure every operator's error against float64, compared with PyTorch's."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path

import torch

from fastformer.arguments import CommandParser
from fastformer.diagnostics.numerics import DTYPES, as_table, draw, errors_of, problems
from fastformer.extras import require
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out

_DESCRIPTION = """\
Measure the error of every operator and its gradients against float64 on this machine, with difficult inputs: large
logits, long rows, tiny scales, masks, lengths, wide heads. It is compared with PyTorch's plain computation in the same
dtype and, for attention, with scaled_dot_product_attention. The Triton backend is measured on a GPU, or with
TRITON_INTERPRET=1.

examples:
  fastformer numerics
  fastformer numerics --operators attention --dtypes bfloat16,float32 --json numerics.json --picture numerics.png
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer numerics`` with the arguments that follow."""
    parser = CommandParser(
        prog="fastformer numerics", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(problem.operator for problem in problems()))
    parser.add_argument("--operators", help=f"only these of {', '.join(names)}")
    parser.add_argument("--dtypes", help=f"only these of {', '.join(DTYPES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random tensors")
    parser.add_argument("--json", type=Path, help="write the errors here")
    parser.add_argument("--picture", type=Path, help="draw the errors here")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    options = parser.parse_args(arguments)
    for option, path in (("--json", options.json), ("--picture", options.picture)):
        if path is not None:
            check_out([path], options.overwrite, option=option)
    if options.picture:
        require("matplotlib")
    operators = _chosen("--operators", options.operators, names)
    dtypes = _chosen("--dtypes", options.dtypes, list(DTYPES))
    errors = [
        error
        for problem in problems()
        if problem.operator in operators
        for dtype in dtypes
        for error in errors_of(problem, dtype, options.device, options.seed)
    ]
    print(as_table(errors))
    if options.json:
        with atomic_file(options.json) as file:
            file.write(json.dumps([asdict(error) for error in errors], indent=1).encode() + b"\n")
    if options.picture:
        draw(errors, options.picture)


def _chosen(option: str, given: str | None, known: list[str]) -> list[str]:
    names = known if given is None else [name.strip() for name in given.split(",")]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{option} must be among {', '.join(known)}; got {', '.join(unknown)}")
    return names
