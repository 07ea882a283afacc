"""Tests of the optimizer's groups and of the schedule."""

import re
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, T5Config

from fastformer.models import FastformerConfig, FastformerForSequenceClassification
from fastformer.training.module import TrainingModule
from fastformer.training.optimization import (
    Optimization,
    adamw,
    distances_from_output,
    warmup_and_decay,
)

pytestmark = pytest.mark.quick


def test_biases_and_norms_are_not_decayed() -> None:
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    module[1].weight.requires_grad_(False)
    optimizer = adamw(module, learning_rate=1.0, weight_decay=0.5, betas=(0.9, 0.999), eps=1e-8)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay == {
        id(module[0].weight): 0.5,
        id(module[1].bias): 0.0,
        id(module[2].weight): 0.0,
        id(module[2].bias): 0.0,
    }


def test_fused_step_is_adamw() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    module = nn.ParameterList([parameter])
    optimizer = adamw(module, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.999), eps=1e-8)
    parameter.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # In the first step the bias-corrected moments are g and g², so each weight moves by the learning rate.
    torch.testing.assert_close(parameter.data, torch.tensor([[1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]]))
    assert optimizer.param_groups[0]["fused"]


@given(total=st.integers(1, 500), data=st.data(), schedule=st.sampled_from(["linear", "cosine"]))
def test_schedule_rises_then_falls_to_zero(total: int, data: st.DataObject, schedule: str) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    factor = warmup_and_decay(warmup, total, schedule)
    factors = [factor(step) for step in range(total + 1)]
    assert factors[warmup] == pytest.approx(1.0)
    assert factors[total] == pytest.approx(0.0, abs=1e-12)
    assert all(0 < value <= 1 for value in factors[:total])
    assert all(a < b for a, b in pairwise(factors[: warmup + 1]))
    assert all(a > b for a, b in pairwise(factors[warmup:]))


def test_schedules_by_hand() -> None:
    linear, cosine = warmup_and_decay(1, 5, "linear"), warmup_and_decay(1, 5, "cosine")
    assert [linear(step) for step in range(5)] == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert [cosine(step) for step in (0, 1, 3, 5)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_warmup_must_be_shorter_than_the_run(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warmup_steps must be .* below the run's 10 steps; got {warmup}"):
        warmup_and_decay(warmup, 10, "linear")


def bert() -> nn.Module:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
    return FastformerForSequenceClassification(FastformerConfig(vocab_size=10, **shape))


def test_layers_further_from_the_output_learn_slower() -> None:
    """Layers further from the output learn slower.

    In Howard and Ruder (2018), a layer's rate is that of the layer above times the decay.
    """
    module = bert()
    optimizer = adamw(module, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, layer_decay=0.5)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        block = re.match(r"model\.layers\.(\d)\.", name)
        above = 3 - int(block[1]) if block else 4 if name.startswith("model.embeddings.") else 0
        assert rates[id(parameter)] == pytest.approx(1e-3 * 0.5**above), name
        assert decays[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_an_encoders_blocks_are_below_its_decoders() -> None:
    model = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=2)
    )
    distances = distances_from_output(model)
    assert distances["shared.weight"] == 5
    assert distances["encoder.block.0.layer.0.SelfAttention.q.weight"] == 4
    assert distances["encoder.block.1.layer.1.DenseReluDense.wi.weight"] == 3
    assert distances["encoder.final_layer_norm.weight"] == 2
    assert distances["decoder.block.1.layer.2.DenseReluDense.wi.weight"] == 1
    assert distances["decoder.final_layer_norm.weight"] == 0


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_layer_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"layer_decay must be in \(0, 1\]; got {decay}"):
        Optimization(1e-3, layer_decay=decay)


class Watched(TrainingModule):
    """A module that notes before each batch whether there are gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.held: list[bool] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.held.append(self.layer.weight.grad is not None)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("accumulate", "held"), [(1, [False] * 4), (2, [False, True, False, True])])
def test_gradients_are_freed_once_used(accumulate: int, held: list[bool], tmp_path: Path) -> None:
    module = Watched()
    Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(torch.ones(4, 2), batch_size=1))
    assert module.held == held
