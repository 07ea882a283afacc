"""A head that needs the last hidden states of only some tokens gets the values that it gets among all tokens."""

from __future__ import annotations

import pytest
import torch
from devices import here
from torch import nn

from fastformer.models import (
    FastformerConfig,
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForSequenceClassification,
    FastformerModel,
)
from fastformer.models.selection import Selection
from fastformer.nn import Packing

LENGTHS = [9, 0, 1, 14, 0]
TOTAL = sum(LENGTHS)
PATTERNS = {
    "plain": {},
    "pre-norm": {"norm_placement": "pre"},
    "grouped queries": {"num_key_value_heads": 1},
    "no biases": {"attention_bias": False},
    "rotary": {"position_embedding": "rotary"},
    "ALiBi": {"position_embedding": "alibi"},
    "window": {"sliding_window": 3},
}


def config(**options) -> FastformerConfig:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FastformerConfig(
        **{**shape, "intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.3, **options}
    )


def packing() -> Packing:
    return Packing(torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32), max(LENGTHS))


def batch() -> dict[str, torch.Tensor | int]:
    ids = torch.randint(1, 50, (TOTAL,), generator=torch.Generator().manual_seed(0), device="cpu")
    return {"input_ids": here(ids), **packing()._asdict()}


def labelled(positions: list[int]) -> torch.Tensor:
    labels = torch.full((TOTAL,), -100)
    labels[positions] = torch.arange(len(positions)) + 3
    return labels


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_some_tokens_are_the_same_among_all(options: dict) -> None:
    model = FastformerModel(config(**options)).eval()
    chosen = Selection.of(packing(), torch.tensor([20, 3, 4]), torch.tensor([0, 9, 9, 10, 23]))
    every = model(**batch())
    some = model(**batch(), output_tokens=chosen)
    expected = every.last_hidden_state[[0, 3, 4, 9, 9, 10, 20, 23]]
    torch.testing.assert_close(some.last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.pooler_output, every.pooler_output, rtol=1e-5, atol=1e-6)


def test_the_last_block_computes_no_others() -> None:
    model = FastformerModel(config(), add_pooling_layer=False)
    rows = []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model(**batch(), output_tokens=Selection.of(packing(), torch.tensor([2, 11])))
    assert rows == [TOTAL, 2]


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_shows_all_tokens_still_does(asked: str) -> None:
    model = FastformerModel(config()).eval()
    every = model(**batch(), **{asked: True})
    some = model(**batch(), **{asked: True}, output_tokens=Selection.of(packing(), torch.tensor([0, 9, 10])))
    torch.testing.assert_close(some.last_hidden_state, every.last_hidden_state[[0, 9, 10]])
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(some.get(name), every.get(name))


@pytest.mark.parametrize("kind", [FastformerForPreTraining, FastformerForMaskedLM])
@pytest.mark.parametrize("positions", [[4, 5, 12], [0, 9, 23], list(range(TOTAL))], ids=["some", "firsts", "all"])
def test_pretraining_has_the_loss_and_gradients_of_all_tokens(kind: type, positions: list[int]) -> None:
    model = kind(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    inputs = {**batch(), "labels": labelled(positions)}
    if kind is FastformerForPreTraining:
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0, 1])
    losses = [model(**inputs, return_logits=logits).loss for logits in (False, True)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_classification_has_the_loss_and_gradients_of_all_tokens(pooling: str) -> None:
    plain = config(num_labels=3, pooling=pooling, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = FastformerForSequenceClassification(plain)
    labels = torch.tensor([0, 1, 2, 0, 1])
    losses = [model(**batch(), labels=labels, output_hidden_states=everything).loss for everything in (False, True)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_replaced_projection_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = FastformerModel(config(), add_pooling_layer=False).eval()
    attention = model.layers[-1].attention
    doubled = Doubled(16, 48)
    doubled.load_state_dict(attention.qkv.state_dict())
    attention.qkv = doubled
    some = model(**batch(), output_tokens=Selection.of(packing(), torch.tensor([2, 11]))).last_hidden_state
    torch.testing.assert_close(some, model(**batch()).last_hidden_state[[2, 11]], rtol=1e-5, atol=1e-6)


def test_dense_input_is_refused() -> None:
    chosen = Selection.of(packing(), torch.tensor([0]))
    with pytest.raises(ValueError, match="output_tokens is for packed input"):
        FastformerModel(config())(torch.ones(1, 3, dtype=torch.int64), output_tokens=chosen)
