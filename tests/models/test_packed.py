"""The packed path equals the dense one, contains no padding, and can be compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

import fastformer
from fastformer.models import (
    FastformerConfig,
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForSequenceClassification,
    FastformerModel,
)

LENGTHS = [9, 1, 14]


def config(**options) -> FastformerConfig:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FastformerConfig(
        **{**shape, "intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.3, **options}
    )


def packed_batch(lengths: list[int], next_sentence: bool = True) -> dict[str, torch.Tensor | int]:
    total = sum(lengths)
    masked = torch.arange(0, total, 3)
    labels = torch.full((total,), -100)
    labels[masked] = torch.randint(0, 50, masked.shape)
    batch: dict[str, torch.Tensor | int] = {
        "input_ids": torch.randint(1, 50, (total,)),
        "token_type_ids": torch.randint(0, 2, (total,)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
        "labels": labels,
        "masked_positions": masked,
    }
    if next_sentence:
        batch["next_sentence_label"] = torch.randint(0, 2, (len(lengths),))
    return batch


def as_dense(batch: dict[str, torch.Tensor | int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the same batch padded, and the mask of its real tokens."""
    lengths = batch["cu_seqlens"].diff()
    real = torch.arange(batch["max_seqlen"]) < lengths.unsqueeze(1)
    dense = {"attention_mask": real.long()}
    for name, padding in (("input_ids", 0), ("token_type_ids", 1), ("labels", -100)):
        dense[name] = torch.full(real.shape, padding)
        dense[name][real] = batch[name]
    if "next_sentence_label" in batch:
        dense["next_sentence_label"] = batch["next_sentence_label"]
    return dense, real


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.quick
def test_packed_equals_dense() -> None:
    model = FastformerForPreTraining(config()).eval()
    batch = packed_batch(LENGTHS)
    dense, real = as_dense(batch)
    flags = {"return_logits": True, "output_hidden_states": True}
    packed_output, dense_output = model(**batch, **flags), model(**dense, **flags)
    for name in ("loss", "mlm_loss", "nsp_loss", "seq_relationship_logits"):
        torch.testing.assert_close(packed_output[name], dense_output[name])
    for ours, padded in zip(
        (packed_output.prediction_logits, *packed_output.hidden_states),
        (dense_output.prediction_logits, *dense_output.hidden_states),
        strict=True,
    ):
        assert ours.shape[0] == sum(LENGTHS)
        torch.testing.assert_close(ours, padded[real])
    torch.testing.assert_close(gradients(model, packed_output.loss), gradients(model, dense_output.loss))


@pytest.mark.quick
def test_triton_kernels_give_the_same_loss_and_gradients() -> None:
    model = FastformerForPreTraining(config()).eval()
    batch = packed_batch(LENGTHS)
    expected = model(**batch).loss
    expected_gradients = gradients(model, expected)
    with fastformer.backend("triton"):
        actual = model(**batch).loss
        actual_gradients = gradients(model, actual)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_gradients, expected_gradients)


def test_what_may_be_left_out() -> None:
    model = FastformerForPreTraining(config()).eval()
    batch = packed_batch(LENGTHS)
    expected = model(**batch).loss
    for name in ("position_ids", "masked_positions"):
        torch.testing.assert_close(model(**{key: value for key, value in batch.items() if key != name}).loss, expected)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    expected = model(**batch).loss
    del batch["token_type_ids"]
    torch.testing.assert_close(model(**batch).loss, expected)


def test_sequences_do_not_see_each_other() -> None:
    model = FastformerModel(config()).eval()
    batch = {name: value for name, value in packed_batch(LENGTHS).items() if name in ("input_ids", "cu_seqlens")}
    together = model(**batch, max_seqlen=14)
    for index, (start, end) in enumerate([(0, 9), (9, 10), (10, 24)]):
        alone = model(batch["input_ids"][start:end].unsqueeze(0))
        torch.testing.assert_close(together.last_hidden_state[start:end], alone.last_hidden_state[0])
        torch.testing.assert_close(together.pooler_output[index], alone.pooler_output[0])


