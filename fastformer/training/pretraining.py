"""Pretraining objectives as LightningModules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from transformers import PreTrainedTokenizerBase

import fastformer.models as models
from fastformer.models import FastformerConfig, FastformerPreTrainedModel
from fastformer.models.presets import SMALLEST
from fastformer.models.presets import preset as preset_config
from fastformer.training.loading.steps import label_counts
from fastformer.training.module import TrainingModule
from fastformer.training.optimization import Optimization
from fastformer.training.tensor_parallel import parallelize

# Settings with which the smallest model learns within minutes to use other tokens, and not only token frequencies:
# positions that need no learning, initial weights for its 128 features (BERT's 0.02 is for 768), and no dropout.
_QUICK_TO_LEARN: dict[str, Any] = {
    "position_embedding": "rotary",
    "initializer_range": 128**-0.5,
    "hidden_dropout_prob": 0.0,
}


class PretrainingModule(TrainingModule):
    """The base class of the objectives: the model, its optimizer, checkpoints and measurements.

    The model is built when the data module's tokenizer is known. Batches are packed (no padding) and come from
    `PretrainingDataModule`. The targets of an optimizer step's loss are all its labelled tokens.

    Logged with each optimizer step: ``train/loss`` (nats), ``train/learning_rate``. Logged on held-out text:
    ``val/loss`` (over all labelled tokens), ``val/perplexity`` (its exponential) and ``val/tokens``, their number.

    Args:
        preset: architecture and size of the model, a name known to `fastformer.models.presets`. None: a small model of
            the objective's usual architecture.
        overrides: fields of `FastformerConfig` that differ from the preset, such as ``{"num_hidden_layers": 2}``.
        optimization: the optimizer and its schedule; a dict of its fields if it comes from a checkpoint.
        activation_checkpointing: keep only the input of each block, and compute the rest again in the backward pass.
    """

    architecture: ClassVar[str]
    """The class of the model."""
    default_settings: ClassVar[dict[str, Any]] = {}
    """Settings that make the smallest preset a model for this objective; used if no preset is given."""
    losses: tuple[str, ...] = ("loss",)
    """Names of the parts of the loss: of tokens, and of pairs of segments if there are any."""
    loss_label: ClassVar[str] = "loss (nats per token)"
    default_steps: ClassVar[int] = 1000
    """Optimizer steps that take minutes on two CPU cores, with the default corpus and model."""
    continued: dict[str, torch.Size] | None = None
    """Names and shapes of the weights in the checkpoint to continue from; the model must have the same."""

    def __init__(
        self,
        preset: str | None = None,
        overrides: dict[str, Any] | None = None,
        optimization: Optimization | dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(optimization, Optimization):
            optimization = Optimization(**(optimization or {}))
        self.optimization = optimization
        optimization = asdict(optimization)  # plain values, for a checkpoint that is read without classes
        self.save_hyperparameters()
        self.preset = preset
        self.overrides = overrides or {}
        self.activation_checkpointing = activation_checkpointing
        self.model: FastformerPreTrainedModel | None = None

    # --- The model ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.model is not None or self._trainer is None:  # without a trainer, on_load_checkpoint builds it
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        settings = {
            **(self.default_settings if self.preset is None else {}),
            "vocab_size": len(data.tokenizer),
            "max_position_embeddings": data.max_length,  # positions beyond would never be trained
            **self._special_tokens(data.tokenizer),
            **self.overrides,
        }
        if settings["vocab_size"] < len(data.tokenizer):
            raise ValueError(
                f"overrides: vocab_size must be at least the tokenizer's {len(data.tokenizer):,}; got "
                f"{settings['vocab_size']}"
            )
        config = preset_config(SMALLEST if self.preset is None else self.preset, **settings)
        self.model = getattr(models, self._architecture())(config)
        self._check_continued()
        if self.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            parallelize(self.model, self.device_mesh["tensor_parallel"])
        super().configure_model()

    def _check_continued(self) -> None:
        """Refuse a checkpoint that does not fit the model.

        Text and options are known here, and no weights are loaded yet: a sharded model would load them before checking.
        """
        own = {name: weight.shape for name, weight in self.state_dict().items()}
        before = own if self.continued is None else self.continued
        for name in sorted({*own, *before}):
            if own.get(name) != before.get(name):
                there, here = (" x ".join(map(str, each.get(name, ()))) or "none" for each in (before, own))
                raise ValueError(
                    f"the checkpoint cannot be continued with other data or another model: its {name} is {there}, this "
                    f"run's {here}; resume with the same text and options, or start a new run"
                )

    def _architecture(self) -> str:
        return self.architecture

    def _special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
        return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["model_config"] = self.model.config.to_dict()
        checkpoint["architecture"] = type(self.model).__name__
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None and self.model is None:
            config = FastformerConfig.from_dict(checkpoint["model_config"])
            self.model = getattr(models, _saved_architecture(checkpoint))(config)

    def weights_for(self, checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the weights that a checkpoint of this objective must have, according to its model; without memory.

        Raises:
            ValueError: the checkpoint is of another objective.
        """
        architecture = _saved_architecture(checkpoint)
        if architecture not in (self._architecture(), "FastformerForMaskedLM" if len(self.losses) == 2 else None):
            raise ValueError(f"its model is a {architecture}")
        with torch.device("meta"):
            self.on_load_checkpoint(checkpoint)
        weights = self.state_dict()
        self.continued = {name: weight.shape for name, weight in weights.items()}
        self.model = None  # the next checkpoint may have another size
        return weights

    # --- Training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        batch = dict(batch)
        counts = batch.pop("label_counts")[:, : len(self.losses)]
        return self.step_of(batch, counts)

    def batch_losses(self, batch: dict[str, Any]) -> Sequence[torch.Tensor]:
        assert self.model is not None
        return self._loss_parts(self.model(**batch))

    def step_metrics(self, losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**dict(zip(self.losses, losses, strict=True)), "loss": torch.stack(list(losses)).sum()}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        assert self.model is not None
        return self.optimization.for_width(self.model.config.hidden_size).configure(self)

    def _loss_parts(self, output: Any) -> list[torch.Tensor]:
        """Return the parts of the loss that `losses` names: means over a batch's labels, in nats."""
        return [output.loss]

    # --- Validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        # Sum of the loss, and labelled tokens; on the device, so that no batch waits for them.
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self.model is not None
        output = self.model(**batch)
        tokens, loss = label_counts(batch)[0], self._loss_parts(output)[0].double()
        self._sums[0] += torch.where(tokens > 0, loss * tokens, 0.0)  # the mean over no tokens is NaN
        self._sums[1] += tokens
        self._measure(batch, output)

    def _measure(self, batch: dict[str, Any], output: Any) -> None:
        """Add the other measurements to `_sums`."""

    def on_validation_epoch_end(self) -> None:
        metrics = self._validation_metrics(*self.over_ranks(self._sums).tolist())
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def _validation_metrics(self, *sums: float) -> dict[str, float]:
        loss_sum, tokens = sums
        return {"tokens": tokens, **_token_metrics("loss", loss_sum, tokens)}


