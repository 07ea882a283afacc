"""Fully sharded data parallelism (FSDP2): ``--strategy fsdp2``.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023); `torch.distributed.fsdp`'s
`fully_shard`.
"""

from __future__ import annotations

from fnmatch import fnmatch

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


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


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model in place: each unit of its `fsdp_plan` by itself, what is left as one more.

    Args:
        model: the same weights on every rank.
        mesh: Lightning's, with the dimensions data_parallel and tensor_parallel.

    Raises:
        ValueError: tensor parallelism is asked for.
    """
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            "tensor parallelism is not supported: queries, keys and values are one fused projection, which cannot be "
            f"split by columns; give tensor_parallel_size=1, got {size}"
        )
    for name, module in model.named_modules():
        if any(_matches(name, pattern) for pattern in model.fsdp_plan):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern in which a * stands for one component."""
    return name.count(".") == pattern.count(".") and fnmatch(name, pattern)
