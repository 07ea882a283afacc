"""With output_attentions, the fused attention returns the weights of Hugging Face's models, in every layout."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from einops import rearrange
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fastformer.models import (
    FastformerConfig,
    FastformerForEmbedding,
    FastformerForImageClassification,
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForQuestionAnswering,
    FastformerForSeq2SeqLM,
    FastformerForTokenClassification,
    FastformerModel,
    from_hugging_face,
)

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
LENGTHS = [9, 3, 13]


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    columns, lengths = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    mask = columns < lengths if side == "right" else columns >= max(LENGTHS) - lengths
    if side == "gaps":
        mask = torch.rand(mask.shape) < 0.6
    return {"input_ids": torch.randint(1, 50, mask.shape).masked_fill(~mask, 0), "attention_mask": mask.long()}


def assert_equal_at_real_rows(
    actual: tuple[torch.Tensor, ...], theirs: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> None:
    """Check that the weights are as accurate as those of Hugging Face's model, and zero for padding.

    A weight is exp(score - log-sum-exp). The exponents are below 16, and their rounding is the weight's relative error.
    """
    pytorch = theirs(**batch, output_attentions=True).attentions
    exact = theirs.double()(**batch, output_attentions=True).attentions
    theirs.float()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()[:, None, :, None]
    assert len(actual) == len(exact) == 3
    for number, (ours, their, wanted) in enumerate(zip(actual, pytorch, exact, strict=True)):
        assert not ours.masked_select(~real).any()
        assert_as_accurate(f"layer {number}", ours, their * real, wanted * real, scale=16.0)


@pytest.mark.parametrize("side", ["right", "left", "gaps"])
def test_equal_to_berts(side: str) -> None:
    bert = BertForSequenceClassification(BertConfig(**SHAPE, attn_implementation="eager")).eval()
    own = from_hugging_face(bert).eval()
    batch = padded_batch(side)
    actual = own(**batch, output_attentions=True).attentions
    assert_equal_at_real_rows(actual, bert, batch)
    own.config.output_attentions = True
    assert torch.equal(own(**batch).attentions[1], actual[1])
    assert own(**batch, output_attentions=False).attentions is None


def test_equal_to_gpt2s_and_while_generating() -> None:
    shape = {"n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 32, "initializer_range": 0.3}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(**shape, bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    ).eval()
    own = from_hugging_face(gpt2).eval()
    ids = torch.randint(1, 50, (2, 11))
    expected, actual = gpt2(ids, output_attentions=True), own(ids, output_attentions=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    assert_equal_at_real_rows(actual.attentions, gpt2, {"input_ids": ids})
    generated = own.generate(
        ids, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True, pad_token_id=0
    )
    whole = own(generated.sequences, output_attentions=True).attentions
    assert generated.attentions[1][2].shape == (2, 4, 1, 12)
    torch.testing.assert_close(generated.attentions[1][2], whole[2][:, :, 11:12, :12], rtol=0, atol=2e-6)


def test_packed_sequences_have_the_weights_of_dense_ones() -> None:
    model = FastformerModel(FastformerConfig(**SHAPE)).eval()
    batch = padded_batch("right")
    dense = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    packed = model(batch["input_ids"][real], cu_seqlens=boundaries, max_seqlen=13, output_attentions=True).attentions
    for ours, padded in zip(packed, dense, strict=True):
        torch.testing.assert_close(ours, padded, rtol=0, atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_decoder(packed: bool) -> None:
    config = FastformerConfig(**SHAPE, stack="encoder_decoder", type_vocab_size=0, position_embedding="relative")
    model = FastformerForSeq2SeqLM(config).eval()
    source, target = padded_batch("gaps"), torch.randint(1, 50, (3, 7))
    real = source["attention_mask"].bool()
    seen: dict[str, torch.Tensor] = {}
    block = model.model.decoder.layers[1].cross_attention
    block.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    if packed:
        lengths = real.sum(1)
        boundaries = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        output = model(
            source["input_ids"][real],
            cu_seqlens=boundaries,
            max_seqlen=int(lengths.max()),
            decoder_input_ids=target.flatten(),
            decoder_cu_seqlens=torch.arange(0, 22, 7, dtype=torch.int32),
            decoder_max_seqlen=7,
            output_attentions=True,
        )
    else:
        output = model(**source, decoder_input_ids=target, output_attentions=True)
        rows = output.encoder_attentions[2].sum(-1)
        torch.testing.assert_close(rows, real[:, None].expand(rows.shape).float())
    rows = output.decoder_attentions[2].sum(-1)
    torch.testing.assert_close(rows, torch.ones(3, 4, 7))
    assert output.decoder_attentions[0].triu(1).count_nonzero() == 0
    # The same weights follow from the definition: scores of the block's own projections, for each source alone.
    heads = rearrange(
        block.query(seen["hidden"]), "(batch tokens) (heads dim) -> batch heads tokens dim", batch=3, heads=4
    )
    encoded = output.encoder_last_hidden_state if packed else output.encoder_last_hidden_state[real]
    start = 0
    for index, count in enumerate(real.sum(1).tolist()):
        keys = block.key_value(encoded[start : start + count])[:, :24]
        keys = rearrange(keys, "tokens (heads dim) -> heads tokens dim", heads=4)
        expected = (heads[index] @ keys.mT / 6**0.5).softmax(-1)
        columns = slice(0, count) if packed else real[index]
        torch.testing.assert_close(output.cross_attentions[1][index][:, :, columns], expected, rtol=0, atol=2e-6)
        start += count


@pytest.mark.parametrize(
    "head",
    [
        FastformerForEmbedding,
        FastformerForMaskedLM,
        FastformerForPreTraining,
        FastformerForQuestionAnswering,
        FastformerForTokenClassification,
    ],
)
def test_every_head_returns_them(head: type) -> None:
    model, batch = head(FastformerConfig(**SHAPE)).eval(), padded_batch("left")
    attentions = model(**batch, output_attentions=True).attentions
    expected = model.model(**batch, output_attentions=True).attentions
    assert len(attentions) == 3
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(attentions, expected, strict=True))


def test_images() -> None:
    config = FastformerConfig(**SHAPE, image_size=8, patch_size=4, num_channels=3, type_vocab_size=0)
    output = FastformerForImageClassification(config).eval()(torch.randn(2, 3, 8, 8), output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 4, 5, 5)] * 3
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(2, 4, 5))


def test_training_keeps_its_dropout_and_gradients() -> None:
    model = FastformerForMaskedLM(FastformerConfig(**SHAPE, attention_probs_dropout_prob=0.3)).train()
    batch = {**padded_batch("right"), "labels": torch.randint(0, 50, (3, 13))}
    torch.manual_seed(0)
    expected = model(**batch)
    torch.manual_seed(0)
    actual = model(**batch, output_attentions=True)
    assert torch.equal(actual.loss, expected.loss)
    actual.loss.backward()
    # Before dropout each row sums to one.
    rows = actual.attentions[0].sum(-1)
    torch.testing.assert_close(rows, batch["attention_mask"][:, None].expand(rows.shape).float())
