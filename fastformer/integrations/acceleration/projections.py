"""Linear projections and dropouts, read by their parameters if a call would compute nothing more."""

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
    """The class that all `modules` have in common, if all are plain projections; otherwise None."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    kinds = [nn.Linear, *([] if transformers is None else [transformers.Conv1D])]
    return next((kind for kind in kinds if all(is_projection(module, kind) for module in modules)), None)


def is_projection(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is a projection by its parameters and nothing else, as in `nn.feed_forward`."""
    return is_plain(module, kind) and not is_traceable_wrapper_subclass(module.weight)


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight, (out_features, in_features) as in `nn.Linear`, and the bias."""
    # GPT-2's Conv1D stores the transposed weight.
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
    return weight, module.bias


def takes(input: Tensor, *projections: nn.Module) -> bool:
    """Whether the projections' parameters have the input's dtype, or autocast converts them to it."""
    dtypes = {input.dtype, *(projection.weight.dtype for projection in projections)}
    autocast = torch.is_autocast_enabled(autocast_device_type(input))
    return dtypes <= set(FLOATING_DTYPES) and (len(dtypes) == 1 or autocast)


def dropout_probability(module: nn.Module, name: str | None) -> float:
    """The probability with which the child `name` drops an element at present; 0 for no child."""
    if name is None:
        return 0.0
    dropout = getattr(module, name)
    return dropout.p if dropout.training else 0.0


def is_dropout(module: nn.Module, name: str | None) -> bool:
    """Whether the child `name`, if any, only drops elements, and not all of them."""
    if name is None:
        return True
    dropout = getattr(module, name)
    return is_plain(dropout, nn.Dropout) and not dropout.inplace and dropout.p < 1.0
