"""Feed-forward blocks by both plans, and linear cross-entropy, compared with their peers: TFLOP/s and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from fastformer_kernels.plans import Plan, forced_plan

from fastformer.benchmarking.gpu.operator_cases import operator_cases
from fastformer.benchmarking.gpu.rates import BOTH, Case, launches, rates
from fastformer.benchmarking.gpu.step import Record, Setting, Step
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.operations import Sizes


def blocks(device: torch.device, dry: bool) -> list[Case]:
    """Feed-forward blocks of a layer of a 7B model, and of a layer of BERT and GPT-2."""
    sizes = (
        [Sizes(1, 32, 32, 2, 64, 48, 32, torch.float32)]
        if dry
        else [
            Sizes(8, 2048, 4096, 32, 11008, 32000, 2048, torch.bfloat16),
            Sizes(32, 512, 768, 12, 3072, 30522, 512, torch.bfloat16),
        ]
    )
    return [case for size in sizes for case in operator_cases(("feed_forward, ",), size, device, True, memory=True)]


def losses(device: torch.device, dry: bool) -> list[Case]:
    """Linear cross-entropy with the vocabularies of Llama 3 and GPT-2. Gradients are computed with the loss."""
    sizes = (
        [Sizes(1, 32, 32, 2, 64, 48, 32, torch.float32)]
        if dry
        else [
            Sizes(4, 2048, 4096, 32, 11008, 128256, 2048, torch.bfloat16),
            Sizes(16, 1024, 768, 12, 3072, 50257, 1024, torch.bfloat16),
        ]
    )
    return [
        case
        for size in sizes
        for case in operator_cases(("linear_cross_entropy, ",), size, device, True, phases=(BOTH,), memory=True)
    ]


def by_plan(cases: list[Case], plan: Plan) -> list[Case]:
    """The same cases for Fastformer alone, with `plan`."""
    return [replace(case, name=f"plan {plan}, {case.name}", peers={OURS: case.peers[OURS]}) for case in cases]


def run(setting: Setting) -> Iterator[Record]:
    """Yield the rates of all peers in all cases, and also our rates with each plan."""
    of_blocks = blocks(setting.device, setting.dry)
    for plan in get_args(Plan):
        with forced_plan(plan):
            yield from rates(by_plan(of_blocks, plan), setting)
    yield from rates([*of_blocks, *losses(setting.device, setting.dry)], setting)


def all_launches() -> Iterator[Callable[[], object]]:
    """Yield the launches of the same calls as `run` makes."""
    meta = torch.device("meta")
    of_blocks = blocks(meta, dry=False)
    for plan in get_args(Plan):
        for call in launches(by_plan(of_blocks, plan)):
            yield partial(_following, plan, call)
    yield from launches([*of_blocks, *losses(meta, dry=False)])


def _following(plan: Plan, call: Callable[[], object]) -> None:
    with forced_plan(plan):
        call()


STEP = Step(
    name="feed_forward",
    title="feed-forward by both plans, and linear cross-entropy, compared with peers: TFLOP/s, memory",
    seconds=50,
    run=run,
    launches=all_launches,
)
