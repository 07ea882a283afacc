"""Training steps as CUDA graphs: the forward and backward of a batch, recorded once for each shape.

The optimizer's step is not recorded: clipping, optimizer state and learning rate work as without graphs.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from fastformer.cuda_graphs import CudaRecorder, Recorder, StepGraphs, recorded_state, why_no_graph
from fastformer.models import FastformerPreTrainedModel
from fastformer.training.module import TrainingModule

Batch = dict[str, Any]


class RecordedSteps:
    """Compute losses and gradients of batches by graphs; each kind of batch is recorded when it occurs a second time.

    The gradients of an optimizer step's batches are added up in separate memory, which all graphs share. All graphs are
    recorded again when weights have moved in memory, when other weights are frozen, and when the precision of matrix
    products, determinism, the backend, autocast or the model's mode (training or evaluation) has changed.

    Args:
        module: the module with the objective.
        recorder: makes the graphs.
    """

    def __init__(self, module: TrainingModule, recorder: Recorder) -> None:
        self.module = module
        self._recorder = recorder
        self._parameters = list(module.parameters())
        self._state: Hashable = None
        self._graphs = StepGraphs(recorder)
        self._inputs: dict[Hashable, Batch] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def run(self, batch: Batch, own: Tensor, of_step: Tensor, begins: bool) -> tuple[Tensor, Tensor]:
        """Return `TrainingModule.objective` of a batch, detached, and keep its gradients for `hand_over`.

        Args:
            batch, own, of_step: see `TrainingModule.objective`.
            begins: whether the batch is the first of its optimizer step.
        """
        if begins:
            self._follow()
        given = {**batch, "own": own, "of_step": of_step}
        kind = tuple((name, _kind(value)) for name, value in given.items())
        if kind not in self._inputs:
            self._inputs[kind] = {
                name: torch.empty_like(value) if isinstance(value, Tensor) else value for name, value in given.items()
            }
        inputs = self._inputs[kind]
        for name, value in given.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value)
        objective, sums = self._graphs.run((kind, begins), partial(self._step, inputs, begins))
        return objective.clone(), sums.clone()

    def hand_over(self) -> None:
        """Assign the collected gradients to the parameters."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def _follow(self) -> None:
        """Forget all recordings if the weights, or the settings that select kernels, have changed."""
        learns = tuple(parameter.requires_grad for parameter in self._parameters)
        state = (learns, self.module.training, recorded_state([self.module]))
        if state != self._state:
            self._state, self._graphs, self._gradients = state, StepGraphs(self._recorder), {}

    def _step(self, inputs: Batch, begins: bool) -> tuple[Tensor, Tensor]:
        batch = {name: value for name, value in inputs.items() if name not in ("own", "of_step")}
        objective, sums = self.module.objective(batch, inputs["own"], inputs["of_step"])
        parameters = [parameter for parameter in self._parameters if parameter.requires_grad]
        with torch.autocast(objective.device.type, enabled=False):  # a backward runs outside autocast
            # Lightning divides the loss before it calls backward; here the backward is already done.
            share = objective / self.module.trainer.accumulate_grad_batches
            found = torch.autograd.grad(share, parameters, allow_unused=True)
        new = {parameter: grad for parameter, grad in zip(parameters, found, strict=True) if grad is not None}
        if not self._gradients:
            self._gradients = {parameter: torch.zeros_like(parameter) for parameter in new}
        if new.keys() != self._gradients.keys():
            raise RuntimeError("the parameters that get gradients differ between batches, which graphs do not support")
        (torch._foreach_copy_ if begins else torch._foreach_add_)(list(self._gradients.values()), list(new.values()))
        return objective.detach(), sums


class RecordSteps(Callback):
    """Take training steps by CUDA graphs.

    Raises:
        ValueError: graphs are impossible for this run; raised when it starts, with the reason.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reason = why_no_recorded_steps(trainer, pl_module)
        if reason is not None:
            raise ValueError(f"--cuda_graphs is impossible here, because {reason}")
        pl_module.recorded = RecordedSteps(pl_module, CudaRecorder(pl_module.device))  # type: ignore[assignment, arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.recorded = None  # type: ignore[assignment]


def why_no_recorded_steps(trainer: Trainer, module: Any) -> str | None:
    """Return the reason why the steps of this training cannot be recorded, to follow "because"; None if they can."""
    model = module.model
    wrapped = model.get_base_model() if hasattr(model, "peft_config") else model
    reasons = {
        "graphs are for one device, but the strategy is for several": not isinstance(
            trainer.strategy, SingleDeviceStrategy
        ),
        "--precision 16-mixed chooses its loss scale from the gradients": trainer.precision == "16-mixed",
        "differential privacy takes one example at a time": not module.automatic_optimization,
        "adversarial training has a backward inside its forward": getattr(module, "adversary", None) is not None,
        "embeddings are compared with all sequences of a batch, and padding would be one": not module.may_be_padded,
        "only Fastformer's own models take packed batches": not isinstance(wrapped, FastformerPreTrainedModel),
        "--activation_checkpointing keeps the state of random numbers on the host": any(
            getattr(each, "gradient_checkpointing", False) for each in model.modules()
        ),
        "--compile makes its own graphs": model._compiled_call_impl is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or why_no_graph(model, module.device)


def _kind(value: Any) -> Hashable:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
