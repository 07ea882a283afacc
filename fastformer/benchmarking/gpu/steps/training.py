"""Training steps and decoding of whole models, compared with Hugging Face's: tokens/s, utilisation, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastformer.models
from fastformer.benchmarking.gpu.ceilings import matrix_ceiling
from fastformer.benchmarking.gpu.step import Launch, Record, Setting, Step
from fastformer.benchmarking.gpu.subjects import Subject
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import Run, wait
from fastformer.console import in_a_line
from fastformer.generation import Generator, SamplingParameters
from fastformer.generation.cached_model import CachedModel
from fastformer.integrations.acceleration import accelerate
from fastformer.models import from_hugging_face
from fastformer.planning.model_work import autocast, meta_model
from fastformer.training.optimization import adamw

ACCELERATED = "accelerated"
SDPA, COMPILED = "Hugging Face, SDPA", "Hugging Face, SDPA, torch.compile"

_META = torch.device("meta")
_NOMINAL = 989.0  # TFLOP/s of an H100 or H200 SXM in bfloat16, by the vendor
_TOKENS = 32768  # tokens of a step
_WARM_UP, _STEPS = 3, 8
# The most seconds that a peer needs, without and with compilation. Building the model is included.
_SECONDS_OF_A_PEER, _SECONDS_TO_COMPILE = 12.0, 45.0
_SLOTS, _PROMPT, _NEW = 8, 128, 128


def _cases(dry: bool) -> list[Subject]:
    if dry:
        return [Subject("bert-base", 32, 16, dry), Subject("gpt2-small", 32, 16, dry)]
    return [
        Subject(name, 32768, length, dry)
        for name, length in (("gpt2-small", 1024), ("bert-base", 512), ("bert-base", 128))
    ]


def _model_and_batch(case: Subject, peer: str, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    if peer == OURS:
        return case.ours(device).train(), case.packed(device)
    if peer == ACCELERATED:
        model: nn.Module = case.hugging_face("fastformer", torch.device("cpu"))
        accelerate(model)
        return model.to(device).train(), case.padded(device)
    model = case.hugging_face("sdpa", device).train()
    if peer == COMPILED:
        model.compile(dynamic=False, backend="aot_eager" if case.dry else "inductor")
    return model, case.padded(device)


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output = model(**batch)
    return output["loss"]


def _training(case: Subject, peer: str, device: torch.device) -> Run:
    """A run of one step: forward, backward and AdamW in bfloat16 with float32 weights."""
    model, batch = _model_and_batch(case, peer, device)
    optimizer = adamw(model, learning_rate=1e-4, weight_decay=0.01, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = _loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _run(setting: Setting) -> Iterator[Record]:
    for case in _cases(setting.dry):
        for peer in (OURS, ACCELERATED, SDPA):
            yield from _trained(case, peer, setting)
    yield from _decoded(setting)
    for case in _cases(setting.dry):
        yield from _trained(case, COMPILED, setting)
    yield from _decoded_compiled(setting)


def _trained(case: Subject, peer: str, setting: Setting) -> Iterator[Record]:
    """Yield the records of a peer. Our model and our drop-in layers are two cases with the same peers."""
    own = f"{case.name}, T {case.length}"
    places = {OURS: [(own, OURS)], ACCELERATED: [(f"{own}, drop-in", OURS)]}.get(
        peer, [(own, peer), (f"{own}, drop-in", peer)]
    )
    for metric, value, unit, missing in _figures(case, peer, setting):
        yield from (Record(place, name, metric, value, unit, missing) for place, name in places)


def _figures(case: Subject, peer: str, setting: Setting) -> Iterator[tuple[str, float | None, str, str | None]]:
    """Yield metric, value, unit, and the reason if there is no value."""
    needed = 0.0 if setting.dry else _SECONDS_TO_COMPILE if peer == COMPILED else _SECONDS_OF_A_PEER
    if setting.left < needed:
        yield "training", None, "tokens/s", "no time left"
        return
    gpu = setting.device.type == "cuda"
    try:
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = _seconds(_training(case, peer, setting.device), setting)
    except Exception as error:
        yield "training", None, "tokens/s", in_a_line(error)
        return
    rate = case.tokens / seconds
    achieved = case.flop_per_token * rate / 1e12
    yield "training", rate, "tokens/s", None
    yield "MFU of the ceiling", 100 * achieved / matrix_ceiling(setting.device, setting.dry).value, "%", None
    yield f"MFU of {_NOMINAL:.0f} TFLOP/s", 100 * achieved / _NOMINAL, "%", None
    if gpu:
        yield "peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", None


def _seconds(run: Run, setting: Setting) -> float:
    """The mean seconds of several runs in a row. The host's time counts: in training, too, the GPU may wait for it."""
    warm_up, steps = (1, 1) if setting.dry else (_WARM_UP, _STEPS)
    for _ in range(warm_up):
        run()
    wait(setting.device)
    begin = time.perf_counter()
    for _ in range(steps):
        run()
    wait(setting.device)
    return (time.perf_counter() - begin) / steps


