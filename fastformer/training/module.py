"""The base class of pretraining and fine-tuning modules: loss of an optimizer step, sharding, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule

from fastformer.training.elastic import convert_progress, number_by_module
from fastformer.training.loading.resuming import data_rank
from fastformer.training.sharding import shard

if TYPE_CHECKING:
    from fastformer.training.cuda_graphs import RecordedSteps
    from fastformer.training.finite import FiniteLosses


class TrainingModule(LightningModule):
    """Training of a model on any number of devices, with the same loss curve as on one device.

    The loss of an optimizer step is the mean over all its targets with equal weight, in whatever batch or on whatever
    device they are. For this, batches come from `with_label_counts`. Logged with each optimizer step: the results of
    `step_metrics`, as ``train/...``, and the largest learning rate, ``train/learning_rate``.
    """

    model: Any
    may_be_padded: ClassVar[bool] = True
    """Whether sequences may be added to a batch without any effect on the loss."""
    recorded: RecordedSteps | None = None
    """The CUDA graphs of training steps, if they are used."""
    watch: FiniteLosses | None = None
    """The callback that checks the loss of each optimizer step before the step."""
    _step_sums: torch.Tensor | None = None

    # --- The model ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the model if the strategy requires it."""
        if self.is_sharded and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over the ranks."""
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["world_size"] = data_rank(self.trainer)[1]
        if not self.is_sharded:  # sharded states have this numbering already
            for state, optimizer in zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True):
                number_by_module(state, optimizer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:
            data = type(self.trainer.datamodule).__qualname__  # type: ignore[attr-defined]
            convert_progress(checkpoint, data, data_rank(self.trainer)[1])

    # --- The loss of an optimizer step --------------------------------------------------------------------------------

    def step_metrics(self, losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the metrics to log, given the losses of an optimizer step."""
        raise NotImplementedError

    def batch_losses(self, batch: dict[str, Any]) -> Sequence[torch.Tensor]:
        """Return the parts of a batch's loss, each the mean over some of its targets."""
        raise NotImplementedError

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the loss to minimise, given its parts, (n,)."""
        return losses.sum()

    def step_of(self, batch: dict[str, Any], label_counts: torch.Tensor) -> torch.Tensor:
        """Return the value that Lightning minimises for a batch.

        Args:
            batch: the batch without its ``label_counts``.
            label_counts: (2, n), the number of targets of each part of the loss, in the batch and in all batches of
                this rank in the step.
        """
        batch.pop("real_tokens", None)
        own, of_step = label_counts.float()
        self._step_counts = self.over_ranks(of_step)
        if self.recorded is None:
            objective, sums = self.objective(batch, own, self._step_counts)
        else:
            objective, sums = self.recorded.run(batch, own, self._step_counts, begins=self._step_sums is None)
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums
        return objective

    def objective(
        self, batch: dict[str, Any], own: torch.Tensor, of_step: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's contribution to the loss of its optimizer step, and (n,) the sums of its parts' losses.

        Args:
            batch: the model's inputs.
            own: (n,) number of targets of each part in the batch.
            of_step: (n,) number of targets of each part in all batches of the step.
        """
        losses = torch.stack(list(self.batch_losses(batch)))
        sums = own * torch.where(own > 0, losses, 0.0)  # the mean over no targets is NaN
        # Lightning divides by the number of batches, and data parallelism by the number of ranks.
        shares = _over(sums, of_step) * self.trainer.accumulate_grad_batches * data_rank(self.trainer)[1]
        return self.total(shares), sums.detach()

    def backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Run Lightning's backward hook; with recorded steps the gradients exist already."""
        if self.recorded is None:
            super().backward(loss, *arguments, **options)
        else:
            self.recorded.hand_over()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = max(group["lr"] for group in optimizer.param_groups)
        # A tensor, because Lightning would copy a Python number to the GPU and wait for it.
        self.log("train/learning_rate", torch.tensor(rate), batch_size=1)
        if self._step_sums is not None:
            means = _over(self.over_ranks(self._step_sums), self._step_counts)
            self._step_sums = None
            if self.watch is not None:
                self.watch.see(self, means.sum(), rate)
            metrics = self.step_metrics(list(means))
            self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would keep the gradients in memory during the next forward.
        optimizer.zero_grad()

    def over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over all ranks of `data_rank`. (Lightning's own reduction would wait for the GPU.)"""
        if data_rank(self.trainer)[1] > 1:
            values = values.clone()
            mesh = self.device_mesh
            torch.distributed.all_reduce(values, group=None if mesh is None else mesh["data_parallel"].get_group())
        return values


def _over(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Divide sums by counts; the result is zero where the count is zero."""
    return sums / torch.where(counts > 0, counts, 1.0)
