"""The command ``fastformer models``: list the presets with their size, memory, operations and suitable tasks."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict

from fastformer.arguments import CommandParser
from fastformer.console import Table, track
from fastformer.planning.presets import MOST_TOKENS, Listing, listing
from fastformer.planning.quantities import gibibytes, in_billions, with_prefix

_DESCRIPTION = """\
List the presets: parameters, memory, operations per token, context, and suitable tasks. All are counted on the models
themselves, on tensors without memory.

examples:
  fastformer models
  fastformer models gpt3-small gpt3-175b
  fastformer models --json
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer models`` with the arguments that follow."""
    parser = CommandParser(
        prog="fastformer models", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="PRESET", help="only these")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from fastformer.models import PRESETS

    names = options.names or list(PRESETS)
    unknown = sorted(set(names) - set(PRESETS))
    if unknown:
        raise ValueError(f"there is no preset {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    listings = [listing(name) for name in track(names, "counting")]
    if options.json:
        print(json.dumps([asdict(each) for each in listings], indent=1))
    else:
        print(_table(listings))


def _table(listings: list[Listing]) -> Table:
    return Table(
        ("preset", "parameters", "float32", "bfloat16", "training state", "context", "forward", "training", "suits"),
        [
            (
                each.preset,
                in_billions(each.parameters),
                gibibytes(each.float32_bytes),
                gibibytes(each.bfloat16_bytes),
                gibibytes(each.training_bytes),
                f"{each.context:,}",
                with_prefix(each.forward_flops_per_token, "FLOP"),
                with_prefix(each.training_flops_per_token, "FLOP"),
                each.suits,
            )
            for each in listings
        ],
        "lrrrrrrrl",
        title="presets",
        note=_NOTE,
    )


_NOTE = (
    "float32, bfloat16: the weights. training state: weights, gradients and AdamW's moments in float32, 16 bytes per "
    "parameter; `fastformer plan` adds activations. forward, training: operations per token, for examples of the whole "
    f"context, at most {MOST_TOKENS:,} tokens; in an encoder-decoder a token passes one of the two stacks. Sources: "
    "--json."
)
