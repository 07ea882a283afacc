"""Greedy generation compared with Hugging Face's `generate`, with random weights in the shape of GPT-2 small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastformer.benchmarking.measurement import OURS, Goal
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.generation import Generator, SamplingParameters
from fastformer.models import FastformerForCausalLM
from fastformer.models.conversion import from_hugging_face

CACHES = ("dynamic", "static")
LENGTHS = {"8 prompts": (9, 17, 26, 40, 55, 71, 96, 120), "1 prompt": (40,)}
QUICK: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 1000}


def cases(setting: Setting) -> list[Case]:
    new = 8 if setting.quick else 128
    model = cache(partial(gpt2, setting.quick, setting.device))
    return [
        Case(
            f"{name}, {new} new tokens each",
            {OURS: Peer(partial(ours, model, lengths, new))}
            | {f"generate, {kind} cache": Peer(partial(theirs, model, lengths, new, kind)) for kind in CACHES},
            {"tokens": new * len(lengths)},
            equal_tokens,
        )
        for name, lengths in LENGTHS.items()
    ]


def gpt2(quick: bool, device: torch.device) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # Wider than GPT-2's initial weights, so that no two tokens are nearly equally likely.
    config = GPT2Config(**QUICK if quick else {}, initializer_range=0.1, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval().to(device)


def prompts_of(model: GPT2LMHeadModel, lengths: Sequence[int]) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(model.config.vocab_size, (length,), generator=random).tolist() for length in lengths]


def ours(model: Callable[[], GPT2LMHeadModel], lengths: Sequence[int], new: int) -> Run:
    converted = from_hugging_face(model())
    assert isinstance(converted, FastformerForCausalLM)
    generator = Generator(converted, slots=len(lengths))
    prompts = prompts_of(model(), lengths)
    return lambda: [each.tokens for each in generator.generate(prompts, SamplingParameters(max_new_tokens=new))]


def theirs(model: Callable[[], GPT2LMHeadModel], lengths: Sequence[int], new: int, kind: str) -> Run:
    """Hugging Face's generation, with prompts padded on the left."""
    found = model()
    width = max(lengths)
    prompts = prompts_of(found, lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=found.device)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], device=found.device)
    options = {"cache_implementation": kind, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: found.generate(ids, attention_mask=mask, **options)[:, width:].tolist()


def equal_tokens(tokens: dict[str, object]) -> None:
    assert all(each == tokens[OURS] for each in tokens.values()), f"{', '.join(tokens)} generated different tokens"


STUDY = TimedStudy(
    name="generation",
    title="greedy generation with a model of GPT-2 small's shape",
    cases=cases,
    rounds=3,
    goals=tuple(
        Goal(case, f"generate, {kind} cache", at_least=bound)
        for case, bound in (("8 prompts", 1.5), ("1 prompt", 1.0))
        for kind in CACHES
    ),
    note="Weights are random; all peers generate the same tokens. Hugging Face's prompts are padded on the left.",
)
