"""A module that computes ``LayerNorm(dropout(projection(x)) + residual)``: the end of both halves of BERT's layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer.integrations.acceleration.probing import ERRORS, close, mark, marked, outcome, probing, same
from fastformer.integrations.acceleration.projections import (
    dropout_probability,
    is_dropout,
    is_projection,
    projection_class,
    takes,
    weight_and_bias,
)
from fastformer.integrations.acceleration.swapping import OperatorRecipe, original_class
from fastformer.nn.plain import is_own
from fastformer.ops.normalization import MAX_COLUMNS, layer_norm


@dataclass(frozen=True)
class ResidualNorm(OperatorRecipe):
    """The recipe for such a module; its inputs are the projection's input and the residual.

    Attributes:
        kind: the projection's class.
        projection, norm, dropout: the names of the children.
    """

    kind: type[nn.Module]
    projection: str
    norm: str
    dropout: str | None

    part = "residual and normalisation"

    def describe(self) -> str:
        return "fastformer.layer_norm, with the projection's bias, dropout and residual"

    def tensors(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
        return args if len(args) == 2 and not kwargs else None

    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        return self.holds_for(module, tensors[0])

    def holds_for(self, module: nn.Module, input: Tensor) -> bool:
        """Whether the children are unchanged and have the input's dtype."""
        projection, norm = getattr(module, self.projection), getattr(module, self.norm)
        if not is_projection(projection, self.kind) or original_class(norm) is not nn.LayerNorm or not is_own(norm):
            return False
        return is_dropout(module, self.dropout) and takes(input, projection, norm)

    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        input, residual = tensors
        weight, bias = weight_and_bias(getattr(module, self.projection))
        return self.finish(module, F.linear(input, weight), bias, residual)

    def finish(self, module: nn.Module, projected: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Compute all that follows the product: bias, dropout, residual and norm, in one pass."""
        norm = getattr(module, self.norm)
        return layer_norm(
            projected,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            residual=residual,
            input_bias=bias,
            dropout_p=dropout_probability(module, self.dropout),
            return_sum=False,
        )

    def marked(self, module: nn.Module, input: Tensor, residual: Tensor) -> Tensor:
        """Compute the same by PyTorch's functions, with dropout's mark where elements are dropped."""
        norm = getattr(module, self.norm)
        output = F.linear(input, *weight_and_bias(getattr(module, self.projection)))
        output = output if self.dropout is None else mark(output)
        return F.layer_norm(output + residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def recognise(module: nn.Module) -> ResidualNorm | str | None:
    """Return the recipe for `module`, the reason why such a module has none, or None for any other module."""
    children = dict(module.named_children())
    with_parameters = [name for name, child in children.items() if any(True for _ in child.parameters())]
    norms = [name for name in with_parameters if original_class(children[name]) is nn.LayerNorm]
    others = [name for name in with_parameters if name not in norms]
    if len(norms) != 1 or len(others) != 1 or any(True for _ in module.parameters(recurse=False)):
        return None
    norm, (projection,) = children[norms[0]], others
    kind = projection_class(children[projection])
    if kind is None or not is_own(norm) or len(norm.normalized_shape) != 1 or norm.weight is None:  # type: ignore[arg-type]
        return None
    recipe = ResidualNorm(kind, projection, norms[0], None)
    size, read = weight_and_bias(children[projection])[0].shape
    if norm.normalized_shape != (size,) or size > MAX_COLUMNS:
        return None
    generator = torch.Generator("cpu").manual_seed(2)
    inputs = [tuple(torch.randn(2, 3, width, generator=generator) for width in (read, size)) for _ in range(2)]
    forward = type(module).forward
    with probing(module):
        try:
            outcome(module, forward, *inputs[0])
        except ERRORS:
            return None
        if not same(module, forward, recipe.run, inputs):
            return "it does not normalise the sum of its projection and its residual"
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    with probing(module, training=True), marked(module):
        expected = outcome(module, forward, *inputs[0])
        for dropout in (None, *dropouts):
            candidate = replace(recipe, dropout=dropout)
            if close(outcome(module, candidate.marked, *inputs[0]), expected):
                return candidate
    return "it drops elements in training elsewhere than before the residual"
