"""Attention compared with its peers: for several lengths, and with each option that Transformers use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch

from fastformer.backends import backend
from fastformer.benchmarking.attention_peers import (
    BLOCK_MASK,
    DENSE_MASK,
    FLEX,
    MASK_OF_BYTES,
    Attention,
    compiled_peers,
    exact_first_heads,
    of_first_heads,
    peers,
    with_block_mask,
    with_dense_mask,
)
from fastformer.benchmarking.gpu.rates import Case, launches, rates
from fastformer.benchmarking.gpu.step import Record, Setting, Step
from fastformer.benchmarking.lengths import natural_lengths
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.operations import Work
from fastformer.benchmarking.study import Peer

WIDTH, TOKENS = 2048, 16384

# Peers that are slow by design, or the same as another peer. There is no time for them.
_LEFT_OUT = {"PyTorch eager", "SDPA math", "SDPA, one sequence at a time"}
_FIRST = (OURS, "SDPA cuDNN", "SDPA flash", "PyTorch varlen_attn", "flash-attn", "SDPA memory-efficient", "xFormers")
_OUR_MASKS: dict[str, Callable[[Attention], Peer]] = {
    BLOCK_MASK: with_block_mask,
    DENSE_MASK: partial(with_dense_mask, packed=True),
    MASK_OF_BYTES: partial(with_dense_mask, packed=False),
}
# A multiple of 1/16, which is cuDNN's resolution.
_DROPOUT = 0.125


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The cases, in order of importance."""
    return [*_lengths(device, dry), *_features(device, dry), *_wide_heads(device, dry)]


def _lengths(device: torch.device, dry: bool) -> Iterator[Case]:
    """Yield cases with the same number of tokens and features, in fewer and longer sequences."""
    width, tokens = (32, 32) if dry else (WIDTH, TOKENS)
    head_dims, sequences = ((16,), (16, 32)) if dry else ((128, 64), (4096, 16384, 1024, 8192, 2048))
    for causal, head_dim, sequence in product((True, False), head_dims, sequences):
        call = Attention(
            tokens // sequence, width // head_dim, sequence, head_dim, _dtype(dry), device, True, causal=causal
        )
        compiled = (FLEX, "torch.compile") if sequence == sequences[0] and causal else ()
        yield _case("causal" if causal else "full", call, compiled)


def _features(device: torch.device, dry: bool) -> Iterator[Case]:
    """Yield cases of one shape, each with an option that Transformers use."""
    batch, heads, sequence, head_dim = (2, 4, 32, 16) if dry else (4, 16, 4096, 128)
    lengths, window = natural_lengths(batch, sequence), 8 if dry else 512
    features: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "packed, causal": ({"lengths": lengths, "packed": True, "causal": True}, (BLOCK_MASK, FLEX)),
        "grouped queries, causal": ({"causal": True, "kv_heads": heads // 4}, ()),
        f"window {window}": ({"causal": True, "window": window}, (*_OUR_MASKS, FLEX)),
        "padding": ({"lengths": lengths}, ()),
        "softcap, causal": ({"causal": True, "softcap": 50.0}, (FLEX, "torch.compile")),
        "sinks, causal": ({"causal": True, "sinks": True}, ("torch.compile",)),
        "relative bias": ({"relative_bias": True}, (FLEX,)),
        "bias": ({"bias": True}, ()),
        "dropout, causal": ({"causal": True, "dropout_p": _DROPOUT}, ()),
    }
    for name, (options, compiled) in features.items():
        yield _case(name, Attention(batch, heads, sequence, head_dim, _dtype(dry), device, True, **options), compiled)


def _wide_heads(device: torch.device, dry: bool) -> Iterator[Case]:
    """Yield cases with the widest heads: those of Gemma's layers, the global ones of Gemma 4 last."""
    batch, sequence = (2, 32) if dry else (4, 4096)
    for head_dim in (48, 80) if dry else (256, 512):
        heads = 2 if dry else WIDTH // head_dim
        yield _case("causal", Attention(batch, heads, sequence, head_dim, _dtype(dry), device, True, causal=True), ())


def _dtype(dry: bool) -> torch.dtype:
    return torch.float32 if dry else torch.bfloat16


def _case(title: str, call: Attention, further: tuple[str, ...]) -> Case:
    """A case with the usual peers and with `further` ones: masks, and those that take seconds to compile."""
    found = {name: peer for name, peer in peers(call, flex=False).items() if name not in _LEFT_OUT}
    in_order: dict[str, Peer] = {name: found[name] for name in _FIRST if name in found}
    in_order |= {name: make(call) for name, make in _OUR_MASKS.items() if name in further}
    in_order |= {name: peer for name, peer in compiled_peers(call).items() if name in further}
    exact: Callable[[], Any] | None = None if call.dropout_p else partial(exact_first_heads, call)
    return Case(
        f"{title}, d {call.head_dim}, {call.batch} x {call.sequence:,}",
        in_order,
        Work("FLOP", call.flop / 3.5, call.flop * 2.5 / 3.5),
        exact,
        partial(of_first_heads, call),
    )


def run(setting: Setting) -> Iterator[Record]:
    """Yield the rates of all peers in all cases. A dry run does not use the interpreter, which would take minutes."""
    with backend("torch") if setting.dry else nullcontext():
        yield from rates(cases(setting.device, setting.dry), setting)


STEP = Step(
    name="attention",
    title="attention compared with its peers, forward and backward: lengths, features",
    seconds=118,
    run=run,
    launches=lambda: launches(cases(torch.device("meta"), dry=False)),
)
