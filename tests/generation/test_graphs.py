"""Decoding steps that are recorded as CUDA graphs, here on a CPU, give the tokens of steps that are not recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded_graphs import FakeRecorder, nothing_on_the_host

import fastformer
from fastformer import cuda_graphs
from fastformer.generation import Generator, SamplingParameters, generator, workspace
from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForSeq2SeqLM

pytestmark = pytest.mark.cpu

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "type_vocab_size": 0,
    "pad_token_id": None,
    "initializer_range": 0.4,
    "vocab_size": 90,
}
PROMPTS = [[5, 6, 7], [4], [9, 8, 7, 6, 5, 4, 13, 12, 11, 12, 13, 14], [11, 12], [20, 21, 22, 23, 24], [3], [1, 2]]
GREEDY = [SamplingParameters(max_new_tokens=count) for count in (9, 2, 14, 1, 7, 12, 5)]
MIXED = [
    SamplingParameters(temperature=1.0, seed=3, max_new_tokens=9),
    SamplingParameters(temperature=0.7, seed=4, max_new_tokens=14, top_p=0.8, logprobs=True),
    SamplingParameters(max_new_tokens=5),
    SamplingParameters(temperature=1.5, seed=3, max_new_tokens=3, top_k=20, repetition_penalty=1.2),
    SamplingParameters(temperature=1.0, seed=2**62, max_new_tokens=11, min_p=0.05),
    SamplingParameters(max_new_tokens=10, repetition_penalty=1.3, logprobs=True),
    SamplingParameters(temperature=1.0, seed=8, max_new_tokens=6, top_k=7),
]


def causal_lm(**options: Any) -> FastformerForCausalLM:
    torch.manual_seed(0)
    return FastformerForCausalLM(FastformerConfig(**{**SIZES, "stack": "decoder", **options})).eval()


def sequence_to_sequence() -> FastformerForSeq2SeqLM:
    torch.manual_seed(0)
    config = FastformerConfig(**SIZES, stack="encoder_decoder", decoder_start_token_id=1, position_embedding="relative")
    return FastformerForSeq2SeqLM(config).eval()


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """Return the recorders that generators make: as on a GPU, each records the steps of its generator."""
    made: list[FakeRecorder] = []

    def recorder(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setattr(workspace, "CudaRecorder", recorder)
    monkeypatch.setattr(generator, "why_no_graph", lambda model, device: None)
    return made


@pytest.mark.parametrize("parameters", [GREEDY, MIXED], ids=["greedy", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 4},
        {"slots": 5, "page_size": 3},
        {"slots": 3, "page_size": 4, "pages": 8},
        {"slots": 1},
        {"slots": 3, "draft_tokens": 3, "draft": causal_lm(num_hidden_layers=1)},
        {"slots": 4, "page_size": 3, "draft_tokens": 2, "draft": causal_lm(num_hidden_layers=1)},
    ],
    ids=["contiguous", "paged", "few pages", "one slot", "draft", "paged draft"],
)
def test_sequences_come_and_go(options: dict, parameters: list, recorders: list[FakeRecorder]) -> None:
    model = causal_lm()
    expected = Generator(model, pack_weights=False, cuda_graphs=False, **options).generate(PROMPTS, parameters)
    recorded = Generator(model, pack_weights=False, **options)
    for _ in range(2):
        found = recorded.generate(PROMPTS, parameters)
        assert [each.tokens for each in found] == [each.tokens for each in expected]
        assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
        for one, other in zip(found, expected, strict=True):
            assert (one.logprobs is None) == (other.logprobs is None)
            torch.testing.assert_close(torch.tensor(one.logprobs or []), torch.tensor(other.logprobs or []))
    # The graphs of the first call serve the second call.
    assert len(recorders) == 1 and recorders[0].recordings


@pytest.mark.parametrize("draft", [False, True])
def test_empty_slots_touch_nothing(draft: bool, recorders: list[FakeRecorder]) -> None:
    """Up to three empty slots next to the running ones change nothing.

    Sequences that ended early left them, and other sequences have their pages by now.
    """
    model = causal_lm()
    options = {"slots": 8, "page_size": 2, "pages": 60, "pack_weights": False, "draft": model if draft else None}
    prompts = [[1 + number % 80] * (1 + number % 5) for number in range(40)]
    parameters = [
        SamplingParameters(max_new_tokens=3 + 5 * number % 17, temperature=1.0, seed=number, eos_token_ids=range(20))
        for number in range(40)
    ]
    expected = Generator(model, cuda_graphs=False, **options).generate(prompts, parameters)
    assert Generator(model, **options).generate(prompts, parameters) == expected
    assert {"eos", "length"} == {each.finish_reason for each in expected}


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        lambda: causal_lm(position_embedding="alibi", num_key_value_heads=1, sliding_window=4),
        lambda: causal_lm(position_embedding="rotary", norm="rms", norm_placement="pre", embedding_norm=False),
        lambda: causal_lm(position_embedding="relative"),
        sequence_to_sequence,
    ],
    ids=["alibi", "rotary", "relative", "encoder-decoder"],
)
def test_architectures(model: Any, draft: bool, recorders: list[FakeRecorder]) -> None:
    model = model()
    options = {"pack_weights": False, "slots": 3, "draft": model if draft else None}
    expected = Generator(model, cuda_graphs=False, **options).generate(PROMPTS, MIXED)
    recorded = Generator(model, **options)
    for _ in range(2):
        assert [each.tokens for each in recorded.generate(PROMPTS, MIXED)] == [each.tokens for each in expected]
    assert recorders[0].recordings


def test_the_shortest_sequences(recorders: list[FakeRecorder]) -> None:
    """An empty slot takes part in a step, with room for its one token and for the tokens drafted behind it."""
    model = causal_lm(position_embedding="relative")
    for options in ({}, {"draft": model, "draft_tokens": 4}):
        recorded = Generator(model, pack_weights=False, slots=4, **options)
        expected = Generator(model, pack_weights=False, cuda_graphs=False, slots=4, **options)
        for new in (1, 2, 2, 2):
            parameters = SamplingParameters(max_new_tokens=new)
            assert recorded.generate([[3], [4], [5]], parameters) == expected.generate([[3], [4], [5]], parameters)


def test_kinds_of_steps(recorders: list[FakeRecorder]) -> None:
    """There is one kind of step for each power of two of sequences, and one for all slots.

    A kind of step is recorded when it comes again.
    """
    recorded = Generator(causal_lm(), pack_weights=False, slots=6, capacity=40)
    for count in (1, 2, 3, 4, 5, 6, 7):
        recorded.generate([[1]] * count, SamplingParameters(max_new_tokens=4))
    recorder = recorders[0]
    assert len(recorders) == 1 and len(recorder.recordings) == 4
    recorded.generate([[1]] * 3, SamplingParameters(max_new_tokens=3, temperature=1.0, seed=0, top_k=5))
    recorded.generate([[1]] * 4, SamplingParameters(max_new_tokens=3, temperature=0.5, seed=0, top_k=7))
    assert len(recorder.recordings) == 5


def test_weights_that_change_in_place_are_followed_and_others_recorded_anew(recorders: list[FakeRecorder]) -> None:
    model = causal_lm()
    recorded = Generator(model, pack_weights=False)

    def same() -> bool:
        expected = Generator(model, pack_weights=False, cuda_graphs=False).generate(PROMPTS, GREEDY)
        return recorded.generate(PROMPTS, GREEDY) == expected

    assert same()
    with torch.no_grad():
        model.model.layers[0].feed_forward.up.weight.mul_(-2.0)
    assert same() and len(recorders) == 1
    model.model.layers[0].feed_forward.up.weight.data = torch.randn_like(model.model.layers[0].feed_forward.up.weight)
    assert same() and len(recorders) == 2
    with fastformer.backend("torch"):
        assert same() and len(recorders) == 3


def test_a_stream_that_was_left_leaves_nothing_behind(recorders: list[FakeRecorder]) -> None:
    model = causal_lm()
    recorded = Generator(model, pack_weights=False, page_size=4)
    for _ in zip(range(6), recorded.stream(PROMPTS, MIXED), strict=False):
        pass
    expected = Generator(model, pack_weights=False, cuda_graphs=False).generate(PROMPTS[:3], GREEDY[:3])
    assert recorded.generate(PROMPTS[:3], GREEDY[:3]) == expected


def test_where_there_are_none() -> None:
    model = causal_lm()
    with pytest.raises(ValueError, match="cuda_graphs must be None or False here, since the model is on cpu; got True"):
        Generator(model, cuda_graphs=True)
    assert cuda_graphs.why_no_graph(model, torch.device("cuda")) == "parts of the model are on cpu"


def test_the_recorder_itself() -> None:
    """The fake recorder detects what no CUDA graph can do, and forgets what a CUDA graph forgets."""
    x, record = torch.arange(3.0), FakeRecorder().record
    (double, doubled), (_, other) = record(lambda: x.mul_(2) + 1), record(lambda: x + 0)
    assert x.tolist() == [0.0, 1.0, 2.0]
    double()
    assert x.tolist() == [0.0, 2.0, 4.0] and doubled.tolist() == [1.0, 3.0, 5.0] and other.isnan().all()
    replay, _ = record(lambda: x.nonzero())
    x.zero_()
    with pytest.raises(AssertionError, match="makes a tensor whose size depends on values"):
        replay()
    meta = torch.empty(3, device="meta")
    for forbidden in (
        lambda: meta.copy_(x),
        lambda: meta[0].item(),
        lambda: torch.tensor([1.0], device="meta"),
        lambda: meta.tolist(),
        lambda: bool(meta[0]),
    ):
        with pytest.raises(AssertionError), nothing_on_the_host():
            forbidden()
