"""The command ``fastformer models``: the published shapes, and what each holds, costs and suits."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass

from fastformer.arguments import CommandParser
from fastformer.console import Table, track
from fastformer.inspection.quantities import gibibytes, in_billions, with_prefix

_DESCRIPTION = """\
List the presets: parameters, memory, operations for each token, context, and what each suits. All are counted on the
models themselves, on tensors without memory.

examples:
  fastformer models
  fastformer models gpt3-small gpt3-175b
  fastformer models --json
"""

MOST_TOKENS = 2048
"""Examples are as long as a model's context, and this long where that is longer."""


@dataclass(frozen=True)
class Listing:
    """A preset with its numbers.

    Attributes:
        preset, model, source, suits: see `fastformer.models.presets.Preset`.
        parameters: what is tied once.
        float32_bytes, bfloat16_bytes: of the weights.
        training_bytes: of weights, gradients and AdamW's moments in float32, 16 a parameter.
        context: the longest sequence that it was made for.
        length: tokens of the example whose operations were counted; of an encoder-decoder's source and of its target.
        forward_flops_per_token, training_flops_per_token: operations, the latter with the backward.
    """

    preset: str
    model: str
    source: str
    suits: str
    parameters: int
    float32_bytes: int
    bfloat16_bytes: int
    training_bytes: int
    context: int
    length: int
    forward_flops_per_token: float
    training_flops_per_token: float


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


def listing(name: str) -> Listing:
    """The numbers of a preset."""
    from fastformer.inspection.model_cost import forward_flops
    from fastformer.inspection.model_work import known_model, meta_model
    from fastformer.models import PRESETS

    config, kind = known_model(name)
    model = meta_model(config, kind, "32-true")
    length = min(config.max_position_embeddings, MOST_TOKENS)
    flops = forward_flops(model, length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = PRESETS[name]
    return Listing(
        preset=name,
        model=known.model,
        source=known.source,
        suits=known.suits,
        parameters=parameters,
        float32_bytes=4 * parameters,
        bfloat16_bytes=2 * parameters,
        training_bytes=16 * parameters,
        context=flops.tokens if config.image_size else config.max_position_embeddings,
        length=flops.tokens if config.image_size else length,
        forward_flops_per_token=flops.per_token,
        training_flops_per_token=3 * flops.per_token,
    )


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
    "float32, bfloat16: the weights. training state: weights, gradients and AdamW's moments in float32, 16 bytes a "
    "parameter; `fastformer plan` adds activations. forward, training: operations a token, in examples of the whole "
    f"context or {MOST_TOKENS:,} tokens; an encoder-decoder's tokens pass one of its two stacks. Sources: --json."
)