def test_an_empty_sequence_changes_nothing_for_the_others() -> None:
    model = FastformerModel(config()).eval()
    ids = torch.randint(1, 50, (7,))
    expected = model(ids, cu_seqlens=torch.tensor([0, 4, 7], dtype=torch.int32), max_seqlen=4)
    actual = model(ids, cu_seqlens=torch.tensor([0, 4, 4, 7, 7], dtype=torch.int32), max_seqlen=4)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(actual.pooler_output[[0, 2]], expected.pooler_output)
    nothing = torch.tanh(model.pooler.dense.bias)
    torch.testing.assert_close(actual.pooler_output[[1, 3]], nothing.expand(2, -1))


def test_logits_come_without_labels_or_when_asked_for() -> None:
    model = FastformerForMaskedLM(config()).eval()
    batch = packed_batch(LENGTHS, next_sentence=False)
    labels = {"labels": batch.pop("labels"), "masked_positions": batch.pop("masked_positions")}
    assert model(**batch).logits.shape == (24, 50) and model(**batch).loss is None
    assert model(**batch, return_logits=False).logits is None
    assert model(**batch, **labels).logits is None and model(**batch, **labels).loss is not None
    both = model(**batch, **labels, return_logits=True)
    expected = torch.nn.functional.cross_entropy(both.logits, labels["labels"])
    torch.testing.assert_close(both.loss, expected)


@pytest.mark.quick
def test_only_masked_tokens_reach_the_vocabulary() -> None:
    model = FastformerForPreTraining(config())
    rows = []
    model.mlm_head.dense.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    batch = packed_batch(LENGTHS)
    model(**batch)
    model(**as_dense(batch)[0])
    assert rows == [8, 8]


def test_padding_is_never_computed() -> None:
    model = FastformerModel(config())
    rows = []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    dense, _ = as_dense(packed_batch(LENGTHS))
    model(dense["input_ids"], attention_mask=dense["attention_mask"])
    assert rows == [24, 24]


def test_compiles_without_graph_break_for_any_length() -> None:
    model = FastformerForPreTraining(config(num_hidden_layers=1, hidden_dropout_prob=0.0)).train()
    torch._dynamo.reset()
    counters = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counters)
    first_compilation = 0
    for lengths in ([9, 2, 14], [5, 8], [3, 3, 3, 11], [7, 4, 2, 1, 6]):
        batch = packed_batch(lengths)
        actual, expected = compiled(**batch), model(**batch)
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(gradients(model, actual.loss), gradients(model, expected.loss))
        first_compilation = first_compilation or counters.frame_count
    assert counters.frame_count == first_compilation, "recompiled for another length"


def test_inductor_compiles_the_forward() -> None:
    model = FastformerForPreTraining(config(num_hidden_layers=1)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for lengths in ([9, 2, 14], [5, 8]):
            batch = packed_batch(lengths)
            torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_gpu() -> None:
    model = FastformerForPreTraining(config(attention_probs_dropout_prob=0.1)).cuda().train()
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in packed_batch(LENGTHS).items()
    }
    del batch["position_ids"]
    model(**batch).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = FastformerForPreTraining(config(attention_probs_dropout_prob=0.2)).train()
    batch = packed_batch(LENGTHS)
    torch.manual_seed(0)
    expected = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    model(**batch).loss.backward()
    assert len(calls) == 2, "the block was not recomputed"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_dropout_only_in_training() -> None:
    model = FastformerModel(config(attention_probs_dropout_prob=0.1))
    ids = torch.randint(1, 50, (2, 8))
    assert torch.equal(model.eval()(ids).pooler_output, model(ids).pooler_output)
    model.train()
    assert not torch.equal(model(ids).pooler_output, model(ids).pooler_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    model = FastformerForPreTraining(config()).eval()
    batch = packed_batch(LENGTHS)
    expected = model(**batch).loss
    half = copy.deepcopy(model).to(dtype)(**batch).loss
    with torch.autocast(device.type, dtype=dtype):
        autocast = model(**batch).loss
    gradients(model, autocast)
    assert half.dtype == autocast.dtype == torch.float32
    # Two layers round about ten times on the way to logits of magnitude ten; the loss averages over the logits.
    tolerance = 10 * 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.stack([half, autocast]), expected.expand(2), rtol=0, atol=tolerance)