class MaskedLanguageModeling(PretrainingModule):
    """BERT's pretraining: masked language modelling, with next-sentence prediction if the batches have pairs.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019).

    The loss of an optimizer step is the mean over all its masked tokens plus the mean over all its pairs. The label of
    a pair says whether its segments belong together or, with the data's sentence_order, whether they were swapped.

    Also logged: ``train/mlm_loss``, ``train/nsp_loss``; on held-out text ``val/mlm_loss`` and ``val/masked_tokens``
    instead of loss and tokens, ``val/nsp_accuracy`` with its binomial standard error ``val/nsp_standard_error``,
    ``val/nsp_chance`` (the accuracy of always giving the more frequent answer) and ``val/sentence_pairs``.
    """

    default_settings: ClassVar = _QUICK_TO_LEARN
    losses: tuple[str, ...] = ("mlm_loss", "nsp_loss")
    loss_label = "masked-LM loss (nats per masked token)"

    def configure_model(self) -> None:
        if self._trainer is not None and not self.trainer.datamodule.next_sentence:  # type: ignore[attr-defined]
            self.losses = self.losses[:1]
        super().configure_model()

    def _architecture(self) -> str:
        return "FastformerForPreTraining" if len(self.losses) == 2 else "FastformerForMaskedLM"

    def _loss_parts(self, output: Any) -> list[torch.Tensor]:
        return [output.mlm_loss, output.nsp_loss] if len(self.losses) == 2 else [output.loss]

    def on_validation_epoch_start(self) -> None:
        # Sum of the MLM loss, masked tokens; pairs, right predictions, pairs with a random second segment.
        self._sums = torch.zeros(5, dtype=torch.float64, device=self.device)

    def _measure(self, batch: dict[str, Any], output: Any) -> None:
        if (label := batch.get("next_sentence_label")) is not None:
            self._sums[2] += len(label)
            self._sums[3] += (output.seq_relationship_logits.argmax(dim=-1) == label).sum()
            self._sums[4] += label.sum()

    def _validation_metrics(self, *sums: float) -> dict[str, float]:
        return _masked_metrics(*sums)


