"""Lightning callbacks that all runs share: seeding, torch.compile, the time limit, and saving the model.

What a run shows is in `progress`, early stopping in `early_stopping`.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from fastformer.files import atomic_folder
from fastformer.training.finite import check_finite
from fastformer.training.loading.resuming import data_rank


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


def without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its parameters on the meta device, which takes no memory for them."""
    memo = {
        id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad) for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)
