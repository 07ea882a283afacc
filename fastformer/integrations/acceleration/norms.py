"""LayerNorm and RMSNorm of any class: one or two vectors of parameters, an epsilon, no children."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastformer.integrations.acceleration.probing import ERRORS, outcome, probing, same
from fastformer.integrations.acceleration.swapping import OperatorRecipe, original_class
from fastformer.ops.autocast import autocast_float32_dtype
from fastformer.ops.checks import FLOATING_DTYPES
from fastformer.ops.normalization import MAX_COLUMNS, layer_norm, rms_norm


@dataclass(frozen=True)
class Norm(OperatorRecipe):
    """Normalisation over the last dimension.

    Attributes:
        centered: whether the mean is subtracted (LayerNorm); otherwise it is RMSNorm.
        eps, weight, bias: the names of the attributes.
        offset: the number added to the weight: 1 if the weight is stored as the difference from 1 (Gemma).
        keeps_dtype: whether the result has the input's dtype, whatever the weight's dtype.
    """

    centered: bool
    eps: str
    weight: str | None
    bias: str | None
    offset: float
    keeps_dtype: bool

    part = "normalisation"

    def describe(self) -> str:
        weight = f", weight + {self.offset:g}" if self.offset else ""
        return f"fastformer.{'layer_norm' if self.centered else 'rms_norm'}{weight}"

    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        (input,) = tensors
        weight = None if self.weight is None else getattr(module, self.weight)
        if input.dtype not in FLOATING_DTYPES or is_traceable_wrapper_subclass(weight):
            return False
        dtype = autocast_float32_dtype(input)
        if dtype != input.dtype:
            # Under a GPU's autocast the operator's result, like that of PyTorch's function, is float32.
            return original_class(module) is nn.LayerNorm or (
                weight is not None and weight.dtype == dtype and not self.keeps_dtype
            )
        return weight is None or self.keeps_dtype or weight.dtype == dtype

    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        (input,) = tensors
        weight = None if self.weight is None else getattr(module, self.weight)
        if weight is not None and self.offset:
            weight = weight.float() + self.offset
        shape, eps = input.shape[-1:], getattr(module, self.eps)
        if not self.centered:
            return rms_norm(input, shape, weight, eps)
        return layer_norm(input, shape, weight, None if self.bias is None else getattr(module, self.bias), eps)


def recognise(module: nn.Module) -> Norm | str | None:
    """Return the recipe for `module`, the reason why a norm has none, or None for any other module."""
    vectors = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 1]
    candidate = not any(module.children()) and not any(True for _ in module.buffers(recurse=False))
    candidate &= len(vectors) == sum(1 for _ in module.parameters()) <= 2
    sizes = {getattr(module, name).shape[0] for name in vectors}
    epsilons = [name for name, value in vars(module).items() if _is_epsilon(name, value)]
    if not candidate or not epsilons:
        return None
    if len(sizes) != 1:
        return "its size cannot be told from its parameters"
    (size,) = sizes
    if size > MAX_COLUMNS:
        return f"{size} features; the operator takes up to {MAX_COLUMNS}"
    with probing(module):
        for recipe in _recipes(vectors, epsilons):
            try:
                found = _proven(module, recipe, size)
            except ERRORS:
                return "its forward does not take a tensor alone"
            if found is not None:
                return found
    return "it is neither LayerNorm nor RMSNorm of the last dimension"


def _is_epsilon(name: str, value: object) -> bool:
    return (isinstance(value, float) and 0.0 < value <= 1e-2) or (value is None and "eps" in name)


def _recipes(vectors: list[str], epsilons: list[str]) -> Iterator[Norm]:
    roles: list[tuple[str, str | None]] = [(vectors[0], None)]
    if len(vectors) == 2:
        roles = [(vectors[0], vectors[1]), (vectors[1], vectors[0])]
    for eps in epsilons:
        for weight, bias in roles:
            for centered in (True,) if bias is not None else (False, True):
                for offset in (0.0, 1.0):
                    yield Norm(centered, eps, weight, bias, offset, keeps_dtype=False)


def _proven(module: nn.Module, recipe: Norm, size: int) -> Norm | None:
    """Return the recipe if the module computes it."""
    forward = type(module).forward
    eps = getattr(module, recipe.eps)
    small = (torch.finfo(torch.float32).eps if eps is None else eps) ** 0.5
    generator = torch.Generator("cpu").manual_seed(2)
    first, second = (torch.randn(shape, generator=generator) for shape in ((2, 3, size), (1, 4, size)))
    # For inputs as small as epsilon's root, epsilon matters; a mean distinguishes LayerNorm from RMSNorm.
    if not same(module, forward, recipe.run, [(first + 0.5,), (second * small,)]):
        return None
    keeps_dtype = outcome(module, forward, first.bfloat16()).dtype == torch.bfloat16
    return Norm(recipe.centered, recipe.eps, recipe.weight, recipe.bias, recipe.offset, keeps_dtype)
