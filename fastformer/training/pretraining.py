"""Pretraining objectives as LightningModules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from fastformer.models import FastformerConfig, FastformerForPreTraining
from fastformer.models.presets import preset as preset_config
from fastformer.training.optimization import Optimization, Schedule


class MaskedLanguageModeling(LightningModule):
    """BERT's pretraining: masked language modelling, with next-sentence prediction where the batches have it.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019).

    The model is built once the data module's tokenizer is known. Batches are packed (no padding). The loss of a batch
    is the mean over its masked tokens plus the mean over its sentence pairs. With gradient accumulation, and over
    several devices, these means are averaged with equal weights; packed batches hold nearly the same number of
    tokens, so that this differs little from the mean over all masked tokens.

    Logged while training: ``train/loss``, ``train/mlm_loss``, ``train/nsp_loss`` (nats), ``train/learning_rate``; on
    held-out text: ``val/mlm_loss`` (over all masked tokens, each with equal weight), ``val/perplexity`` (its
    exponential), ``val/nsp_accuracy`` with its binomial standard error ``val/nsp_standard_error`` and what always
    giving the commoner answer would reach, ``val/nsp_chance``, and the counts behind them, ``val/masked_tokens`` and
    ``val/sentence_pairs``.

    Args:
        preset: size of the model, a name known to `fastformer.models.presets`.
        overrides: fields of `FastformerConfig` that differ from the preset, such as ``{"num_hidden_layers": 2}``.
        learning_rate: the peak, reached at the end of the warm-up. None: 0.384 / hidden_size, inverse in the width as
            Adam wants it (Yang et al. 2022, https://arxiv.org/abs/2203.03466), which is 3e-3 for bert-tiny and 5e-4
            for bert-base.
        weight_decay: AdamW's, on matrices alone: biases and the weights of norms are not decayed.
        betas: AdamW's decay rates of the first and the second moment.
        eps: AdamW's addend to the root of the second moment.
        warmup_steps: 1 or more: optimizer steps; below 1: share of all optimizer steps.
        schedule: how the learning rate falls to zero at the last step.
    """

    def __init__(
        self,
        preset: str = "bert-tiny",
        overrides: dict[str, Any] | None = None,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        warmup_steps: float = 0.1,
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__()
        # Checked now, before any data is read; without a rate, the model's width will say it.
        self._optimization = Optimization(
            1.0 if learning_rate is None else learning_rate, weight_decay, betas, eps, warmup_steps, schedule
        )
        self.save_hyperparameters()
        self.preset = preset
        self.overrides = overrides or {}
        self.learning_rate = learning_rate
        self.model: FastformerForPreTraining | None = None

    def configure_model(self) -> None:
        if self.model is not None or self._trainer is None:  # without a trainer, on_load_checkpoint builds it
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        from_data = {
            "vocab_size": len(data.tokenizer),
            "pad_token_id": data.tokenizer.pad_token_id,
            "max_position_embeddings": data.max_length,  # positions beyond would never be trained
        }
        self.model = FastformerForPreTraining(preset_config(self.preset, **{**from_data, **self.overrides}))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert self.model is not None
        output = self.model(**batch)
        metrics = {"train/loss": output.loss, "train/mlm_loss": output.mlm_loss}
        if output.nsp_loss is not None:
            metrics["train/nsp_loss"] = output.nsp_loss
        self.log_dict({name: loss.detach() for name, loss in metrics.items()}, batch_size=1)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        return output.loss

    def on_validation_epoch_start(self) -> None:
        # Sum of the MLM loss, masked tokens; pairs, those judged rightly, those whose second segment is random.
        self._sums = torch.zeros(5, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self.model is not None
        output = self.model(**batch)
        masked_tokens = len(batch["masked_positions"])
        if masked_tokens:
            self._sums[0] += output.mlm_loss.item() * masked_tokens
            self._sums[1] += masked_tokens
        if (label := batch.get("next_sentence_label")) is not None:
            self._sums[2] += len(label)
            self._sums[3] += (output.seq_relationship_logits.argmax(dim=-1) == label).sum().item()
            self._sums[4] += label.sum().item()

    def on_validation_epoch_end(self) -> None:
        sums = self._sums
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        metrics = _validation_metrics(*sums.tolist())
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        assert self.model is not None
        rate = self.learning_rate or 0.384 / self.model.config.hidden_size
        return replace(self._optimization, learning_rate=rate).configure(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["model_config"] = self.model.config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.model is None:
            self.model = FastformerForPreTraining(FastformerConfig.from_dict(checkpoint["model_config"]))


def _validation_metrics(
    loss_sum: float, masked_tokens: float, pairs: float, correct: float, random: float
) -> dict[str, float]:
    """Metrics from sums over the held-out text; those with nothing to count are left out."""
    metrics = {"masked_tokens": masked_tokens, "sentence_pairs": pairs}
    if masked_tokens:
        mlm_loss = loss_sum / masked_tokens
        metrics |= {"mlm_loss": mlm_loss, "perplexity": float(np.exp(mlm_loss))}
    if pairs:
        accuracy = correct / pairs
        metrics |= {
            "nsp_accuracy": accuracy,
            "nsp_standard_error": math.sqrt(accuracy * (1 - accuracy) / pairs),
            "nsp_chance": max(random, pairs - random) / pairs,
        }
    return metrics
