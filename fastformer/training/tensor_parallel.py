"""Tensor parallelism: ``--strategy fsdp2 --tensor_parallel N``.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019): N
devices compute a batch together. Each computes its share of the heads and of the feed-forward network's columns. In the
forward pass the devices add up the outputs of attention and feed-forward network, in the backward pass the gradients of
their inputs.

Weights are stored as FSDP2 stores them, with a shard of each on every device, and are gathered block by block. Of a
gathered weight a device uses its rows or columns. Optimizer, gradient clipping and checkpoints need no changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fastformer.models import FastformerPreTrainedModel
from fastformer.models.attention import CrossAttention, SelfAttention
from fastformer.models.positions import AlibiSlopes, RelativeBias
from fastformer.nn import FeedForward


def parallelize(model: FastformerPreTrainedModel, mesh: DeviceMesh) -> None:
    """Change a model in place so that the ranks of a one-dimensional mesh compute its blocks together.

    The gradient of a divided weight is zero outside a rank's share, and multiplied by the number of ranks inside. As
    for all other gradients, the mean over the ranks is then right.

    Raises:
        ValueError: heads or columns cannot be divided equally, or each rank would need a different dropout.
    """
    config, size = model.config, mesh.size()
    shared_out = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, number in shared_out.items():
        if number % size:
            raise ValueError(f"--tensor_parallel {size} must divide {name}={number}")
    refused = ("attention_probs_dropout_prob", "activation_dropout", "qk_norm")
    if given := [f"{name}={getattr(config, name)}" for name in refused if getattr(config, name)]:
        raise ValueError(f"--tensor_parallel cannot be combined with {', '.join(given)}")
    for module in list(model.modules()):
        if isinstance(module, SelfAttention):
            _share_rows(module.qkv, mesh, [heads * module.head_dim for heads in module.heads])
            _share_columns(module.output, mesh)
            query, key, value = module.heads
            module.heads = (query // size, key // size, value // size)
        elif isinstance(module, CrossAttention):
            _share_rows(module.query, mesh)
            _share_rows(module.key_value, mesh, [config.kv_heads * module.head_dim] * 2)
            _share_columns(module.output, mesh)
        elif isinstance(module, FeedForward):
            for linear in (module.up, module.gate):
                if linear is not None:
                    _share_rows(linear, mesh)
            _share_columns(module.down, mesh)
        elif isinstance(module, (RelativeBias, AlibiSlopes)):  # their outputs have one part per head
            module.register_forward_hook(lambda module, arguments, output: _share(output, mesh))


class RowsOfRank(nn.Linear):
    """A linear layer in which each rank computes its share of every part of the outputs."""

    mesh: DeviceMesh
    parts: Sequence[int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._rows(self.weight)
        bias = None if self.bias is None else self._rows(self.bias)
        return F.linear(_SumBackwards.apply(input, self.mesh), weight, bias)

    def _rows(self, parameter: torch.Tensor) -> torch.Tensor:
        return torch.cat([_share(part, self.mesh) for part in parameter.split(self.parts)])


class ColumnsOfRank(nn.Linear):
    """A linear layer in which each rank has its share of the inputs; the outputs of all ranks are added up."""

    mesh: DeviceMesh

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = _SumForwards.apply(F.linear(input, _share(self.weight, self.mesh, dim=1)), self.mesh)
        return output if self.bias is None else output + self.bias


def _share_rows(linear: nn.Linear, mesh: DeviceMesh, parts: Sequence[int] | None = None) -> None:
    linear.__class__ = RowsOfRank
    assert isinstance(linear, RowsOfRank)
    linear.mesh, linear.parts = mesh, [linear.out_features] if parts is None else parts


def _share_columns(linear: nn.Linear, mesh: DeviceMesh) -> None:
    linear.__class__ = ColumnsOfRank
    assert isinstance(linear, ColumnsOfRank)
    linear.mesh = mesh


def _share(whole: torch.Tensor, mesh: DeviceMesh, dim: int = 0) -> torch.Tensor:
    """Return this rank's share of a tensor; its gradient is scaled so that the mean over the ranks is right."""
    share = whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]
    if share.requires_grad:
        share.register_hook(lambda gradient: gradient * mesh.size())
    return share


def _summed(values: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(values, group=mesh.get_group())
    return values


class _SumForwards(torch.autograd.Function):
    """The sum over the ranks; the gradient passes unchanged to each rank."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        return _summed(values, mesh)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SumBackwards(torch.autograd.Function):
    """The identity; its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        context.mesh = mesh
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(gradient, context.mesh), None
