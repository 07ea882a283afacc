"""With BERT's weights, Fastformer's models compute what Hugging Face's BERT does."""

from __future__ import annotations

import pytest
import torch
from devices import here
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from fastformer.models import (
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForSequenceClassification,
    FastformerModel,
    from_hugging_face,
)

BERT_CONFIG = {
    "vocab_size": 99,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "type_vocab_size": 3,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    # Large enough that attention is far from uniform and a lost weight shows.
    "initializer_range": 0.3,
}
LENGTHS = [17, 3, 11]
EXACT = {"rtol": 0.0, "atol": 1e-5}
PAIRS = [
    (BertModel, FastformerModel),
    (BertForPreTraining, FastformerForPreTraining),
    (BertForMaskedLM, FastformerForMaskedLM),
    (BertForSequenceClassification, FastformerForSequenceClassification),
]


def twins(bert_class: type, own_class: type, **options):
    """Return a random BERT, with random biases and norms too, and the Fastformer model with its weights.

    Both are in evaluation.
    """
    bert = bert_class(BertConfig(**{**BERT_CONFIG, **options}))
    for parameter in bert.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    own = from_hugging_face(bert)
    assert type(own) is own_class
    return bert.eval(), own


def dense_batch(padding_side: str = "right") -> dict[str, torch.Tensor]:
    sequence = max(LENGTHS)
    lengths = torch.tensor(LENGTHS).unsqueeze(1)
    columns = torch.arange(sequence)
    mask = columns < lengths if padding_side == "right" else columns >= sequence - lengths
    labels = torch.randint(0, 99, mask.shape).masked_fill((torch.rand(mask.shape) > 0.3) | ~mask, -100)
    labels[:, sequence // 2 : sequence // 2 + 1][mask[:, sequence // 2 : sequence // 2 + 1]] = 5
    return {
        "input_ids": torch.randint(1, 99, mask.shape).masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 3, mask.shape),
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1]),
    }


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if "label" not in name}


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "relu2", "gelu_new", "silu"])
def test_every_output_equals_berts(hidden_act: str) -> None:
    bert, own = twins(BertForPreTraining, FastformerForPreTraining, hidden_act=hidden_act)
    batch = without_labels(dense_batch())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = bert(**batch, output_hidden_states=True)
        actual = own(**batch, output_hidden_states=True)
    torch.testing.assert_close(actual.prediction_logits[real], expected.prediction_logits[real], **EXACT)
    torch.testing.assert_close(actual.seq_relationship_logits, expected.seq_relationship_logits, **EXACT)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **EXACT)
        assert torch.equal(ours[~real], torch.zeros_like(ours[~real]))
    assert actual.loss is None and actual.mlm_loss is None and actual.nsp_loss is None


def test_loss_and_every_gradient_equal_berts() -> None:
    bert, own = twins(BertForPreTraining, FastformerForPreTraining)
    batch = dense_batch()
    expected, actual = bert(**batch), own(**batch)
    torch.testing.assert_close(actual.loss, expected.loss, **EXACT)
    torch.testing.assert_close(actual.mlm_loss + actual.nsp_loss, actual.loss)
    expected.loss.backward()
    actual.loss.backward()
    # Gradients have the names of the parameters, so they are converted in the same way.
    for parameter in bert.parameters():
        parameter.data.copy_(parameter.grad)
    expected_gradients = dict(from_hugging_face(bert).named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name].data, **EXACT, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("bert_class", "own_class"), PAIRS)
def test_every_head_equals_berts(bert_class: type, own_class: type) -> None:
    bert, own = twins(bert_class, own_class)
    batch = without_labels(dense_batch())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = bert(**batch), own(**batch)
    assert list(actual) == list(expected)
    for name in expected:
        ours, theirs = actual[name], expected[name]
        if ours.dim() == 3:
            assert torch.equal(ours[~real], torch.zeros_like(ours[~real]))
            ours, theirs = ours[real], theirs[real]
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (3, torch.tensor([0, 2, 1])),
        (1, torch.tensor([0.5, -1.0, 2.0])),
        (3, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])),
    ],
)
def test_classification_losses_equal_berts(num_labels: int, labels: torch.Tensor) -> None:
    bert, own = twins(BertForSequenceClassification, FastformerForSequenceClassification, num_labels=num_labels)
    batch, labels = without_labels(dense_batch()), here(labels)
    torch.testing.assert_close(own(**batch, labels=labels).loss, bert(**batch, labels=labels).loss, **EXACT)
    assert own.config.problem_type == bert.config.problem_type


def test_left_padding_and_gaps_equal_berts() -> None:
    bert, own = twins(BertModel, FastformerModel)
    batch = without_labels(dense_batch("left"))
    batch["attention_mask"][0, 4:6] = 0
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(own(**batch).last_hidden_state[real], bert(**batch).last_hidden_state[real], **EXACT)


def test_defaults_equal_berts() -> None:
    bert, own = twins(BertModel, FastformerModel)
    input_ids = dense_batch()["input_ids"]
    with torch.no_grad():
        expected, actual = bert(input_ids), own(input_ids)
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **EXACT)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, **EXACT)
        assert [tuple(tensor.shape) for tensor in own(input_ids, return_dict=False)] == [(3, 17, 24), (3, 24)]
        positions = torch.arange(3, 20).unsqueeze(0)
        torch.testing.assert_close(
            own(input_ids, position_ids=positions).last_hidden_state,
            bert(input_ids, position_ids=positions).last_hidden_state,
            **EXACT,
        )
