"""Count the parameters, memory and operations of each preset."""

from __future__ import annotations

from dataclasses import dataclass

MOST_TOKENS = 2048
"""Examples are as long as a model's context, but at most this long."""


@dataclass(frozen=True)
class Listing:
    """A preset with its numbers.

    Attributes:
        preset, model, source, suits: see `fastformer.models.presets.Preset`.
        parameters: the number of parameters; tied ones count once.
        float32_bytes, bfloat16_bytes: bytes of the weights.
        training_bytes: bytes of weights, gradients and AdamW's moments in float32: 16 for each parameter.
        context: the longest sequence that the model was made for.
        length: tokens of the example whose operations were counted; for an encoder-decoder, of source and target each.
        forward_flops_per_token: operations of a token's forward.
        training_flops_per_token: operations of a token's forward and backward.
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
    """Count the numbers of a preset."""
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
