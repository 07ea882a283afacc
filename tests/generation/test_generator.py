"""Tests of requests, their batches and their results, with a small model of random weights."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.generation import Generation, Generator, SamplingParameters
from fastformer.generation.cache import CacheShape, ContiguousCache, PagedCache
from fastformer.generation.requests import Piece
from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForMaskedLM, FastformerForSeq2SeqLM

SMALL = {
    "stack": "decoder",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "norm_placement": "pre",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "pad_token_id": None,
    "initializer_range": 0.4,
    "vocab_size": 300,
}
SHORT = SamplingParameters(max_new_tokens=8)
PROMPTS = ["the cat", "a", "on the mat the dog sat", "dogs", "the", "mat mat mat"]


def causal_lm(**options) -> FastformerForCausalLM:
    torch.manual_seed(0)
    return FastformerForCausalLM(FastformerConfig(**{**SMALL, **options})).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat and the dog ran to a cat", "dogs and cats"] * 3, 300)


@pytest.fixture(scope="module")
def model() -> FastformerForCausalLM:
    return causal_lm()


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding": "alibi"},
        {"position_embedding": "alibi", "num_key_value_heads": 1, "sliding_window": 4},
        {"position_embedding": "sinusoidal", "norm_placement": "post", "embedding_norm": True},
        {"position_embedding": "rotary", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
        {"position_embedding": "relative", "norm": "rms", "attention_scale": 1.0},
        {"position_embedding": "none", "type_vocab_size": 2, "tie_word_embeddings": False, "lm_head_bias": True},
        {"hidden_act": "silu", "gated": True, "head_dim": 5, "logit_scale": 0.5, "embedding_scale": 2.0},
    ],
)
def test_tokens_of_other_architectures(options: dict) -> None:
    """The greedy tokens are those of the same model's forward without any cache."""
    model, new = causal_lm(**options), 10
    prompts = [[5, 6, 7, 8, 9, 10], [4], [200, 100]]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    for cache in ({}, {"slots": 2, "page_size": 3}, {"draft": causal_lm(**options | {"initializer_range": 0.3})}):
        if "page_size" in cache and options.get("position_embedding") == "relative":
            continue
        generated = Generator(model, **cache).generate(prompts, SamplingParameters(max_new_tokens=new))
        assert [generation.tokens for generation in generated] == expected


