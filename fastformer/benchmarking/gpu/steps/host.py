"""The time that the host needs to launch a call, with tiny tensors and without waiting for the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from fastformer.benchmarking.calls import Call
from fastformer.benchmarking.gpu.step import Launch, Record, Setting, Step
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import Run
from fastformer.console import in_a_line

# The calls of a turn: few enough that the GPU's queue of a thousand launches is never full.
_CALLS = 50


@dataclass(frozen=True)
class _Case:
    """An operator of ours, PyTorch's version of it, and a function that makes their arguments."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    make: Callable[[torch.device], list[Tensor]]


def _random(*shape: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.randn(shape, device=device, dtype=torch.bfloat16)


def _inputs(*each: Callable[[torch.device], Tensor]) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [make(device) for make in each]


def _zeros(tokens: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.zeros(tokens, device=device, dtype=torch.int64)


def _cases(dry: bool) -> list[_Case]:
    tokens, heads, head_dim = (16, 1, 16) if dry else (128, 8, 64)
    width = heads * head_dim
    rows, weight, headed = _random(tokens, width), _random(width), _random(1, heads, tokens, head_dim)
    return [
        _Case("attention", fastformer.attention, F.scaled_dot_product_attention, _inputs(headed, headed, headed)),
        _Case("softmax", fastformer.softmax, partial(F.softmax, dim=-1), _inputs(rows)),
        _Case("cross-entropy", fastformer.cross_entropy, F.cross_entropy, _inputs(rows, _zeros(tokens))),
        _Case(
            "layer norm",
            lambda x, weight, bias: fastformer.layer_norm(x, (width,), weight, bias),
            lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias),
            _inputs(rows, weight, weight),
        ),
        _Case(
            "feed-forward",
            lambda x, up, down: fastformer.feed_forward(x, up, down),
            lambda x, up, down: F.linear(F.gelu(F.linear(x, up)), down),
            _inputs(rows, _random(4 * width, width), _random(width, 4 * width)),
        ),
    ]


def _runs(case: _Case, function: Callable[..., Any], device: torch.device) -> dict[str, Run]:
    inputs = case.make(device)
    leaves = [each.requires_grad_() if each.is_floating_point() else each for each in inputs]
    gradients = [torch.ones_like(each) for each in Call(function, inputs)()]
    return {"forward": Call(function, inputs), "forward and backward": Call(function, leaves, gradients)}


def _run(setting: Setting) -> Iterator[Record]:
    for case in _cases(setting.dry):
        for peer, function in ((OURS, case.ours), ("PyTorch", case.theirs)):
            try:
                for metric, run in _runs(case, function, setting.device).items():
                    yield Record(case.name, peer, metric, 1e6 * _seconds(run, setting), "us")
            except Exception as error:
                yield Record(case.name, peer, "forward", None, "us", in_a_line(error))


def _seconds(run: Run, setting: Setting) -> float:
    """The seconds that the host is busy with one call: the median of a few rounds."""
    calls, rounds = (1, 1) if setting.dry else (_CALLS, 9)
    run()
    taken = []
    for _ in range(rounds):
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - begin) / calls)
    return statistics.median(taken)


def _launches() -> Iterator[Launch]:
    return (partial(_launch, case) for case in _cases(dry=False))


def _launch(case: _Case) -> None:
    for run in _runs(case, case.ours, torch.device("meta")).values():
        run()


STEP = Step("host", "time of the host for a call, compared with PyTorch's", 15, _run, _launches)
