"""Greedy tokens are those of Hugging Face's `generate` on the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastformer.generation import Generator, SamplingParameters
from fastformer.models.conversion import from_hugging_face

PROMPTS = [[5, 6, 7], [4], [9, 8, 7, 6, 5, 4, 13, 12, 11, 12, 13, 14], [11, 12], [20, 21, 22, 23, 24]]
NEW = 12
VOCABULARY, HIDDEN, INTERMEDIATE, POSITIONS, PAD = 97, 32, 48, 32, 0
# The initializer range is far above the usual one: a model that repeats one token would prove little.
WIDE = 0.3
GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": WIDE,
    "bos_token_id": None,
    "eos_token_id": None,
}
BOTH = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "init_std": WIDE,
    "pad_token_id": PAD,
    "decoder_start_token_id": 2,
    "eos_token_id": None,
    "forced_eos_token_id": None,
}


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=WIDE, bos_token_id=None, eos_token_id=None))


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": INTERMEDIATE, "num_layers": 2}
    tokens = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": None}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, num_heads=4, initializer_factor=3.0))


def marian() -> PreTrainedModel:
    """Return a Marian model with larger blocks and smaller embeddings than the BART here.

    With BART's sizes, its tied embeddings would repeat one token.
    """
    model = MarianMTModel(MarianConfig(**BOTH | {"init_std": 0.02}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4.0 if "layers" in name and weight.dim() == 2 else 1.0)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": gpt2,
    "llama, grouped heads": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen 3, norms of queries and keys": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "mistral, a window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)),
    "t5, relative positions": t5,
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BOTH)),
    "marian, sinusoidal positions": marian,
}


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel, list[list[int]]]:
    """Return Hugging Face's model, ours, and the tokens that Hugging Face's generates.

    Prompts are padded on the left, sources on the right.
    """
    torch.manual_seed(0)
    theirs = MODELS[request.param]().eval()
    both = theirs.config.is_encoder_decoder
    theirs.generation_config.forced_bos_token_id = None
    width = max(map(len, PROMPTS))
    padding = [[PAD] * (width - len(prompt)) for prompt in PROMPTS]
    real = [[1] * len(prompt) for prompt in PROMPTS]
    ids, mask = (
        torch.tensor([each + pad if both else pad + each for each, pad in zip(rows, padding, strict=True)])
        for rows in (PROMPTS, real)
    )
    tokens = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=1, pad_token_id=PAD, eos_token_id=None
    )
    ours = from_hugging_face(theirs)
    return theirs, ours, tokens[:, 1 if both else width :].tolist()


@pytest.mark.parametrize(
    "cache", [{}, {"slots": 2}, {"slots": 3, "page_size": 5}, {"page_size": 4, "pages": 8}, {"pack_weights": False}]
)
def test_the_same_tokens(models: tuple, cache: dict) -> None:
    _, ours, expected = models
    if "page_size" in cache and ours.config.position_embedding == "relative":
        with pytest.raises(ValueError, match="page_size must be None with relative positions"):
            Generator(ours, **cache)
        return
    generated = Generator(ours, **cache).generate(PROMPTS, SamplingParameters(max_new_tokens=NEW))
    assert [each.tokens for each in generated] == expected
    assert len({token for tokens in expected for token in tokens}) > len(PROMPTS)  # the model does not repeat one token


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_the_same_tokens_with_a_draft_model(models: tuple, draft_tokens: int) -> None:
    """The tokens do not depend on the draft model: one draft model knows nothing, the other is the model itself."""
    _, ours, expected = models
    other = type(ours)(ours.config).eval()
    accepted = []
    for draft in (other, ours):
        generator = Generator(ours, slots=2, draft=draft, draft_tokens=draft_tokens)
        generated = generator.generate(PROMPTS, SamplingParameters(max_new_tokens=NEW))
        assert [each.tokens for each in generated] == expected
        accepted.append(generator.statistics.accepted / generator.statistics.drafted)
    assert accepted[0] < accepted[1] == 1.0


def test_the_same_tokens_with_a_repetition_penalty(models: tuple) -> None:
    theirs, ours, plain = models
    parameters = SamplingParameters(max_new_tokens=NEW, repetition_penalty=1.5)
    expected = [
        theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.5,
            eos_token_id=None,
            pad_token_id=PAD,
        )[0, -NEW:].tolist()
        for prompt in PROMPTS
    ]
    for draft in (None, ours):
        generated = Generator(ours, slots=3, draft=draft).generate(PROMPTS, parameters)
        assert [each.tokens for each in generated] == expected
    assert expected != plain


def test_log_probabilities_are_the_model_s(models: tuple) -> None:
    theirs, ours, _ = models
    parameters = SamplingParameters(max_new_tokens=4, logprobs=True, repetition_penalty=1.3)
    for prompt, got in zip(PROMPTS, Generator(ours).generate(PROMPTS, parameters), strict=True):
        assert got.logprobs is not None
        if ours.config.is_encoder_decoder:
            decoder_input = torch.tensor([[ours.config.decoder_start_token_id, *got.tokens[:-1]]])
            logits = theirs(torch.tensor([prompt]), decoder_input_ids=decoder_input).logits[0]
        else:
            logits = theirs(torch.tensor([prompt + got.tokens[:-1]])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1)[range(4), got.tokens]
        torch.testing.assert_close(torch.tensor(got.logprobs), expected, rtol=1e-4, atol=1e-4)
