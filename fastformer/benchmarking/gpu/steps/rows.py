"""Kernels that work on rows, compared with their peers: the rate at which they move the bytes that must be moved."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastformer.benchmarking.gpu.operator_cases import operator_cases
from fastformer.benchmarking.gpu.rates import BOTH, FORWARD, Case, launches, rates
from fastformer.benchmarking.gpu.step import Record, Setting, Step
from fastformer.benchmarking.operations import Sizes

# The beginnings of operations' names. A beginning with a digit at its end selects the operator without options.
_OF_TOKENS = ("layer_norm, 1", "layer_norm, residual", "rms_norm", "rotary, ")
_EMBEDDING = "transformer_embedding, "  # has a kernel up to 4,096 features


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The cases, in order of importance."""
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
    """The sizes of 16k tokens of BERT, or of a larger model with heads of 128 features."""
    heads = hidden // (64 if hidden < 1024 else 128)
    return Sizes(8, 2048, hidden, heads, 4 * hidden, 30522, 2048, torch.bfloat16)


def _scores(heads: int, keys: int) -> Sizes:
    """The sizes of square scores with `heads` heads."""
    return Sizes(1, keys, 64 * heads, heads, 64, 64, keys, torch.bfloat16)


def _logits(tokens: int, classes: int) -> Sizes:
    return Sizes(1, tokens, 64, 1, 64, classes, 64, torch.bfloat16)


def _of_tokens(sizes: Sizes, device: torch.device, compiled: bool) -> Iterator[Case]:
    return operator_cases((*_OF_TOKENS, _EMBEDDING), sizes, device, compiled)


def _softmax(sizes: Sizes, device: torch.device, compiled: bool) -> Iterator[Case]:
    return operator_cases(("softmax, ",), sizes, device, compiled)


def _losses(sizes: Sizes, device: torch.device, compiled: bool) -> Iterator[Case]:
    """Yield cases of cross-entropy. Liger-Kernel computes gradients in the forward, so there is no backward alone."""
    name = f"cross_entropy, {sizes.tokens:,}"
    return operator_cases((name,), sizes, device, compiled, phases=(FORWARD, BOTH))


def run(setting: Setting) -> Iterator[Record]:
    """Yield the rates of all peers in all cases."""
    return rates(cases(setting.device, setting.dry), setting)


STEP = Step(
    name="rows",
    title="softmax, norms, rotary, losses and embeddings, compared with their peers: GB/s",
    seconds=50,
    run=run,
    launches=lambda: launches(cases(torch.device("meta"), dry=False)),
)
