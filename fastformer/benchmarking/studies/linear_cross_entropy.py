"""Time and peak memory of linear cross-entropy, forward and backward, compared with `cross_entropy(linear(...))`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, Goal
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.ops.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cases(setting: Setting) -> list[Case]:
    tokens, classes, features = (512, 1000, 64) if setting.quick else (4096, 50257, 768)

    def peer(loss: Loss) -> Peer:
        return Peer(lambda: step(loss, tokens, classes, features, setting.device))

    peers = {OURS: peer(linear_cross_entropy), "PyTorch": peer(lambda x, w, t: F.cross_entropy(F.linear(x, w), t))}
    name = f"{tokens:,} tokens, {classes:,} classes, {features} features"
    return [Case(name, peers, {"tokens": tokens}, equal_losses)]


def step(loss: Loss, tokens: int, classes: int, features: int, device: torch.device) -> Run:
    """A run of one forward and backward. All peers get the same inputs."""
    torch.manual_seed(0)
    input = torch.randn(tokens, features, device=device, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(classes, features, device=device) * 0.02)
    target = torch.randint(classes, (tokens,), device=device)

    def run() -> float:
        input.grad = weight.grad = None
        value = loss(input, weight, target)
        value.backward()
        return value.item()

    return run


def equal_losses(losses: dict[str, object]) -> None:
    torch.testing.assert_close(losses[OURS], losses["PyTorch"], rtol=1e-5, atol=0)


STUDY = TimedStudy(
    name="linear-cross-entropy",
    title="the loss of a language model's head, forward and backward",
    cases=cases,
    memory="run",
    goals=(Goal("", "PyTorch", at_least=1.0), Goal("", "PyTorch", PEAK_MEMORY, at_most=0.25)),
    note="Memory is what a step adds to its inputs.",
)
