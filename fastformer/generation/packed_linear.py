"""Linear layers whose weights are stored in the order in which a CPU's decoding steps read them.

The product of such a step, with a few rows, reads each weight once and is limited by memory bandwidth. With PyTorch's
weight layout its libraries reach a third of that bandwidth. oneDNN with its own blocked layout comes close to it for
2 rows or more. For a single row, reading columns is best if there are at least as many outputs as inputs; otherwise
reading rows is.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer.generation.direct import DirectLayerNorm
from fastformer.nn import LayerNorm
from fastformer.nn.plain import is_plain, is_plain_linear

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A module that computes what an `nn.Linear` computes, from a packed copy of its weight. For inference.

    Args:
        linear: the layer whose weight and bias are used.
        rows: the expected number of input rows; any number gives the right result.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.linear, self.rows = linear, rows
        self.refresh()

    def refresh(self) -> None:
        """Pack the weight again if it has changed."""
        weight = self.linear.weight
        state = (weight.data_ptr(), weight._version)
        if state == getattr(self, "_state", None):
            return
        if self.rows > 1:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.rows)
        elif weight.shape[0] >= weight.shape[1]:
            self._packed = weight.detach().t().contiguous().t()
        else:
            self._packed = weight.detach()
        self._state = state

    def forward(self, input: Tensor) -> Tensor:
        if self.rows == 1:
            return F.linear(input, self._packed, self.linear.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.linear.bias, "none", [], "")


def can_pack(model: nn.Module) -> bool:
    """Whether all weights of the model have packed products."""
    return torch.backends.mkldnn.is_available() and all(
        parameter.device.type == "cpu" and parameter.dtype == torch.float32 for parameter in model.parameters()
    )


def with_packed_weights(model: Module, rows: int) -> Module:
    """Copy `model` for decoding `rows` sequences on a CPU; the copy shares all tensors with it.

    The copy has a `PackedLinear` for each plain `nn.Linear`, and a `DirectLayerNorm` for each plain `LayerNorm`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and is_plain_linear(child):
                setattr(module, name, PackedLinear(child, rows))
            elif isinstance(child, LayerNorm) and is_plain(child, LayerNorm):
                setattr(module, name, DirectLayerNorm(child))
    return twin


def refresh_packed_weights(model: nn.Module) -> None:
    """Pack those weights again that have changed in the original model."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.refresh()
