"""Rotary position embedding in transformers' models: a function that an attention's forward calls by a global name.

The function gets tables of cosines and sines with an entry for every feature, so each angle appears twice. The operator
needs each angle once, so the modules that make the tables are examined too, to find both places of an angle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastformer.backends import use_triton
from fastformer.integrations.acceleration.probing import ERRORS, close, probing
from fastformer.integrations.acceleration.rebinding import global_names, rebind
from fastformer.integrations.acceleration.swapping import Recipe
from fastformer.ops.checks import FLOATING_DTYPES
from fastformer.ops.rotary import rotary

_ARGUMENTS = ("q", "k", "cos", "sin", "unsqueeze_dim")
Rotation = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rotary(Recipe):
    """An attention whose forward rotates queries and keys with a function of the global name `name`.

    Attributes:
        halves: whether the second half of a table repeats the first; otherwise each angle is followed by its
            repetition.
        interleaved: whether the two features of a rotated pair are neighbours.
        partial: whether features beyond the tables' width are unchanged.
    """

    name: str
    halves: bool
    interleaved: bool
    partial: bool

    part = "rotary position embedding"

    def methods(self, original: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        own = global_names(original.forward)[self.name]

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
            if not use_triton(q) or not self.takes(q, k, cos, sin, unsqueeze_dim):
                return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return self.run(q, k, cos, sin, unsqueeze_dim)

        return {"forward": rebind(original.forward, {self.name: rotate})}

    def describe(self) -> str:
        return f"fastformer.rotary{' (interleaved)' if self.interleaved else ''} in place of {self.name}"

    def takes(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
        """Whether the operator computes this call."""
        if q.dim() != 4 or cos.dim() != 3 or unsqueeze_dim not in (1, 2) or cos.requires_grad:
            return False
        if q.dtype != k.dtype or q.dtype not in FLOATING_DTYPES or is_traceable_wrapper_subclass(q):
            return False
        fits = cos.shape[-1] <= q.shape[-1] if self.partial else cos.shape[-1] == q.shape[-1] == k.shape[-1]
        return fits and cos.shape == sin.shape and cos.shape[1] == q.shape[3 - unsqueeze_dim]

    def run(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """Rotate query and key by the operator: each token has its own row of the tables."""
        if unsqueeze_dim == 2:
            q, k = self.run(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)
        pairs = cos.shape[-1] // 2
        once = slice(0, pairs) if self.halves else slice(0, None, 2)
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=q.device).view(cos.shape[:2])
        cos, sin = (table[..., once].float().reshape(-1, pairs) for table in (cos, sin))
        return rotary(q, k, cos, sin, position_ids=rows, interleaved=self.interleaved)


def tables_have_halves(model: nn.Module) -> bool | str:
    """Whether all the model's rotary tables are in halves (True) or in pairs (False); otherwise the reason why not."""
    if any(buffer.is_meta for module in model.modules() for buffer in _frequencies(module)):
        return "the frequencies of its tables are on the meta device; load the model first"
    found = {layout for module in model.modules() for layout in _layouts(module)}
    if not found:
        return "no module of the model is known to make its tables"
    if len(found) > 1 or None in found:
        return "the angles in its tables are not simply each twice"
    return bool(found.pop())


def _frequencies(module: nn.Module) -> list[Tensor]:
    """The frequencies from which a module makes tables."""
    return [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]


def _layouts(module: nn.Module) -> list[bool | None]:
    """The layout of each kind of table that `module` makes: halves (True), pairs (False) or neither (None)."""
    frequencies = _frequencies(module)
    if not frequencies:
        return []
    given = inspect.signature(type(module).forward).parameters
    types: list[tuple[Any, ...]] = [()]
    if "layer_type" in given:
        types = [(layer_type,) for layer_type in sorted(set(module.config.layer_types))]  # type: ignore[union-attr, arg-type]
    device = frequencies[0].device
    positions = torch.tensor([[3, 1, 250], [9, 77, 0]], device=device)
    layouts = []
    with probing(module), torch.no_grad():
        for layer_type in types:
            try:
                tables = module(torch.zeros(2, 3, 1, device=device), positions, *layer_type)
            except ERRORS:
                tables = ()
            layouts.append(_layout(tables))
    return layouts


def _layout(tables: Any) -> bool | None:
    if len(tables) != 2 or any(table.dim() != 3 or table.shape[-1] % 2 for table in tables):
        return None
    if all(torch.equal(*table.chunk(2, -1)) for table in tables):
        return True
    return False if all(torch.equal(table[..., ::2], table[..., 1::2]) for table in tables) else None


def recognise(module: nn.Module, halves: bool | str) -> Rotary | str | None:
    """Return the recipe for an attention, the reason why one that rotates has none, or None for other modules.

    Args:
        halves: the result of `tables_have_halves` for the model.
    """
    functions = {
        name: value
        for name, value in global_names(type(module).forward).items()
        if callable(value) and {"cos", "sin"} <= set(_parameters(value))
    }
    if not functions:
        return None
    if isinstance(halves, str):
        return halves
    if len(functions) > 1:
        return "it rotates by more than one function"
    ((name, own),) = functions.items()
    if _parameters(own) != _ARGUMENTS:
        return f"{name} takes other arguments than queries, keys, cosines and sines"
    for interleaved in (False, True):
        if _agree(module, own, Rotary(name, halves, interleaved, partial=False), head_dim=16):
            partial = _agree(module, own, Rotary(name, halves, interleaved, partial=True), head_dim=24)
            return Rotary(name, halves, interleaved, partial)
    return f"{name} is another rotation"


def _parameters(value: Any) -> tuple[str, ...]:
    if inspect.isclass(value):
        return ()
    try:
        # A function that the `kernels` package may replace is a module.
        return tuple(inspect.signature(value.forward if isinstance(value, nn.Module) else value).parameters)
    except (TypeError, ValueError):
        return ()


def _agree(module: nn.Module, own: Rotation, recipe: Rotary, head_dim: int) -> bool:
    """Whether the function and the operator rotate equally, forward and backward, in both layouts."""
    generator = torch.Generator("cpu").manual_seed(2)
    q, k = (torch.randn(2, heads, 5, head_dim, generator=generator) for heads in (4, 2))
    angles = torch.randn(2, 5, 8, generator=generator)
    angles = torch.cat((angles, angles), -1) if recipe.halves else angles.repeat_interleave(2, -1)
    with probing(module):
        for unsqueeze_dim in (1, 2):
            results = []
            for rotate in (own, recipe.run):
                leaves = [(x if unsqueeze_dim == 1 else x.transpose(1, 2)).clone().requires_grad_() for x in (q, k)]
                try:
                    outputs = rotate(leaves[0], leaves[1], angles.cos(), angles.sin(), unsqueeze_dim=unsqueeze_dim)
                except ERRORS:
                    return False
                total = sum((output.square().cumsum(-1).sum() for output in outputs), torch.zeros(()))
                results.append((*outputs, *torch.autograd.grad(total, leaves)))
            if not all(close(actual, expected) for expected, actual in zip(*results, strict=True)):
                return False
    return True
