"""Counts what each preset holds and costs: parameters, memory, operations."""

from __future__ import annotations

from dataclasses import dataclass

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


def listing(name: str) -> Listing:
    """The numbers of a preset."""
    from fastformer.models import PRESETS
    from fastformer.planning.model_cost import forward_flops
    from fastformer.planning.model_work import known_model, meta_model

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