# --- Decoding ---------------------------------------------------------------------------------------------------------


def _decoding_case(dry: bool) -> Subject:
    return Subject("gpt2-small", 1024, 1024, dry)


def _prompts(case: Subject, dry: bool) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    shape = (2, 8) if dry else (_SLOTS, _PROMPT)
    return torch.randint(5, case.config.vocab_size, shape, generator=random).tolist()


def _ours_decoding(model: PreTrainedModel, prompts: list[list[int]], new: int) -> Run:
    converted = from_hugging_face(model)
    assert isinstance(converted, fastformer.models.FastformerForCausalLM) and converted.device == model.device
    generator = Generator(converted.eval(), slots=len(prompts))
    return lambda: generator.generate(prompts, SamplingParameters(max_new_tokens=new, eos_token_ids=()))


def _their_decoding(model: PreTrainedModel, prompts: list[list[int]], new: int, **options: Any) -> Run:
    ids = torch.tensor(prompts, device=model.device)
    options |= {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, "min_new_tokens": new}
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, **options)  # type: ignore[operator]


def _decoded(setting: Setting) -> Iterator[Record]:
    static = partial(_their_decoding, cache_implementation="static", disable_compile=True)
    makers: dict[str, Callable[..., Run]] = {
        OURS: _ours_decoding,
        "generate, static cache": static,
        "generate, dynamic cache": _their_decoding,
    }
    for peer, make in makers.items():
        yield from _decoding(peer, make, setting, _SECONDS_OF_A_PEER)


def _decoded_compiled(setting: Setting) -> Iterator[Record]:
    """Measure decoding as transformers does it by default on a GPU: with torch.compile."""
    if not setting.dry:
        make = partial(_their_decoding, cache_implementation="static")
        yield from _decoding("generate, static cache, torch.compile", make, setting, _SECONDS_TO_COMPILE)


def _decoding(peer: str, make: Callable[..., Run], setting: Setting, needed: float) -> Iterator[Record]:
    case = _decoding_case(setting.dry)
    prompts, new = _prompts(case, setting.dry), 4 if setting.dry else _NEW
    name = f"decoding, gpt2-small, {len(prompts)} x {new} tokens"
    if not setting.dry and setting.left < needed:
        yield Record(name, peer, "decoding", None, "tokens/s", "no time left")
        return
    try:
        model = case.hugging_face("sdpa", setting.device).eval()
        run = make(model if setting.dry else model.bfloat16(), prompts, new)
        run()
        wait(setting.device)
        begin = time.perf_counter()
        run()
        wait(setting.device)
    except Exception as error:
        yield Record(name, peer, "decoding", None, "tokens/s", in_a_line(error))
        return
    yield Record(name, peer, "decoding", new * len(prompts) / (time.perf_counter() - begin), "tokens/s")


# --- Launches ---------------------------------------------------------------------------------------------------------


def _launches() -> Iterator[Launch]:
    for case in _cases(dry=False):
        for peer in (OURS, ACCELERATED):
            yield partial(_launch_training, case, peer)
    yield _launch_decoding


def _launch_training(case: Subject, peer: str) -> None:
    model, batch = _model_and_batch(case, peer, _META)
    with autocast("bf16-mixed"):
        loss = _loss(model, batch)
    loss.backward(torch.empty_like(loss))


def _launch_decoding() -> None:
    """Launch all prompts at once, then one token for each."""
    case = _decoding_case(dry=False)
    model = meta_model(case.config, "FastformerForCausalLM", "bf16-true").eval()
    assert isinstance(model, fastformer.models.FastformerForCausalLM)
    prompts = _prompts(case, dry=False)
    with torch.inference_mode():
        cached = CachedModel(model, _SLOTS, _PROMPT + _NEW)
        cached.prefill(prompts, 0)
        tokens = torch.empty(_SLOTS, 1, dtype=torch.int64, device=_META)
        cached.decode(tokens, torch.empty(_SLOTS, dtype=torch.int32, device=_META))


STEP = Step(
    "training",
    "BERT-base and GPT-2 124M: tokens per second, utilisation, memory; decoding",
    70,
    _run,
    _launches,
)
