"""Training steps and forwards of Hugging Face models after `accelerate`, compared with the unchanged models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fastformer.benchmarking.measurement import OURS, Goal
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.integrations.acceleration.model import accelerate

AS_IT_WAS = "the model as it was"
BATCH, VOCABULARY, HEAD_DIM = 8, 8192, 64
SHORTEST = 0.1
"""The length of a padded batch's shortest row, as a share of the longest row."""


def bert(hidden: int) -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=hidden // HEAD_DIM,
            intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama(hidden: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=hidden // HEAD_DIM,
            num_key_value_heads=hidden // HEAD_DIM // 2,
            intermediate_size=3 * hidden,
        )
    )


def t5(hidden: int) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=hidden,
        d_kv=HEAD_DIM,
        num_layers=2,
        num_heads=hidden // HEAD_DIM,
        d_ff=4 * hidden,
        dropout_rate=0.0,
    )
    config.update({"decoder_start_token_id": 0})
    return T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {"BERT": bert, "Llama": llama, "T5": t5}


def cases(setting: Setting) -> list[Case]:
    hidden, lengths = (128, (32,)) if setting.quick else (512, (64, 256))
    found = []
    for name in MODELS:
        for length in lengths:
            for padding in ("no", "left" if name == "Llama" else "right"):
                for trains in (True, False):
                    found.append(case(name, hidden, length, padding, trains, setting.device))
    return found


def case(name: str, hidden: int, length: int, padding: str, trains: bool, device: torch.device) -> Case:
    def peer(accelerated: bool) -> Peer:
        def prepare() -> Run:
            torch.manual_seed(0)
            with device:
                model = MODELS[name](hidden).train(trains)
            if accelerated:
                accelerate(model)
            return step(model, batch(length, padding, device), trains)

        return Peer(prepare, packages=("transformers",))

    work = "training step" if trains else "forward"
    return Case(
        f"{padding} padding, {length} tokens: {name}, {work}",
        {OURS: peer(True), AS_IT_WAS: peer(False)},
        {"tokens": BATCH * length},
        equal_losses,
    )


def batch(length: int, padding: str, device: torch.device) -> dict[str, Tensor]:
    """A batch of tokens that are also the labels. With padding, lengths range from the shortest to `length`."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, length))
    if padding == "no":
        given = {"input_ids": ids, "labels": ids}
    else:
        lengths = torch.linspace(SHORTEST * length, length, BATCH).long()[:, None]
        place = torch.arange(length)
        real = place < lengths if padding == "right" else place >= length - lengths
        given = {"input_ids": ids, "labels": ids.masked_fill(~real, -100), "attention_mask": real.long()}
    return {name: tensor.to(device) for name, tensor in given.items()}


def step(model: PreTrainedModel, batch: dict[str, Tensor], trains: bool) -> Run:
    def run() -> float:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(trains):
            loss = model(**batch).loss
        if trains:
            loss.backward()
        return loss.item()

    return run


def equal_losses(losses: dict[str, object]) -> None:
    torch.testing.assert_close(losses[OURS], losses[AS_IT_WAS], rtol=1e-5, atol=0)


STUDY = TimedStudy(
    name="accelerated",
    title="Hugging Face models after `fastformer.accelerate`, compared with the same models before it",
    cases=cases,
    rounds=11,
    shortest_turn=0.5,  # the goals are about differences of one per cent
    goals=(
        Goal("", AS_IT_WAS, at_least=0.98),
        Goal("left padding, 256 tokens", AS_IT_WAS, at_least=1.0),
        Goal("right padding, 256 tokens", AS_IT_WAS, at_least=1.0),
    ),
    note=f"Batches have {BATCH} rows. In padded batches, lengths are spread evenly from {SHORTEST:.0%} to 100% of the "
    "longest.",
)
