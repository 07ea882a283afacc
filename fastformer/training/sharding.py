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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastformer.training.blocks import blocks


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with parameters, gradients and optimizer state sharded over all devices.

    The module's `configure_model` calls `shard`. Checkpoints are single files, assembled on the first rank and equal to
    those of one device, so a run can resume with any strategy on any number of devices.

    Args:
        tensor_parallel: number of neighbouring devices that compute each batch together; see `tensor_parallel`.

    Raises:
        ValueError: the number of devices is not a multiple of `tensor_parallel`.
    """

    def __init__(self, tensor_parallel: int = 1) -> None:
        if tensor_parallel < 1:
            raise ValueError(f"--tensor_parallel must be 1 or more; got {tensor_parallel}")
        super().__init__(tensor_parallel_size=tensor_parallel, save_distributed_checkpoint=False)
        self.tensor_parallel = tensor_parallel

    def setup_environment(self) -> None:
        devices = self.num_nodes * self.num_processes
        if devices % self.tensor_parallel:
            raise ValueError(f"--tensor_parallel {self.tensor_parallel} must divide the {devices} devices")
        self._data_parallel_size = devices // self.tensor_parallel
        super().setup_environment()


StrategyRegistry.register(
    "fsdp2",
    FullyShardedStrategy,
    description="fully sharded data parallelism, FSDP2",
    override=True,  # a notebook may load this module again
)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model in place: each of its blocks as one unit, and the rest of the model as another.

    Args:
        model: Fastformer's or Hugging Face's, with PEFT's adapters or without; the same weights on every rank.
        mesh: Lightning's, with the dimensions data_parallel and tensor_parallel; weights are sharded over all its
            devices.

    Raises:
        ValueError: the model has no blocks, or blocks that share weights.
    """
    units = blocks(model)
    if not units:
        raise ValueError(f"--strategy fsdp2 shards the blocks in an nn.ModuleList; {type(model).__name__} has none")
    if shared := _shared_weights(model, units):
        raise ValueError(
            f"--strategy fsdp2 shards block by block, but blocks of {type(model).__name__} share weights with others: "
            f"{', '.join(shared[:3])}; use --strategy ddp"
        )
    all_devices = init_device_mesh(mesh.device_type, (mesh.size(),))
    for block in units.values():
        fully_shard(block, mesh=all_devices)
    fully_shard(model, mesh=all_devices)


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load some of a module's weights, given complete on every rank, into a sharded or an unsharded module."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(module, dict(weights), options=options)
    else:
        module.load_state_dict(weights, strict=False)


def _shared_weights(model: nn.Module, units: Collection[str]) -> list[str]:
    """Return the names of block parameters that another block, or the rest of the model, has too."""
    owners: dict[nn.Parameter, str | None] = {}
    shared = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((unit for unit in units if name.startswith(f"{unit}.")), None)
        if owners.setdefault(parameter, owner) != owner:
            shared.append(name)
    return shared
