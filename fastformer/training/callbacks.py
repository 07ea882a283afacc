"""Lightning callbacks that all runs share.

Seeding, torch.compile, time limit, throughput, loss curve, progress line, saving the model and early stopping.
"""

from __future__ import annotations

import copy
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import nn

from fastformer.console import StatusLine, clock, say
from fastformer.files import atomic_file, atomic_folder
from fastformer.training.checkpoints import check_checkpoint, save_checked
from fastformer.training.finite import check_finite
from fastformer.training.loading.resuming import data_rank
from fastformer.training.sharding import load_weights


class StepSeed(Callback):
    """Seed Python's, NumPy's and PyTorch's generators before each training batch, from (seed, rank, batch number).

    The random numbers of a step (dropout) then do not depend on earlier ones, so a resumed run repeats an uninterrupted
    run exactly, whenever validation, logging or checkpoints happened. Lightning's checkpoints hold the batch number.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        entropy = [self.seed, data_rank(trainer)[0], trainer.fit_loop.total_batch_idx]
        for_python, for_numpy, for_torch = np.random.SeedSequence(entropy).generate_state(3).tolist()
        random.seed(for_python)
        np.random.seed(for_numpy)
        torch.manual_seed(for_torch)


class CompileModel(Callback):
    """Compile the model's forward and backward with torch.compile, for any sequence lengths, when a run starts."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.model.compile(dynamic=True)  # type: ignore[union-attr]


class StopAtLimit(Callback):
    """End training after the last optimizer step, or after the step in which the time limit is reached.

    Lightning then validates, and `StepCheckpoint` saves, at exactly that step. Time counts from the start of training,
    and starts again in a resumed run.

    Args:
        max_minutes: time limit in minutes; None for no limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        if max_minutes is not None and not max_minutes > 0:
            raise ValueError(f"max_minutes must be above 0; got {max_minutes}")
        self.max_minutes = max_minutes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.monotonic()
        self._step = trainer.global_step
        self._last_step = trainer.estimated_stepping_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        if self._step >= self._last_step or self._out_of_time(trainer):
            trainer.should_stop = True

    def _out_of_time(self, trainer: Trainer) -> bool:
        if self.max_minutes is None:
            return False
        return trainer.strategy.reduce_boolean_decision(
            time.monotonic() - self._begin >= 60 * self.max_minutes, all=False
        )


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


class SavePretrained(Callback):
    """Save model and tokenizer in Hugging Face format at the end of training: a complete folder or none.

    After ``import fastformer.models``, ``transformers.pipeline(..., folder)`` can use it. PEFT's adapters are merged
    into the weights.

    Args:
        folder: an existing folder is replaced; if it is a link, the link itself is replaced.
        adapter_alone: save only the adapter of a PEFT model, in PEFT's format, without the base weights.
        claim: is called with the names of the files before they are in the folder.

    Raises:
        ValueError: a weight is not finite.
    """

    def __init__(
        self, folder: Path, adapter_alone: bool = False, claim: Callable[[list[str]], None] | None = None
    ) -> None:
        self.folder = folder
        self.claim = claim
        self.adapter_alone = adapter_alone
        self._saved = False
        self._adapted: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        if stage == "fit" and hasattr(model, "peft_config") and not self.adapter_alone:
            self._adapted = without_memory(model)  # before sharding: a sharded model cannot be merged

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._saved:  # resumed after the last step: there was nothing to train
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()  # a collective operation if the model is sharded
        self._saved = True
        if not trainer.is_global_zero:
            return
        model: Any = pl_module.model
        check_finite(state)
        state = {key.removeprefix("model."): state[key] for key in state if key.startswith("model.")}
        first: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):  # a sharded model copied tied ones
            state[name] = state[first.setdefault(parameter, name)]
        if self._adapted is not None:
            self._adapted.load_state_dict(state, assign=True)
            model = self._adapted.merge_and_unload()
            state = model.state_dict()
        tokenizer = copy.deepcopy(trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None:
            tokenizer.model_max_length = min(longest, getattr(tokenizer, "model_max_length", longest))
        with atomic_folder(self.folder, replace=True) as folder:
            model.save_pretrained(folder, state_dict=state)
            model.config.save_pretrained(folder)  # for an adapter too: it names the labels
            tokenizer.save_pretrained(folder)
            if self.claim is not None:
                self.claim([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()])


class EarlyStopping(Callback):
    """Stop when the monitored metric no longer improves, and restore the weights of the best validation.

    (Lightning's own callback keeps no weights, and a stopped run that is resumed does not stay stopped.) The best
    weights are kept in a separate file. A resumed run repeats the validations after its checkpoint, and writes the file
    again if they are better. A value that is not finite is worse than any number. If the file is damaged, the search
    for the best starts again from there.

    Args:
        path: file for the best trainable weights.
        monitor: the metric, logged as ``val/MONITOR``.
        mode: whether the smallest ("min") or the largest ("max") value is best.
        patience: number of validations without improvement after which training stops.
        run: returns the id of this run, None if unknown; a file of another run counts as damaged.
    """

    def __init__(
        self,
        path: Path,
        monitor: str,
        mode: Literal["min", "max"],
        patience: int,
        run: Callable[[], str | None] = lambda: None,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be 1 or more; got {patience}")
        self.path = path
        self.monitor = monitor
        self.sign = 1.0 if mode == "min" else -1.0
        self.patience = patience
        self.run = run
        self.best: float | None = None
        self.step = 0
        self.waited = 0
        self._restored = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None:
            self._check_file()
        trainer.should_stop = self.waited >= self.patience  # a run that had stopped was resumed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = validation_metrics(trainer)
        if self.monitor not in metrics:
            raise ValueError(f"there is no metric {self.monitor!r} to monitor; there are {', '.join(metrics)}")
        found = metrics[self.monitor]
        if math.isfinite(found) and (self.best is None or self.sign * found < self.sign * self.best):
            self.best, self.step, self.waited = found, trainer.global_step, 0
            self._save(trainer, pl_module)
        else:
            self.waited += 1
        if self.waited >= self.patience:
            trainer.should_stop = True

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            trained = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
            save_checked({"run": self.run(), "weights": {name: state[name] for name in trained}}, self.path)

    def _check_file(self) -> None:
        """Forget the best value if its weights are lost."""
        try:
            check_checkpoint(self.path)
            if (run := self.run()) is not None and self._content("meta").get("run") != run:
                raise ValueError(f"{self.path} belongs to another run")
        except (ValueError, OSError) as error:
            warnings.warn(f"the best weights so far are lost, and looked for again: {error}", stacklevel=2)
            self.best, self.waited = None, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None and not self._restored:
            self._check_file()
        self._restore(trainer, pl_module)  # resumed after the last step: there was nothing to train

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is None or self._restored:
            return
        self._restored = True
        trainer.strategy.barrier()
        content = self._content(pl_module.device)
        load_weights(pl_module, content.get("weights", content))  # a file of an older run has only the weights

    def _content(self, device: torch.device | str) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        return content

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "step": self.step, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.step, self.waited = (state_dict[name] for name in ("best", "step", "waited"))


def without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its parameters on the meta device, which takes no memory for them."""
    memo = {
        id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad) for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


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
