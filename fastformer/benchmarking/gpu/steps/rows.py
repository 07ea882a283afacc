"""Kernels that go over rows beside their peers: how fast bytes move that must."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastformer.benchmarking.gpu.operator_cases import operator_cases
from fastformer.benchmarking.gpu.rates import BOTH, FORWARD, Case, launches, rates
from fastformer.benchmarking.gpu.step import Record, Setting, Step
from fastformer.benchmarking.operations import Sizes

# Beginnings of operations' names: with a digit after it, an operator alone.
_OF_TOKENS = ("layer_norm, 1", "layer_norm, residual", "rms_norm", "rotary, ")
_EMBEDDING = "transformer_embedding, "  # has a kernel up to 4,096 features


def cases(device: torch.device, dry: bool) -> list[Case]:
    """In order of worth."""
    if dry:
        size = Sizes(1, 16, 32, 2, 64, 48, 16, torch.float32)
        return [*_of_tokens(size, device, True), *_softmax(size, device, True), *_losses(size, device, True)]
    return [
        *_of_tokens(_tokens(4096), device, True),
        *_softmax(_scores(heads=8, keys=4096), device, True),
        *_losses(_logits(16384, 32000), device, True),
        *_of_tokens(_tokens(768), device, False),
        *_losses(_logits(4096, 128256), device, False),
        *operator_cases(_OF_TOKENS, _tokens(8192), device, False),
        *_softmax(_scores(heads=192, keys=768), device, False),
        *_softmax(_scores(heads=2, keys=8192), device, False),
    ]


def _tokens(hidden: int) -> Sizes:
    """16k tokens, of BERT or of a model with heads of 128 features."""
    heads = hidden // (64 if hidden < 1024 else 128)
    return Sizes(8, 2048, hidden, heads, 4 * hidden, 30522, 2048, torch.bfloat16)


def _scores(heads: int, keys: int) -> Sizes:
    """Of `heads` heads, square."""
    return Sizes(1, keys, 64 * heads, heads, 64, 64, keys, torch.bfloat16)


def _logits(tokens: int, classes: int) -> Sizes:
    return Sizes(1, tokens, 64, 1, 64, classes, 64, torch.bfloat16)


def _of_tokens(sizes: Sizes, device: torch.device, compiled: bool) -> Iterator[Case]:
    return operator_cases((*_OF_TOKENS, _EMBEDDING), sizes, device, compiled)


def _softmax(sizes: Sizes, device: torch.device, compiled: bool) -> Iterator[Case]:
    return operator_cases(("softmax, ",), sizes, device, compiled)


def _losses(sizes: Sizes, device: torch.device, compiled: bool) -> Iterator[Case]:
    """Liger-Kernel computes the gradients in the forward."""
    name = f"cross_entropy, {sizes.tokens:,}"
    return operator_cases((name,), sizes, device, compiled, phases=(FORWARD, BOTH))


def run(setting: Setting) -> Iterator[Record]:
    """Rates of everybody in all cases."""
    return rates(cases(setting.device, setting.dry), setting)


STEP = Step(
    name="rows",
    title="softmax, norms, rotary, losses and embeddings beside their peers: GB/s",
    seconds=50,
    run=run,
    launches=lambda: launches(cases(torch.device("meta"), dry=False)),
)
