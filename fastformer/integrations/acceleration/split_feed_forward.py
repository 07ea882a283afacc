"""BERT's feed-forward network, split into two modules: a projection with its activation, and a residual norm.

The layer with both modules joins them in the method that transformers applies to chunks of a sequence, a function of
one tensor. That method is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastformer.integrations.acceleration import residual_norm
from fastformer.integrations.acceleration.probing import ERRORS, outcome, probing, same
from fastformer.integrations.acceleration.projections import is_projection, takes, weight_and_bias
from fastformer.integrations.acceleration.residual_norm import ResidualNorm
from fastformer.integrations.acceleration.swapping import OperatorRecipe
from fastformer.nn.feed_forward import ACTIVATIONS
from fastformer.nn.plain import is_own
from fastformer.ops.feed_forward import feed_forward

METHOD = "feed_forward_chunk"


@dataclass(frozen=True)
class SplitFeedForward(OperatorRecipe):
    """The recipe for ``LayerNorm(dropout(down(activation(up(x)))) + x)``.

    Attributes:
        first: the child that projects and activates; `up` is its projection.
        second: the child that is a `ResidualNorm`; `end` is its recipe.
        activation: as in `fastformer.feed_forward`.
    """

    first: str
    up: str
    second: str
    end: ResidualNorm
    activation: str

    part = "feed-forward"
    method: ClassVar[str] = METHOD

    def describe(self) -> str:
        return f"fastformer.feed_forward ({self.activation}), then bias, dropout, residual and norm in one pass"

    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        first, second = getattr(module, self.first), getattr(module, self.second)
        up = getattr(first, self.up)
        if not (is_own(first) and is_own(second) and is_projection(up, self.end.kind)):
            return False
        return takes(tensors[0], up) and self.end.holds_for(second, tensors[0])

    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        (input,) = tensors
        second = getattr(module, self.second)
        up, up_bias = weight_and_bias(getattr(getattr(module, self.first), self.up))
        down, down_bias = weight_and_bias(getattr(second, self.end.projection))
        product = feed_forward(input, up, down, up_bias, activation=self.activation)
        return self.end.finish(second, product, down_bias, input)


def recognise(module: nn.Module) -> SplitFeedForward | str | None:
    """Return the recipe for a layer, the reason why its two modules have none, or None for any other module."""
    method: Callable[..., Any] | None = getattr(type(module), METHOD, None)
    if method is None:
        return None
    ends = {name: residual_norm.recognise(child) for name, child in module.named_children() if is_own(child)}
    for second, end in ends.items():
        if not isinstance(end, ResidualNorm):
            continue
        down = weight_and_bias(getattr(getattr(module, second), end.projection))[0]
        for first, child in module.named_children():
            projections = [name for name, inner in child.named_children() if is_projection(inner, end.kind)]
            if len(projections) != 1 or sum(1 for _ in child.parameters()) > 2 or not is_own(child):
                continue
            up = weight_and_bias(getattr(child, projections[0]))[0]
            if up.shape != down.shape[::-1]:
                continue
            for activation in ACTIVATIONS:
                recipe = SplitFeedForward(first, projections[0], second, end, activation)
                if _is_proven(module, recipe, method, down.shape[0]):
                    return recipe
            return f"it computes no feed-forward with {', '.join(ACTIVATIONS)}"
    return "its projections are not of two modules, the second of which adds the residual and normalises"


def _is_proven(module: nn.Module, recipe: SplitFeedForward, method: Callable[..., Any], size: int) -> bool:
    input = torch.randn(2, 3, size, generator=torch.Generator("cpu").manual_seed(2))
    with probing(module):
        try:
            outcome(module, method, input)
        except ERRORS:
            return False
        return same(module, method, recipe.run, [(input,), (3.0 * input[:1, :2],), (30.0 * input[1:],)])
