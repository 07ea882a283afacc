"""Helpers that give a module and its twin in torch.nn the same parameters and the same calls."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch

MASK_KINDS = ("none", "boolean", "floating", "infinite")


def share_parameters(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Give both modules the same random parameters, none a zero or one, and load each state_dict in the other."""
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def draw_mask(data: st.DataObject, name: str, shape: tuple[int, ...], empty_rows: bool = False) -> torch.Tensor | None:
    """Draw a mask for PyTorch. Without `empty_rows`, which PyTorch makes NaN, the first key is never masked."""
    kind = data.draw(st.sampled_from(MASK_KINDS), label=name)
    ignored = torch.rand(shape) < 0.4
    if not empty_rows:
        ignored[..., 0] = False
    floating = torch.randn(shape)
    return {
        "none": None,
        "boolean": ignored,
        "floating": floating,
        "infinite": floating.masked_fill(ignored, float("-inf")),
    }[kind]


def causal_mask(data: st.DataObject, name: str, queries: int, keys: int) -> torch.Tensor:
    """Draw a causal mask, boolean or floating."""
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return later if data.draw(st.booleans(), label=name) else torch.zeros(queries, keys).masked_fill(later, -torch.inf)


def outputs_and_gradients(
    module: torch.nn.Module, *inputs: torch.Tensor, order: tuple[int, ...] | None = None, **call: Any
) -> dict[str, torch.Tensor | None]:
    """Return the outputs of ``module(*inputs, **call)``, and the gradients of all inputs and parameters.

    `order` gives the input of each argument, where one tensor is several arguments: (0, 0, 0) for self-attention.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    outputs = module(*(leaves[index] for index in order or range(len(leaves))), **call)
    outputs = [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if output is not None]
    sum(output.square().mean() for output in outputs).backward()
    return {
        **{f"output {index}": output.detach() for index, output in enumerate(outputs)},
        **{f"gradient of input {index}": leaf.grad for index, leaf in enumerate(leaves)},
        **{f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()},
    }
