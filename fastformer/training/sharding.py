"""Fully sharded data parallelism (FSDP2): ``--strategy fsdp2``.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023); `torch.distributed.fsdp`'s
`fully_shard`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastformer.training.blocks import blocks


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with parameters, gradients and optimizer state sharded over all devices.

    The module's `configure_model` calls `shard`. Checkpoints are single files, assembled on the first rank and the same
    as those of one device: a run resumes with any strategy on any number of devices.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="fully sharded data parallelism, FSDP2")


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model in place: each of its blocks by itself, what is left as one more.

    Args:
        model: ours or one of Hugging Face's, with PEFT's adapters or without; the same weights on every rank.
        mesh: Lightning's, with the dimensions data_parallel and tensor_parallel.

    Raises:
        ValueError: tensor parallelism is asked for, or the model has no blocks, or some that share weights.
    """
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            "tensor parallelism is not supported: queries, keys and values are one fused projection, which cannot be "
            f"split by columns; give tensor_parallel_size=1, got {size}"
        )
    units = blocks(model)
    if not units:
        raise ValueError(f"--strategy fsdp2 shards blocks, an nn.ModuleList; {type(model).__name__} has none")
    if shared := _shared_weights(model, units):
        raise ValueError(
            f"--strategy fsdp2 shards block by block; in {type(model).__name__} some share weights with others: "
            f"{', '.join(shared[:3])}; use --strategy ddp"
        )
    for block in units.values():
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load some of a module's weights, each whole on every rank, whether the module is sharded or not."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(module, dict(weights), options=options)
    else:
        module.load_state_dict(weights, strict=False)


def _shared_weights(model: nn.Module, units: Collection[str]) -> list[str]:
    """Names of the parameters of blocks that are also another block's, or outside."""
    owners: dict[nn.Parameter, str | None] = {}
    shared = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((unit for unit in units if name.startswith(f"{unit}.")), None)
        if owners.setdefault(parameter, owner) != owner:
            shared.append(name)
    return shared
