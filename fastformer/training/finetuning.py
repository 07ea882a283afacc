"""Fine-tuning as LightningModules: one for each kind of output layer, with a common base class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from fastformer.data.packing import IGNORE_INDEX
from fastformer.training.adversarial import Adversary
from fastformer.training.module import TrainingModule
from fastformer.training.optimization import Optimization
from fastformer.training.privacy import Privacy, accumulate_example, noised_gradients

Batch = Mapping[str, Any]
Judge = Callable[[list[Any]], dict[str, float]]
"""Computes metrics by name from the results of `FineTuning.outputs` for all held-out sequences, in order."""


class FineTuning(TrainingModule):
    """Training of a model on a task: the model's loss, and the outputs that the task's metrics need.

    Batches hold the arguments of the model's forward, packed or dense, with labels. Training batches also have
    ``label_counts``, made by `with_label_counts` from `targets`. Logged with each optimizer step: ``train/loss``,
    ``train/adversarial_loss``, ``train/learning_rate`` (the largest). Logged on held-out examples: ``val/loss``, over
    all targets with equal weight, and the metrics of `judge` as ``val/...``.

    Args:
        model: Fastformer's or Hugging Face's model, with PEFT's adapters or without.
        optimization: the optimizer and its schedule.
        adversary: for adversarial training.
        privacy: for differential privacy; batches are then lists of batches of one example (`PoissonBatches`).
        examples: number of training examples; needed for `privacy`.
    """

    def __init__(
        self,
        model: Any,
        optimization: Optimization,
        adversary: Adversary | None = None,
        privacy: Privacy | None = None,
        examples: int | None = None,
    ) -> None:
        super().__init__()
        if privacy is not None:
            if adversary is not None:
                raise ValueError("adversarial training and differential privacy cannot be combined; choose one")
            if examples is None:
                raise ValueError("examples must be given with privacy: the number of examples to train on")
        self.model = model
        self.optimization = optimization
        self.adversary = adversary
        self.privacy = privacy
        self.examples = examples
        self.automatic_optimization = privacy is None
        self.judge: Judge | None = None
        self.noise_multiplier: float | None = None

    # --- Differences between tasks ------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Return the mean loss of a batch, and the model's output."""
        output = self.model(**batch)
        return output.loss, output

    def targets(self, batch: Batch) -> float:
        """Return the number of targets in the mean loss of a batch, or the sum of their weights."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def outputs(self, batch: Batch, output: Any) -> list[Any]:
        """Return for each sequence of a batch the values that predictions need; empty if only the loss is validated."""
        return []

    # --- Training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        if self.privacy is not None:
            self._private_step(batch)
            return None
        batch = dict(batch)
        counts = batch.pop("label_counts")
        return self.step_of(batch, counts if self.adversary is None else counts.expand(2, 2))

    def batch_losses(self, batch: Batch) -> Sequence[torch.Tensor]:
        if self.adversary is None:
            return [self.run(batch)[0]]
        return self.adversary.losses(self.model.get_input_embeddings(), lambda: self.run(batch)[0], _boundaries(batch))

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        if self.adversary is None:
            return losses.sum()
        clean, adversarial = losses
        return clean + self.adversary.weight * adversarial

    def step_metrics(self, losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(("loss", "adversarial_loss"), losses, strict=False))

    def _private_step(self, examples: Sequence[Batch]) -> None:
        optimizer: Any = self.optimizers()
        losses = []
        optimizer.zero_grad()
        for example in examples:
            loss, _ = self.run(example)
            self.manual_backward(loss)
            accumulate_example(self._mechanism)
            losses.append(loss.detach())
        if losses and self.watch is not None:
            self.watch.see(self, torch.stack(losses).sum(), max(group["lr"] for group in optimizer.param_groups))
        noised_gradients(self._mechanism)
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        # The logged loss is not private: it is for the owner of the data.
        self.log("train/loss", torch.stack(losses).mean() if losses else torch.tensor(math.nan), batch_size=1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        configured = self.optimization.configure(self)
        if self.privacy is not None:
            assert self.examples is not None
            steps = int(self.trainer.estimated_stepping_batches)
            self._mechanism = self.privacy.mechanism(configured["optimizer"], self.examples, steps)
            self.noise_multiplier = self._mechanism.noise_multiplier
        return configured

    # --- Validation and prediction ------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._loss_sum = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, targets
        self._outputs: list[list[Any]] = []  # one list per batch

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, output = self.run(batch)
        targets = self.targets(batch)
        if targets:
            self._loss_sum[0] += loss.double() * targets
            self._loss_sum[1] += targets
        if self.judge is not None:
            self._outputs.append(self.outputs(batch, output))

    def on_validation_epoch_end(self) -> None:
        total, targets = self.over_ranks(self._loss_sum).tolist()
        metrics = {"loss": total / targets} if targets else {}
        if self.judge is not None and (outputs := self._outputs_of_all_ranks()):
            metrics |= self.judge(outputs)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def _outputs_of_all_ranks(self) -> list[Any]:
        """Return the outputs of all ranks in the order of the examples: ranks take batches in turn."""
        ranks: list[Any] = [self._outputs]
        if self.trainer.world_size > 1:
            ranks = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(ranks, self._outputs)
        return [output for batches in zip(*ranks, strict=True) for batch in batches for output in batch]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Any]:
        return self.outputs(batch, self.model(**batch))


class Classification(FineTuning):
    """Classification of whole sequences, or regression of one number.

    `outputs` returns for each sequence (labels,) logits, float32.

    Args:
        class_weights: the weight of each class in the loss ``Σ w[y] · loss / Σ w[y]``; None for equal weights.
    """

    _weights_of_loss: torch.Tensor | None

    def __init__(self, *arguments: Any, class_weights: Sequence[float] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        classes = self.model.config.num_labels
        if class_weights is not None and not (len(class_weights) == classes and _are_weights(class_weights)):
            raise ValueError(
                f"class_weights must be {classes} numbers of at least 0, one for each class, and not all 0; got "
                f"{class_weights}"
            )
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("_weights_of_loss", self.class_weights, persistent=False)  # moves with the model

    def run(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        if self.class_weights is None:
            return super().run(batch)
        output = self.model(**{name: value for name, value in batch.items() if name != "labels"})
        logits, labels = output.logits.float().flatten(0, -2), batch["labels"].flatten()
        return F.cross_entropy(logits, labels, self._weights_of_loss, ignore_index=IGNORE_INDEX), output

    def targets(self, batch: Batch) -> float:
        if self.class_weights is None:
            return super().targets(batch)
        labels = batch["labels"].cpu()
        return self.class_weights[labels[labels != IGNORE_INDEX]].sum().item()

    def outputs(self, batch: Batch, output: Any) -> list[Any]:
        return list(output.logits.float().cpu().numpy())


class Tagging(Classification):
    """Classification of each token. `outputs` returns for each sequence (tokens, labels) logits, float32."""

    def outputs(self, batch: Batch, output: Any) -> list[Any]:
        return sequences(batch, output.logits.float().cpu().numpy())


class QuestionAnswering(FineTuning):
    """Finding the start and the end of an answer. `outputs` returns for each sequence (tokens, 2) logits, float32."""

    def targets(self, batch: Batch) -> float:
        return int((batch["start_positions"] != IGNORE_INDEX).sum())

    def outputs(self, batch: Batch, output: Any) -> list[Any]:
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1).float().cpu().numpy()
        return sequences(batch, logits)


class Generation(FineTuning):
    """Generating text from text, by an encoder-decoder or a decoder. Validation measures only the loss on targets."""


class Embedding(FineTuning):
    """Contrastive learning of sentence embeddings: InfoNCE with in-batch negatives.

    The loss of a pair is the cross-entropy of finding its positive among all positives and negatives of the batch, by
    cosine similarity / temperature (van den Oord et al. 2018; Gao et al., "SimCSE", 2021). If `symmetric`, the loss of
    finding its anchor among all anchors is averaged in. If the model's output has no ``embeddings``, its hidden states
    are averaged over real tokens and normalised.

    `outputs` returns for each pair the vectors of its anchor and its positive, (2, hidden_size) float32.

    Args:
        temperature: divides the cosine similarities.
        symmetric: also find the anchor of each positive.
    """

    may_be_padded = False  # a pair is found among all others of its batch

    def __init__(self, *arguments: Any, temperature: float = 0.05, symmetric: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.privacy is not None:
            raise ValueError(
                "privacy needs the gradient of each example, but with in-batch negatives a loss depends on all examples"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        self.temperature = temperature
        self.symmetric = symmetric
        # A mean over tokens does not use the pooler, and several devices would wait for its gradients.
        for name, parameter in self.model.named_parameters():
            if "pooler" in name.split("."):
                parameter.requires_grad_(False)

    def run(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        anchors, positives = self.embed(batch["anchor"]), self.embed(batch["positive"])
        candidates = torch.cat([positives, self.embed(batch["negative"])]) if "negative" in batch else positives
        own = torch.arange(len(anchors), device=anchors.device)
        loss = F.cross_entropy(anchors @ candidates.T / self.temperature, own)
        if self.symmetric:
            loss = (loss + F.cross_entropy(positives @ anchors.T / self.temperature, own)) / 2
        return loss, (anchors, positives)

    def embed(self, inputs: Batch) -> torch.Tensor:
        """Return (sequences, hidden_size) float32 vectors of norm 1."""
        output = self.model(**inputs)
        if (vectors := getattr(output, "embeddings", None)) is None:
            mask = inputs["attention_mask"].unsqueeze(-1)
            vectors = (output.last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)
        return F.normalize(vectors.float(), dim=-1)

    def targets(self, batch: Batch) -> float:
        anchors = batch["anchor"]
        return len(anchors["cu_seqlens"]) - 1 if "cu_seqlens" in anchors else len(anchors["input_ids"])

    def outputs(self, batch: Batch, output: Any) -> list[Any]:
        return list(torch.stack(output, dim=1).cpu().numpy())

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Any]:
        return self.outputs(batch, (self.embed(batch["anchor"]), self.embed(batch["positive"])))


def _are_weights(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in values) and any(values)


def sequences(batch: Batch, values: np.ndarray) -> list[np.ndarray]:
    """Divide the values of all tokens, packed or dense, into sequences without padding."""
    if "cu_seqlens" in batch:
        return [values[start:end] for start, end in pairwise(batch["cu_seqlens"].tolist())]
    mask = batch["attention_mask"].bool().cpu().numpy()
    return [row[real] for row, real in zip(values, mask, strict=True)]


def _boundaries(batch: Batch) -> list[torch.Tensor]:
    """Return the offsets of each packed side of a batch, in the order in which a model embeds the sides."""
    sides = [batch[name] for name in ("anchor", "positive", "negative") if name in batch] or [batch]
    return [side[name] for side in sides for name in ("cu_seqlens", "decoder_cu_seqlens") if name in side]