@pytest.mark.quick
def test_a_draw_depends_on_its_seed_alone(model: FastformerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The drawn tokens do not depend on the rest of the batch, on slots, on pages or on a neighbour's filters."""
    each = [
        SamplingParameters(temperature=1.0, seed=3, max_new_tokens=9),
        SamplingParameters(temperature=0.7, seed=4, max_new_tokens=14, top_p=0.8),
        SamplingParameters(max_new_tokens=5),
        SamplingParameters(temperature=1.5, seed=3, max_new_tokens=3, top_k=20, repetition_penalty=1.2),
        SamplingParameters(temperature=1.0, seed=2**62, max_new_tokens=11, min_p=0.05),
        SamplingParameters(temperature=1.0, seed=3, max_new_tokens=9),
    ]
    alone = [Generator(model, tokenizer).generate([prompt], one)[0] for prompt, one in zip(PROMPTS, each, strict=True)]
    for options in ({}, {"slots": 2}, {"slots": 3, "page_size": 3}, {"page_size": 4, "pages": 12}):
        assert Generator(model, tokenizer, **options).generate(PROMPTS, each) == alone
    generator = Generator(model, tokenizer)
    other = generator.generate(PROMPTS[:1], SamplingParameters(temperature=1.0, seed=4, max_new_tokens=9))
    assert other[0].tokens != alone[0].tokens
    unseeded = SamplingParameters(temperature=1.0, max_new_tokens=9)
    first, second, third = generator.generate(PROMPTS[:1] * 3, unseeded)
    assert len({tuple(each.tokens) for each in (first, second, third)}) == 3


def test_speculative_draws_repeat_and_ignore_the_batch(
    model: FastformerForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    draft = causal_lm(num_hidden_layers=1)
    one = SamplingParameters(temperature=0.9, top_k=30, seed=5, max_new_tokens=13)
    alone = [Generator(model, tokenizer, draft=draft).generate([prompt], one)[0] for prompt in PROMPTS]
    for options in ({"slots": 4}, {"slots": 2, "page_size": 5}):
        generator = Generator(model, tokenizer, draft=draft, **options)
        assert generator.generate(PROMPTS, one) == alone
    assert generator.statistics.new_tokens == 13 * len(PROMPTS)
    assert 0 < generator.statistics.accepted < generator.statistics.drafted


def test_streamed_pieces_make_the_generations(model: FastformerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = Generator(model, tokenizer, slots=2)
    each = [SamplingParameters(max_new_tokens=count, logprobs=count > 4) for count in (7, 1, 3, 12, 5, 2)]
    streamed = [Generation(text="") for _ in PROMPTS]
    order = []
    for piece in generator.stream(PROMPTS, each):
        assert len(piece.tokens) == 1
        streamed[piece.request].add(piece)
        order.append(piece.request)
    assert streamed == generator.generate(PROMPTS, each)
    assert [len(generation.tokens) for generation in streamed] == [7, 1, 3, 12, 5, 2]
    assert all(generation.finish_reason == "length" for generation in streamed)
    # Two run at a time, and the next starts as soon as one is finished: request 1, of a single token, is finished at
    # once.
    assert order[:2] == [0, 1] and order[2] == 2
    starts = {request: order.index(request) for request in range(len(PROMPTS))}
    assert sorted(starts, key=starts.__getitem__) == list(range(len(PROMPTS)))
    for generation, prompt in zip(streamed, PROMPTS, strict=True):
        tokens = tokenizer(prompt)["input_ids"] + generation.tokens
        assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt + generation.text


@pytest.mark.quick
def test_ends(model: FastformerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = Generator(model, tokenizer, draft=model)
    plain = generator.generate(PROMPTS[:1], SamplingParameters(max_new_tokens=12))[0]
    assert plain.text is not None
    end = plain.tokens[5]
    first = plain.tokens.index(end)
    got = generator.generate(PROMPTS[:1], SamplingParameters(max_new_tokens=12, eos_token_ids=[end]))[0]
    assert (got.tokens, got.finish_reason) == (plain.tokens[: first + 1], "eos")
    stop = plain.text[4:7]
    got = generator.generate(PROMPTS[:1], SamplingParameters(max_new_tokens=12, stop=["not there", stop]))[0]
    assert (got.text, got.finish_reason) == (plain.text[: plain.text.index(stop)], "stop")
    assert got.tokens == plain.tokens[: len(got.tokens)] and len(got.tokens) < 12


@pytest.mark.parametrize("given", [7, [4, 7]])
def test_the_model_s_own_end_tokens(given: int | list[int]) -> None:
    model = causal_lm(eos_token_id=given, vocab_size=8)
    sampled = SamplingParameters(temperature=3.0, seed=0, max_new_tokens=40)
    ends = [given] if isinstance(given, int) else given
    for generation in Generator(model).generate([[1], [2, 3]], sampled):
        assert generation.finish_reason == "eos" and generation.text is None
        assert generation.tokens[-1] in ends and not set(generation.tokens[:-1]) & set(ends)


@pytest.mark.cpu
@pytest.mark.parametrize("slots", [1, 4])
def test_packed_weights_follow_the_model(slots: int) -> None:
    model = causal_lm()
    generator, prompts = Generator(model, slots=slots, pack_weights=True), [[1, 2, 3], [4, 5]]
    before = generator.generate(prompts, SHORT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    after = generator.generate(prompts, SHORT)
    assert after == Generator(model, pack_weights=False).generate(prompts, SHORT) != before


def test_sampling_follows_the_model_s_distribution() -> None:
    """Tokens that are drawn in batches, with 4,000 seeds, have the model's distribution."""
    model = causal_lm(vocab_size=5)
    expected = model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    each = [SamplingParameters(temperature=1.0, seed=seed, max_new_tokens=1) for seed in range(4000)]
    generated = Generator(model, slots=500).generate([[1, 2]] * 4000, each)
    counts = torch.tensor([generation.tokens[0] for generation in generated]).bincount(minlength=5)
    # The tolerance is five standard deviations of a share of 4,000 draws. The seeds never change.
    torch.testing.assert_close(counts / 4000, expected.detach(), rtol=0, atol=5 * 0.5 / 4000**0.5)


def test_sequences_may_reach_the_last_position() -> None:
    model = causal_lm(max_position_embeddings=8, position_embedding="rotary")
    prompts = [[1, 2, 3], [1]]
    for options in ({}, {"draft": model, "draft_tokens": 3}, {"page_size": 3}):
        each = [SamplingParameters(max_new_tokens=count) for count in (6, 8)]
        assert [len(generation.tokens) for generation in Generator(model, **options).generate(prompts, each)] == [6, 8]
        with pytest.raises(ValueError, match=r"prompt 1 has 1 tokens and may get 9.*max_position_embeddings, 8"):
            Generator(model, **options).generate(prompts, [each[0], SamplingParameters(max_new_tokens=9)])


def test_what_can_never_fit_is_refused_before_anything_runs(model: FastformerForCausalLM) -> None:
    for options, limit in (({"capacity": 10}, "capacity, 10"), ({"page_size": 3, "pages": 3}, "all pages, 9")):
        generator = Generator(model, **options)
        with pytest.raises(ValueError, match=f"prompt 2 has 4 tokens and may get 8, more together than {limit}"):
            generator.stream([[1], [2], [1, 2, 3, 4]], SamplingParameters(max_new_tokens=8))


def test_prompts_are_checked(model: FastformerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = Generator(model)
    for prompts, error, message in (
        ("text", TypeError, "prompts must be a sequence of prompts; got a single string"),
        (["text"], TypeError, "prompt 0 is a string, which needs a tokenizer"),
        ([[1], []], ValueError, "prompt 1 has no tokens"),
        ([[1, 300]], ValueError, r"prompt 0 must have tokens in \[0, vocab_size = 300\)"),
    ):
        with pytest.raises(error, match=message):
            generator.generate(prompts, SHORT)
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        generator.generate([[1]], SamplingParameters(stop=["."]))
    with pytest.raises(ValueError, match="parameters must be one for all prompts or 2; got 1"):
        generator.generate([[1], [2]], [SamplingParameters()])
    assert generator.generate([]) == []


def test_models_are_checked(model: FastformerForCausalLM) -> None:
    config = FastformerConfig(**{**SMALL, "stack": "encoder"})
    with pytest.raises(TypeError, match="model must be a FastformerForCausalLM or FastformerForSeq2SeqLM"):
        Generator(FastformerForMaskedLM(config))
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        Generator(causal_lm().train())
    with pytest.raises(ValueError, match="draft must have the model's vocab_size, 300; got 200"):
        Generator(model, draft=causal_lm(vocab_size=200))
    with pytest.raises(ValueError, match="draft must have the model's stack, 'decoder'; got 'encoder_decoder'"):
        Generator(model, draft=FastformerForSeq2SeqLM(FastformerConfig(**{**SMALL, "stack": "encoder_decoder"})).eval())
    with pytest.raises(ValueError, match="pages is for a paged cache"):
        Generator(model, pages=3)
    with pytest.raises(ValueError, match="slots must be 1 or more; got 0"):
        Generator(model, slots=0)
    with pytest.raises(ValueError, match="pack_weights is for models whose parameters are all float32"):
        Generator(causal_lm().bfloat16(), pack_weights=True)
    other = causal_lm()
    other.generation_config.forced_bos_token_id = 0
    other.generation_config.no_repeat_ngram_size = 3
    with pytest.warns(UserWarning, match="sets forced_bos_token_id, no_repeat_ngram_size, which has no effect here"):
        Generator(other)


def test_bfloat16() -> None:
    model = causal_lm(position_embedding="rotary").bfloat16()
    got = Generator(model, page_size=4).generate([[1, 2, 3], [4]], SamplingParameters(max_new_tokens=6))
    assert [len(generation.tokens) for generation in got] == [6, 6]


STREAMS = {
    "contiguous": {},
    "pages": {"page_size": 4},
    "few pages": {"page_size": 4, "pages": 8},
    "draft": {"draft_tokens": 3},
    "unpacked": {"pack_weights": False},
}


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS)
def test_streams_run_side_by_side(model: FastformerForCausalLM, options: dict) -> None:
    """Each stream gives what it gives alone, no matter when the others start, end or are abandoned."""
    drafts = {"draft": causal_lm(position_embedding="rotary")} if "draft_tokens" in options else {}
    generator = Generator(model, slots=2, **options, **drafts)
    parameters = SamplingParameters(max_new_tokens=9, temperature=1.0, seed=3)
    prompts = [[[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10, 11, 12], [3]], [[20, 21]]]
    expected = [list(generator.stream(each, parameters)) for each in prompts]

    found: list[list[Piece]] = [[], [], []]
    streams = [generator.stream(each, parameters) for each in prompts[:2]]
    for _ in range(4):
        for pieces, stream in zip(found, streams, strict=False):
            pieces.append(next(stream))
    left = generator.stream(prompts[0], parameters)
    next(left)
    found[2] = list(generator.stream(prompts[2], parameters))
    assert next(left) == expected[0][1]
    del left
    for pieces, stream in zip(found, streams, strict=False):
        pieces += stream
    assert found == expected
    assert len(generator._unused) == 1


def test_streams_of_several_threads(model: FastformerForCausalLM) -> None:
    generator = Generator(model, page_size=4)
    prompts = [[[number, 2, 3]] * 3 for number in range(6)]
    expected = [generator.generate(each, SHORT) for each in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda each: generator.generate(each, SHORT), prompts)) == expected


def test_a_decoding_step_waits_for_nothing_but_its_tokens(model: FastformerForCausalLM) -> None:
    """Layers, sampling and bookkeeping run on meta tensors, on which every read of a value on the host fails."""
    from fastformer.generation.cached_model import CachedModel
    from fastformer.generation.sampling import choose
    from fastformer.generation.slots import Slots

    meta = causal_lm(position_embedding="rotary", sliding_window=7).to("meta")
    cached = CachedModel(meta, 4, 20, page_size=4, pages=20)
    slots, rows = Slots(4, 21, 9, 300, True, torch.device("meta")), slice(0, 3)
    each = [SamplingParameters(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=2.0)] * 3
    with torch.inference_mode():
        logits = cached.decode(slots.last(rows, 1), slots.lengths[rows])[:, 0]
        tokens = choose(logits, slots.settings(rows, each), slots.seen[rows], slots.draws(rows, 1)[:, 0, 0])
        slots.append(rows, tokens[:, None])
        cached.decode(tokens[:, None].expand(3, 5), slots.lengths[rows], slots.lengths[rows] + 1)
    assert logits.shape == (3, 300)


def test_pages_come_back(device: torch.device) -> None:
    shape = CacheShape(1, 1, 2, torch.float32, device)
    cache = PagedCache(shape, slots=3, capacity=12, page_size=4, pages=5)
    assert cache.capacity == 12 and not cache.has_room(13)
    cache.reserve(0, 9)
    assert cache.has_room(8) and not cache.has_room(9)
    cache.reserve(1, 5)
    assert not cache.has_room(1)
    tables = [cache.layer(0, 2).block_table[slot].tolist() for slot in (0, 1)]
    assert len({*tables[0], *tables[1][:2]}) == 5
    cache.release(0)
    cache.move(1, 0, 5)
    assert cache.layer(0, 1).block_table[0].tolist() == tables[1]
    assert cache.has_room(12)
    cache.clear()
    for slot in range(2):
        cache.reserve(slot, 8)
    assert cache.has_room(4) and not cache.has_room(5)


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_keeps_what_is_written(paged: bool, device: torch.device) -> None:
    shape = CacheShape(2, 3, 4, torch.float32, device)
    cache = PagedCache(shape, 2, 7, page_size=2, pages=8) if paged else ContiguousCache(shape, 2, 7)
    for slot in range(2):
        cache.reserve(slot, 7)
    slots, positions = (torch.tensor(each) for each in zip(*itertools.product(range(2), range(7)), strict=True))
    written = torch.randn(2, 14, 3, 4)
    cache.write(1, cache.places(slots, positions), *written)
    cache.release(0)
    cache.move(1, 0, 7)
    keys, values, table = cache.layer(1, 1)
    for kept, new in zip((keys, values), written, strict=True):
        kept = kept[0].transpose(0, 1) if table is None else kept[table[0]].flatten(0, 1)[:7]
        assert torch.equal(kept, new[7:])
