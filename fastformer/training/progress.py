"""Callbacks that count, print and draw how far a run is: throughput, loss curve and progress line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from fastformer.console import StatusLine, clock, say
from fastformer.files import atomic_file
from fastformer.training.loading.resuming import data_rank


class Throughput(Callback):
    """Count real tokens (no padding) and the time of training (without validation), over all resumes.

    Logs ``train/tokens_per_second`` of all devices together, over the batches since the last log.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._own_tokens: int | torch.Tensor = 0  # of this rank, not yet in `tokens`
        self._clock: float | None = None  # time of the last update; None while time is not counted

    @property
    def tokens_per_second(self) -> float:
        """Mean tokens per second over the whole run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._clock = time.perf_counter()
        self._step = trainer.global_step
        self._logged = (self.tokens, self.seconds)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tick()
        self._paused, self._clock = self._clock is not None, None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._paused:
            self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._own_tokens += _tokens(batch)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if _is_logged(trainer) or trainer.should_stop:
            self._tick()
            tokens, seconds = self._logged
            rate = (self.tokens - tokens) / (self.seconds - seconds)
            pl_module.log("train/tokens_per_second", torch.tensor(rate), on_step=True, batch_size=1)
            self._logged = (self.tokens, self.seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tick()
        self._clock = None

    def state_dict(self) -> dict[str, Any]:
        self._tick()
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]
        self.seconds = state_dict["seconds"]

    def _tick(self) -> None:
        """Update `tokens` and `seconds`; all ranks must call this together."""
        if self._clock is not None:
            own = torch.as_tensor(self._own_tokens, device=self._trainer.strategy.root_device)
            of_all = int(self._trainer.strategy.reduce(own, reduce_op="sum"))  # waits for the device
            self.tokens += of_all * data_rank(self._trainer)[1] // self._trainer.world_size
            self._own_tokens = 0
            now = time.perf_counter()
            self.seconds += now - self._clock
            self._clock = now


class LossCurve(Callback):
    """Keep the losses of a run, over all its resumes, and draw them into a PNG file after each validation.

    Args:
        path: the PNG file.
        loss: the loss to draw, logged as ``train/LOSS`` and ``val/LOSS``.
        label: label of the axis, with the unit.

    Attributes:
        training: (optimizer step, its loss) at every logged step.
        validation: the metrics logged as ``val/...``, with ``step``; the first entry is from before the first step.
    """

    def __init__(self, path: Path, loss: str = "loss", label: str = "loss (nats)") -> None:
        self.path = path
        self.loss = loss
        self.label = label
        self.training: list[tuple[int, float]] = []
        self.validation: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if _is_logged(trainer):
            self.training.append((self._step, trainer.callback_metrics[f"train/{self.loss}"].item()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.append({"step": trainer.global_step, **validation_metrics(trainer)})
        if trainer.is_global_zero and not trainer.sanity_checking:
            self.draw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.draw()

    def draw(self) -> None:
        """Write the PNG file; on an error, no partial file is left."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
        axes = figure.subplots()
        if self.training:
            axes.plot(*zip(*self.training, strict=True), color="tab:blue", alpha=0.5, linewidth=1, label="training")
        heldout = [(point["step"], point[self.loss]) for point in self.validation if self.loss in point]
        if heldout:
            axes.plot(*zip(*heldout, strict=True), color="tab:red", marker="o", markersize=4, label="held-out")
        axes.set(xlabel="optimizer step", ylabel=self.label)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_file(self.path) as file:
            figure.savefig(file, format="png")

    def state_dict(self) -> dict[str, Any]:
        return {"training": self.training, "validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training = state_dict["training"]
        self.validation = state_dict["validation"]


class TrainingProgress(ProgressBar):
    """One progress line over all optimizer steps, with losses, tokens/s and the time left.

    Args:
        seconds_between_lines: time between lines if the output is not a terminal, such as a log file.
    """

    def __init__(self, seconds_between_lines: float = 15.0) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self._enabled = True
        self._line = StatusLine()

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = int(trainer.estimated_stepping_batches)
        self._begin = self._shown = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        between = 0.5 if self._line.live else self.seconds_between_lines
        if not self._enabled or now - self._shown < between or step == self._first_step:
            return
        self._shown = now
        left = (now - self._begin) * (self._total - step) / (step - self._first_step)
        text = f"step {step:,}/{self._total:,}  {_training_text(trainer)}  {clock(left)} left"
        if self._line.live:
            self._line.show(text)
        else:
            say(text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line.clear()
        if self._enabled:
            said = validation_text(validation_metrics(trainer))
            say(f"step {trainer.global_step:,}: held-out text: {said}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._line.clear()


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics that the last validation logged as ``val/...``."""
    metrics = trainer.callback_metrics
    return {name.removeprefix("val/"): metrics[name].item() for name in metrics if name.startswith("val/")}


def validation_text(metrics: dict[str, float]) -> str:
    """Return one line of English for `validation_metrics`."""
    parts = []
    if "mlm_loss" in metrics:
        parts.append(f"masked-LM loss {metrics['mlm_loss']:.3f} nats")
    if "nsp_accuracy" in metrics:
        accuracy, error, chance = (metrics[f"nsp_{name}"] for name in ("accuracy", "standard_error", "chance"))
        parts.append(f"next-sentence accuracy {accuracy:.1%} ± {error:.1%} (chance {chance:.1%})")
    if not parts:
        parts = [f"{name} {value:.4g}" for name, value in metrics.items()]
    return ", ".join(parts)


def _is_logged(trainer: Trainer) -> bool:
    """Whether Lightning logs the optimizer step just done."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def _tokens(batch: Any) -> int | torch.Tensor:
    """Count the real tokens of a batch (packed or dense, sources and targets) or of a list of batches.

    The result is a tensor on the batch's device if there is padding, because reading it would wait for the GPU.
    """
    if isinstance(batch, (list, tuple)):
        return sum(map(_tokens, batch))
    if "real_tokens" in batch:
        return batch["real_tokens"]
    if "input_ids" not in batch:  # one batch for each side of pairs
        return sum(_tokens(side) for side in batch.values() if isinstance(side, Mapping))
    sides = [name for name in ("input_ids", "decoder_input_ids") if name in batch]
    masks = [batch.get(name.replace("input_ids", "attention_mask")) for name in sides]
    return sum(batch[name].numel() if mask is None else mask.sum() for name, mask in zip(sides, masks, strict=True))


def _training_text(trainer: Trainer) -> str:
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    if "train/peak_memory" in metrics:
        metrics["train/peak_memory"] /= 1e9
    formats = {
        "mlm_loss": "mlm {:.3f}",
        "nsp_loss": "nsp {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "peak_memory": "{:.2f} GB",
    }
    if "train/mlm_loss" not in metrics:
        formats = {"loss": "loss {:.3f}", **formats}
    return "  ".join(
        text.format(metrics[f"train/{name}"]) for name, text in formats.items() if f"train/{name}" in metrics
    )