class CausalLanguageModeling(PretrainingModule):
    """GPT's pretraining: predict every token from the tokens before it in its document.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
    """

    architecture = "FastformerForCausalLM"
    default_steps = 500  # each token is predicted
    default_settings: ClassVar = {
        **_QUICK_TO_LEARN,
        "stack": "decoder",
        "type_vocab_size": 0,
        "hidden_act": "gelu_new",
        "norm_placement": "pre",
        "layer_norm_eps": 1e-5,
        "embedding_norm": False,
    }


class SpanCorruptionModeling(PretrainingModule):
    """T5's pretraining: predict the spans that were replaced by sentinels.

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020). Without a
    preset, the model is like T5 1.1 (gated, relative positions), but its output projection is the word embedding.
    """

    architecture = "FastformerForSeq2SeqLM"
    default_settings: ClassVar = {
        "stack": "encoder_decoder",
        "type_vocab_size": 0,
        "hidden_act": "gelu_new",
        "gated": True,
        "position_embedding": "relative",
        "norm": "rms",
        "norm_placement": "pre",
        "layer_norm_eps": 1e-6,
        "embedding_norm": False,
        "attention_bias": False,
        "attention_output_bias": False,
        "feed_forward_bias": False,
    }

    def _special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
        return {**super()._special_tokens(tokenizer), "decoder_start_token_id": tokenizer.pad_token_id}


class DenoisingModeling(PretrainingModule):
    """BART's pretraining: predict a text from a copy with masked spans and with sentences in another order.

    Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation, and
    Comprehension" (2020).
    """

    architecture = "FastformerForSeq2SeqLM"
    default_steps = 500  # each token is predicted
    default_settings: ClassVar = {
        **_QUICK_TO_LEARN,
        "stack": "encoder_decoder",
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-5,
    }

    def _special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
        return {**super()._special_tokens(tokenizer), "decoder_start_token_id": tokenizer.eos_token_id}


MODULES: dict[str, type[PretrainingModule]] = {
    "mlm": MaskedLanguageModeling,
    "clm": CausalLanguageModeling,
    "span-corruption": SpanCorruptionModeling,
    "denoising": DenoisingModeling,
}
"""The module of each objective of `PretrainingDataModule`."""


def _token_metrics(name: str, loss_sum: float, tokens: float) -> dict[str, float]:
    """Return the mean loss under this name, and the perplexity; nothing if there are no tokens."""
    if not tokens:
        return {}
    return {name: loss_sum / tokens, "perplexity": float(np.exp(loss_sum / tokens))}


def _masked_metrics(
    loss_sum: float, masked_tokens: float, pairs: float, correct: float, random: float
) -> dict[str, float]:
    """Return metrics from sums over the held-out text; metrics with nothing to count are left out."""
    metrics = {"masked_tokens": masked_tokens, "sentence_pairs": pairs}
    metrics |= _token_metrics("mlm_loss", loss_sum, masked_tokens)
    if pairs:
        accuracy = correct / pairs
        metrics |= {
            "nsp_accuracy": accuracy,
            "nsp_standard_error": math.sqrt(accuracy * (1 - accuracy) / pairs),
            "nsp_chance": max(random, pairs - random) / pairs,
        }
    return metrics


def _saved_architecture(checkpoint: dict[str, Any]) -> str:
    """Return the class name of a checkpoint's model, without the prefix that FSDP adds to a sharded model's class."""
    return str(checkpoint["architecture"]).removeprefix("FSDP")
