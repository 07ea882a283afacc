"""Greedy generation beside Hugging Face's `generate`, on a model of GPT-2 small's shape with random weights.

    pytest benchmarks/test_generation.py

128 new tokens for each of 8 prompts of different lengths, and for one prompt; Hugging Face's prompts are padded on the
left, and it uses the faster of its dynamic and its static cache. All generate the same tokens. Rounds take turns; the
ratio is the median of each round's, so that what else the machine does meanwhile falls on both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastformer.generation import Generator, SamplingParameters
from fastformer.models.conversion import from_hugging_face

NEW, ROUNDS = 128, 3
# A single sequence is bound by the memory that holds the weights, whoever reads them: shown, without a goal.
GOALS = {"8 prompts": 1.5, "1 prompt": 0.0}
LENGTHS = {"8 prompts": (9, 17, 26, 40, 55, 71, 96, 120), "1 prompt": (40,)}
CACHES = ("dynamic", "static")
Run = Callable[[], list[list[int]]]


@pytest.fixture(scope="module")
def hugging_face() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # Wider than GPT-2's initial weights, so that no two tokens are nearly equally likely.
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.1, bos_token_id=None, eos_token_id=None)).eval()


def runs(model: GPT2LMHeadModel, lengths: tuple[int, ...]) -> dict[str, Run]:
    generator = Generator(from_hugging_face(model), slots=len(lengths))
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (length,), generator=random).tolist() for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])

    def theirs(cache: str) -> list[list[int]]:
        options = {"cache_implementation": cache, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()

    def ours() -> list[list[int]]:
        generated = generator.generate(prompts, SamplingParameters(max_new_tokens=NEW))
        return [generation.tokens for generation in generated]

    return {"fastformer": ours} | {cache: lambda cache=cache: theirs(cache) for cache in CACHES}


@pytest.mark.parametrize("prompts", LENGTHS)
def test_greedy_generation(
    hugging_face: GPT2LMHeadModel, prompts: str, benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    each = runs(hugging_face, LENGTHS[prompts])
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(ROUNDS):
        tokens = {}
        for name, run in each.items():
            begin = time.perf_counter()
            tokens[name] = run()
            seconds[name].append(time.perf_counter() - begin)
        assert tokens["fastformer"] == tokens["dynamic"] == tokens["static"]
    best = min(CACHES, key=lambda cache: statistics.median(seconds[cache]))
    ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds["fastformer"], strict=True)]
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(ratio=ratio, ratios=ratios, cache=best, threads=torch.get_num_threads())
    benchmark.pedantic(each["fastformer"], rounds=1)
    new = NEW * len(LENGTHS[prompts])
    with capsys.disabled():
        print(f"\n{prompts}, {torch.get_num_threads()} threads: {ratio:.2f} times Hugging Face's ({best} cache)")
        for name, taken in seconds.items():
            median = statistics.median(taken)
            spread = f"{min(taken):.1f} to {max(taken):.1f} s"
            print(f"  {name}: {median:.1f} s ({spread}), {new / median:.0f} tokens/s")
    assert ratio >= GOALS[prompts]