def test_a_replaced_decoder_is_called() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = FastformerForMaskedLM(config()).eval()
    parametrize.register_parametrization(model.mlm_head.decoder, "weight", Scaled())
    batch = packed_batch(LENGTHS, next_sentence=False)
    output = model(**batch, return_logits=True)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, batch["labels"]))


@pytest.mark.cpu
def test_refuses_what_it_cannot_do() -> None:
    model = FastformerForPreTraining(config())
    batch = packed_batch(LENGTHS)
    dense, _ = as_dense(batch)

    def refused(error: type[Exception], message: str, **changes) -> None:
        arguments = {name: value for name, value in {**batch, **changes}.items() if value is not None}
        with pytest.raises(error, match=message):
            model(**arguments)

    int32 = torch.int32
    refused(TypeError, "input_ids must be int64 or int32; got torch.float32", input_ids=torch.ones(24))
    refused(ValueError, "input_ids must hold at least one token", input_ids=torch.ones(0, dtype=int32))
    refused(ValueError, r"input_ids must be \(batch, sequence\), or .* cu_seqlens", cu_seqlens=None, max_seqlen=None)
    refused(ValueError, "max_seqlen is for packed input", input_ids=dense["input_ids"], cu_seqlens=None)
    refused(ValueError, r"input_ids must be \(total_tokens,\)", input_ids=dense["input_ids"])
    refused(ValueError, "attention_mask is for dense input", attention_mask=dense["attention_mask"])
    refused(ValueError, "max_seqlen is needed with cu_seqlens", max_seqlen=None)
    refused(ValueError, "max_seqlen is 13, but a sequence has 14 tokens", max_seqlen=13)
    refused(ValueError, "cu_seqlens must be .* int32", cu_seqlens=batch["cu_seqlens"].long())
    refused(ValueError, "from 0 to the number of tokens, 24; got 0 to 10", cu_seqlens=batch["cu_seqlens"][:-1])
    falling = torch.tensor([0, 10, 9, 24], dtype=int32)
    refused(ValueError, "falling on the way", cu_seqlens=falling)
    for name in ("token_type_ids", "position_ids", "labels"):
        refused(ValueError, rf"{name} must have the tokens' shape, \(24,\); got \(23,\)", **{name: batch[name][1:]})
    refused(ValueError, r"masked_positions must be \(masked_tokens,\) int64", masked_positions=torch.ones(3))
    refused(ValueError, "masked_positions needs labels and packed input", labels=None)
    beyond = batch["masked_positions"] + 3
    refused(IndexError, "masked_positions must be from 0 to 23; got 3 to 24", masked_positions=beyond)
    refused(IndexError, "50", labels=torch.full((24,), 50))
    refused(ValueError, "batch", next_sentence_label=torch.zeros(2, dtype=torch.int64))
    refused(IndexError, "input_ids must be from 0 to 49; got -?[0-9]+ to 50", input_ids=batch["input_ids"].clamp(50))
    refused(IndexError, "token_type_ids must be from 0 to 1; got", token_type_ids=batch["token_type_ids"] + 1)
    refused(IndexError, "position_ids must be from 0 to 19; got", position_ids=batch["position_ids"] + 7)
    refused(ValueError, "output_attentions must be True, False or None", output_attentions="yes")
    refused(ValueError, "output_hidden_states must be True, False or None", output_hidden_states=[1])
    with pytest.raises(ValueError, match="attention_mask marks every token as padding"):
        model(dense["input_ids"], attention_mask=torch.zeros(3, 14))
    with pytest.raises(ValueError, match=r"position_ids must have shape \(3, 14\) or \(1, 14\); got \(14,\)"):
        model(dense["input_ids"], position_ids=torch.arange(14))
    with pytest.raises(ValueError, match="21 tokens, more than the model's max_position_embeddings, 20"):
        model(torch.ones(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match="masked_positions needs labels and packed input"):
        model(dense["input_ids"], labels=dense["labels"], masked_positions=torch.ones(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="encoder_states"):
        FastformerForSequenceClassification(config())(dense["input_ids"], encoder_states=torch.ones(1, 2, 16))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given; got both"):
        model(dense["input_ids"], inputs_embeds=torch.ones(3, 14, 16))
