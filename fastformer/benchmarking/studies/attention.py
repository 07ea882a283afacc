"""Attention compared with its peers, forward and with the backward: for several lengths, and with each feature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from fastformer.benchmarking.attention_peers import Attention, comparable, peers, twin
from fastformer.benchmarking.calls import same
from fastformer.benchmarking.lengths import natural_lengths
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy

_PASSES = {"forward": False, "forward and backward": True}


def cases(setting: Setting) -> Iterator[Case]:
    yield from _lengths(setting)
    yield from _features(setting)


def _lengths(setting: Setting) -> Iterator[Case]:
    """Yield cases with the same number of tokens and features, in fewer and longer sequences."""
    gpu = setting.device.type == "cuda"
    width, tokens, head_dims = (2048, 16384, (64, 128)) if gpu else (512, 2048, (64,))
    sequences: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384) if gpu else (128, 512, 2048)
    if setting.quick:
        width, tokens, head_dims, sequences = 64, 64, (32,), (64,)
    for head_dim, causal, (name, backward), sequence in product(
        head_dims, (True,) if setting.quick else (False, True), _PASSES.items(), sequences
    ):
        curve = f"{'causal, ' if causal else ''}head_dim {head_dim}, {name}"
        shape = (tokens // sequence, width // head_dim, sequence, head_dim)
        call = Attention(*shape, _dtype(setting), setting.device, backward, causal=causal)
        # On a CPU, compiling for each length would take longer than everything else.
        flex = gpu or (not setting.quick and sequence == sequences[-1])
        title = f"attention, {curve}, {call.batch} x {sequence:,}"
        case = _case(title, call, peers(call, flex))
        yield replace(case, curve=curve, axis="sequence length", at=sequence, memory=gpu or backward)


def _features(setting: Setting) -> Iterator[Case]:
    """Yield cases of one shape, each with an option that Transformers use."""
    gpu = setting.device.type == "cuda"
    batch, heads, sequence, head_dim = (4, 16, 4096, 128) if gpu else (4, 8, 512, 64)
    if setting.quick:
        batch, heads, sequence, head_dim = 2, 2, 64, 32
    lengths = natural_lengths(batch, sequence)
    features: dict[str, dict[str, Any]] = {
        "padding": {"lengths": lengths},
        "packed": {"lengths": lengths, "packed": True},
        "packed, causal": {"lengths": lengths, "packed": True, "causal": True},
        f"window of {sequence // 8}": {"causal": True, "window": sequence // 8},
        "ALiBi, causal": {"causal": True, "alibi": True},
        "bias with its gradient": {"bias": True},
        "softcap": {"softcap": 30.0},
        "dropout": {"dropout_p": 0.1},
        "grouped queries, causal": {"causal": True, "kv_heads": heads // 2},
    }
    shape = (batch, heads, sequence, head_dim)
    for (name, backward), (feature, options) in product(_PASSES.items(), features.items()):
        if setting.quick and not backward:
            continue
        call = Attention(*shape, _dtype(setting), setting.device, backward, **options)
        flex = gpu or (call.window is not None and not backward)
        yield _case(f"attention, {feature}, {name}, {batch} x {sequence:,}", call, peers(call, flex))
    call = Attention(*shape, _dtype(setting), setting.device, True, causal=True)
    title = f"scaled_dot_product_attention, causal, forward and backward, {batch} x {sequence:,}"
    yield _case(title, call, peers(call, flex=False) | {OURS: twin(call)})


def _dtype(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.device.type == "cuda" else torch.float32


def _case(title: str, call: Attention, peers: dict[str, Peer]) -> Case:
    # Each peer has its own dropout pattern.
    agree = None if call.dropout_p else same(call.dtype, comparable(call))
    return Case(title, peers, {"FLOP": call.flop}, agree, memory=call.device.type == "cuda")


STUDY = TimedStudy(
    name="attention",
    title="attention over sequence lengths and features",
    cases=cases,
    memory="run",
    note=(
        "FLOP are counted for the pairs that may attend: half of all if causal, and none for padding. With the "
        "backward they are 3.5 times the forward's. Peers without packed sequences get padded ones with a mask. Memory "
        "is what the call adds to its inputs."
    ),
)
