"""Training steps of BERT-like and GPT-like models of any size, and the counts of their cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

import fastformer.models
from fastformer.benchmarking.timing import Run
from fastformer.models import FastformerConfig, preset
from fastformer.planning.model_cost import MASKED_SHARE, ModelCost, model_cost
from fastformer.planning.model_work import meta_model
from fastformer.training.optimization import adamw

Kind = Literal["BERT-like", "GPT-like"]
_PRESETS = {"BERT-like": ("bert-base", "FastformerForMaskedLM"), "GPT-like": ("gpt2-small", "FastformerForCausalLM")}
_HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """A model and its batch.

    Attributes:
        kind: BERT's masked-LM pretraining, or GPT-2's pretraining.
        layers, hidden: the number of layers and the hidden size. Heads have 64 features.
        tokens: tokens of a step.
        length: tokens of each sequence; all have the same length.
        vocabulary: the size of the vocabulary.
    """

    kind: Kind
    layers: int
    hidden: int
    tokens: int
    length: int
    vocabulary: int

    @property
    def sequences(self) -> int:
        return self.tokens // self.length

    @property
    def config(self) -> FastformerConfig:
        return preset(
            _PRESETS[self.kind][0],
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=max(1, self.hidden // _HEAD_DIM),
            intermediate_size=4 * self.hidden,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            bos_token_id=None,
            eos_token_id=None,
        )

    @property
    def class_name(self) -> str:
        return _PRESETS[self.kind][1]

    def __str__(self) -> str:
        size = f"{self.layers} layers of {self.hidden:,}"
        return f"{self.kind}, {size}, {self.tokens:,} tokens in sequences of {self.length:,}"


def training_step(
    shape: Shape,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    recomputation: bool = False,
) -> Run:
    """A run of a step on packed random tokens: forward, backward, AdamW. It returns the loss.

    Args:
        shape: the model and its batch.
        device: the device of the model.
        wrap: wraps the model, for example for training by several processes.
        recomputation: whether each block is computed again in the backward.
    """
    torch.manual_seed(0)
    model = getattr(fastformer.models, shape.class_name)(shape.config).to(device).train()
    if recomputation:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, shape.vocabulary, (shape.tokens,), device=device)
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "cu_seqlens": torch.arange(0, shape.tokens + 1, shape.length, dtype=torch.int32, device=device),
        "max_seqlen": shape.length,
    }
    if shape.kind == "BERT-like":
        masked = max(1, round(MASKED_SHARE * shape.length)) * shape.sequences
        inputs["masked_positions"] = torch.randperm(shape.tokens, device=device)[:masked].sort().values
    optimizer = adamw(model, learning_rate=1e-4, weight_decay=0.01, betas=(0.9, 0.98), eps=1e-6)
    _step_without_gradients(model, optimizer)
    wrapped = wrap(model)

    def run() -> float:
        optimizer.zero_grad()
        loss = wrapped(**inputs)["loss"]
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def _step_without_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make a step that creates the optimizer's moments: only the first step of a training starts without them."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@lru_cache
def counted(shape: Shape) -> ModelCost:
    """The cost of each sequence of `shape`, counted without running the model."""
    return model_cost(meta_model(shape.config, shape.class_name, "32-true"), "32-true", shape.length)
