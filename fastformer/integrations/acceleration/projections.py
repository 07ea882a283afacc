"""Linear projections and dropouts as an operator reads them: their parameters, as long as a call would do no more."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastformer.nn.plain import is_plain
from fastformer.ops.autocast import autocast_device_type
from fastformer.ops.checks import FLOATING_DTYPES


def projection_class(*modules: nn.Module) -> type[nn.Module] | None:
    """The one class of plain projections that all `modules` are of; None if there is none."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    kinds = [nn.Linear, *([] if transformers is None else [transformers.Conv1D])]
    return next((kind for kind in kinds if all(is_projection(module, kind) for module in modules)), None)


def is_projection(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is a projection by its parameters and nothing else, as `nn.feed_forward` has it."""
    return is_plain(module, kind) and not is_traceable_wrapper_subclass(module.weight)


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight, (out_features, in_features) as `nn.Linear` has it, and the bias."""
    # GPT-2's Conv1D keeps the transposed weight.
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
    return weight, module.bias


def takes(input: Tensor, *projections: nn.Module) -> bool:
    """Whether the projections' parameters are of the input's dtype, or autocast makes them so."""
    dtypes = {input.dtype, *(projection.weight.dtype for projection in projections)}
    autocast = torch.is_autocast_enabled(autocast_device_type(input))
    return dtypes <= set(FLOATING_DTYPES) and (len(dtypes) == 1 or autocast)


def dropout_probability(module: nn.Module, name: str | None) -> float:
    """With what probability the child called `name` drops an element now; 0 for no child."""
    if name is None:
        return 0.0
    dropout = getattr(module, name)
    return dropout.p if dropout.training else 0.0


def is_dropout(module: nn.Module, name: str | None) -> bool:
    """Whether the child called `name`, if any, only drops elements, and not all of them."""
    if name is None:
        return True
    dropout = getattr(module, name)
    return is_plain(dropout, nn.Dropout) and not dropout.inplace and dropout.p < 1.0
