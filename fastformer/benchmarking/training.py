"""Optimizer steps on equal batches: our model in Lightning's Trainer, Hugging Face's model in their Trainer.

Both start from the same weights with the same optimizer: AdamW with fused steps, decay of matrices only, a learning
rate that falls linearly, gradients clipped at norm 1. The time of each trainer, loader and collation counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from numpy.typing import NDArray
from transformers import BertConfig, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import Run
from fastformer.training.optimization import Optimization
from fastformer.training.run import quieten

HUGGING_FACE = "Hugging Face Trainer"
VOCABULARY = 30522
# Fields of `BertConfig` that differ from bert-base's.
Shape = dict[str, Any]
BASE: Shape = {}
SMALL: Shape = {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
TINY: Shape = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}

# The optimizer of our modules; `theirs` uses the same.
_RATE = 1e-4
OPTIMIZATION = Optimization(_RATE, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, warmup_steps=0)

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


def median_batches(lengths: NDArray[np.int64], size: int, number: int) -> list[NDArray[np.int64]]:
    """Indices of `number` random batches of `size` sequences: those with a share of padding around the median.

    Batches that are padded to their longest sequence differ much. A few steps should represent an epoch.
    """
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = order[: len(order) // size * size].reshape(-1, size)
    share = lengths[batches].mean(axis=1) / lengths[batches].max(axis=1)
    middle = (len(batches) - number) // 2
    return list(batches[np.argsort(share, kind="stable")[middle : middle + number]])


def bert(shape: Shape, dropout: float) -> BertConfig:
    """A configuration of BERT with this dropout of hidden states and attention weights."""
    return BertConfig(vocab_size=VOCABULARY, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **shape)


def ours(module: LightningModule, data: LightningDataModule, steps: int) -> Run:
    """A run of `steps` steps of our module. It returns the mean loss."""
    quieten()

    def run() -> float:
        losses = _Losses()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[losses],
        )
        trainer.fit(module, datamodule=data)
        return torch.stack(losses.of_steps).mean().item()

    return run


class _Losses(lightning.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.of_steps: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.of_steps.append(outputs["loss"])


def theirs(
    model: PreTrainedModel,
    examples: Sequence[dict[str, torch.Tensor]],
    collate: Collate,
    batch_size: int,
    *,
    sampling: str = "sequential",
    compiled: bool = False,
) -> Run:
    """A run of one epoch of the examples under Hugging Face's Trainer. It returns the mean loss.

    Args:
        model: the model to train, in training mode.
        examples: the examples, in the order of the batches.
        collate: makes a padded batch.
        batch_size: examples of each batch.
        sampling: `TrainingArguments.train_sampling_strategy`.
        compiled: `TrainingArguments.torch_compile`.
    """

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=batch_size,
                max_steps=len(examples) // batch_size,
                learning_rate=_RATE,
                weight_decay=OPTIMIZATION.weight_decay,
                adam_epsilon=OPTIMIZATION.eps,
                adam_beta1=OPTIMIZATION.betas[0],
                adam_beta2=OPTIMIZATION.betas[1],
                train_sampling_strategy=sampling,
                torch_compile=compiled,
                use_cpu=True,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
            trainer.remove_callback(PrinterCallback)
            return trainer.train().training_loss

    return run


def padded(sequences: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """The sequences as a tensor (batch, longest), filled up with `padding`."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=padding)


def attention_mask(sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    """A mask (batch, longest) int64: 1 for a token, 0 for padding."""
    return padded([torch.ones_like(sequence) for sequence in sequences], 0)


def assert_equal_losses(runs: dict[str, Run]) -> None:
    """Check that training without dropout gives equal losses. `runs` are ours and theirs."""
    losses = {name: run() for name, run in runs.items()}
    torch.testing.assert_close(losses[OURS], losses[HUGGING_FACE], rtol=1e-5, atol=0)
