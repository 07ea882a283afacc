"""Attention is accurate at real sizes: every head_dim, precision and feature, and sequences of 64k tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.configurations import forced
from gpu.attention_by_rows import attention_tensors, judge_attention
from gpu.judging import DTYPES
from gpu.making import Maker, dry_with

from fastformer import BlockMask

HEADS = 4


@pytest.mark.parametrize("precision", dry_with(("bf16", "fp32"), DTYPES))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", dry_with((80,), (64, 80, 96, 128, 192, 256, 320, 512)))
def test_head_dims(head_dim: int, causal: bool, precision: str, make: Maker) -> None:
    """Every head_dim is accurate with grouped queries and with partial last tiles of queries and keys."""
    queries, keys = make.size(1100, 19), make.size(1291, 22)
    head_dim = make.size(head_dim, head_dim // 16)
    judge_attention(attention_tensors(make, 2, HEADS, 2, queries, keys, head_dim), {"causal": causal}, precision)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", dry_with((64,), (64, 128)))
def test_whole_tiles(head_dim: int, causal: bool, make: Maker) -> None:
    """Calls of whole tiles, which use specialised warps, are accurate."""
    tokens, head_dim = make.size(4096, 32), make.size(head_dim, 16)
    judge_attention(attention_tensors(make, 1, 2, 2, tokens, tokens, head_dim), {"causal": causal}, "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", dry_with((), (64, 128)))
def test_sums_that_are_seldom_rescaled(head_dim: int, causal: bool, precision: str, make: Maker) -> None:
    """Maxima that grow from tile to tile, by less and by more than lazy rescaling leaves alone."""
    query, key, value = attention_tensors(make, 1, 2, 2, 1100, 1291, head_dim)
    key = key * torch.linspace(0.1, 8.0, 1291, device=make.device, dtype=key.dtype)[:, None]
    with forced({"attention_forward": AttentionConfiguration(128, 64, 8, 2, lazy_rescale=True)}):
        judge_attention([query, key, value], {"causal": causal}, precision)


Feature = Callable[[Maker, int, int], dict[str, Any]]


def _lengths(make: Maker, *shares: float, keys: int) -> torch.Tensor:
    return make.tensor([int(share * keys) for share in shares], torch.int32)


def _causal_documents(make: Maker, queries: int, keys: int) -> BlockMask:
    """Documents of other lengths in each head, with tiles that are empty, partial and whole."""
    length = make.size(500, 8)

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q // (length + 50 * h) == k // (length + 50 * h)) & (q >= k)

    return BlockMask.from_function(seen, None, HEADS, queries, keys, device=make.device)


FEATURES: dict[str, Feature] = {
    "window": lambda make, queries, keys: {"window": (make.size(512, 9), make.size(100, 4))},
    "causal window": lambda make, queries, keys: {"causal": True, "window": (make.size(512, 9), None)},
    "window of one before": lambda make, queries, keys: {"window": (1, 5)},
    "window of one after": lambda make, queries, keys: {"window": (5, 1)},
    "window of one before and itself": lambda make, queries, keys: {"window": (1, 0)},
    "window of itself": lambda make, queries, keys: {"window": (0, 0)},
    "chunk": lambda make, queries, keys: {"causal": True, "chunk": make.size(700, 7)},
    "prefix": lambda make, queries, keys: {
        "causal": True,
        "prefix_lengths": _lengths(make, 0.3, 0.0, keys=keys),
    },
    "top left": lambda make, queries, keys: {"causal": True, "alignment": "top_left"},
    "padding": lambda make, queries, keys: {"key_lengths": _lengths(make, 0.6, 1.0, keys=keys)},
    "only padding": lambda make, queries, keys: {"key_lengths": _lengths(make, 0.0, 0.9, keys=keys)},
    "causal padding": lambda make, queries, keys: {"causal": True, "key_lengths": _lengths(make, 0.6, 1.0, keys=keys)},
    "mask": lambda make, queries, keys: {"mask": make.booleans(1, HEADS, queries, keys, share=0.5)},
    "block mask": lambda make, queries, keys: {"mask": _causal_documents(make, queries, keys)},
    "bias": lambda make, queries, keys: {"bias": make.normal(1, HEADS, queries, keys)},
    "causal bias of all heads": lambda make, queries, keys: {"causal": True, "bias": make.normal(1, 1, queries, keys)},
    "bias of keys": lambda make, queries, keys: {"bias": make.normal(2, 1, 1, keys)},
    "relative bias": lambda make, queries, keys: {"relative_bias": make.normal(HEADS, 2 * make.size(128, 5) + 1)},
    "relative bias of all": lambda make, queries, keys: {"relative_bias": make.normal(HEADS, 2 * keys - 1)},
    "alibi": lambda make, queries, keys: {"alibi_slopes": make.normal(HEADS).abs().mul_(0.01)},
    "alibi and bias": lambda make, queries, keys: {
        "alibi_slopes": make.normal(2, HEADS).abs().mul_(0.01),
        "bias": make.normal(1, HEADS, queries, keys),
    },
    "softcap": lambda make, queries, keys: {"softcap": 3.0},
    "sinks": lambda make, queries, keys: {"causal": True, "sinks": make.normal(HEADS)},
    "scale of each head": lambda make, queries, keys: {"scale": make.normal(HEADS).mul_(0.2)},
    "dropout": lambda make, queries, keys: {"dropout_p": 0.1},
    "causal dropout": lambda make, queries, keys: {"causal": True, "dropout_p": 0.5},
    "everything": lambda make, queries, keys: {
        "causal": True,
        "window": (make.size(700, 9), None),
        "softcap": 5.0,
        "alibi_slopes": make.normal(HEADS).abs().mul_(0.01),
        "sinks": make.normal(HEADS),
        "bias": make.normal(1, HEADS, queries, keys),
        "mask": make.booleans(1, 1, queries, keys, share=0.8),
        "key_lengths": _lengths(make, 0.7, 0.9, keys=keys),
        "dropout_p": 0.1,
    },
}


@pytest.mark.parametrize("head_dim", dry_with((64,), (64, 128)))
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, head_dim: int, make: Maker) -> None:
    queries, keys, head_dim = make.size(2000, 21), make.size(2099, 26), make.size(head_dim, head_dim // 8)
    options = FEATURES[feature](make, queries, keys)
    judge_attention(attention_tensors(make, 2, HEADS, 2, queries, keys, head_dim), options, "bf16")


@pytest.mark.parametrize("precision", dry_with(("fp32",), ("fp16", "fp32", "tf32")))
@pytest.mark.parametrize("feature", ["everything", "window of one before and itself", "relative bias"])
def test_features_in_other_precisions(feature: str, precision: str, make: Maker) -> None:
    queries, keys, head_dim = make.size(1000, 21), make.size(1057, 26), make.size(64, 8)
    options = FEATURES[feature](make, queries, keys)
    judge_attention(attention_tensors(make, 2, HEADS, 2, queries, keys, head_dim), options, precision)


def test_value_head_dim_of_its_own(make: Maker) -> None:
    dims = (192, 128) if not make.dry else (9, 6)
    tensors = attention_tensors(make, 1, HEADS, 1, make.size(2000, 21), make.size(2000, 21), *dims)
    judge_attention(tensors, {"causal": True}, "bf16")


LONG: dict[str, Feature] = {
    "full": lambda make, queries, keys: {},
    "causal": lambda make, queries, keys: {"causal": True},
    "window": lambda make, queries, keys: {"causal": True, "window": (make.size(512, 9), None)},
    "softcap, sinks and dropout": lambda make, queries, keys: {
        "causal": True,
        "softcap": 20.0,
        "sinks": make.normal(2),
        "dropout_p": 0.1,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", LONG)
def test_64k_tokens(feature: str, make: Maker) -> None:
    """Attention of 64k tokens is accurate with two heads of queries over one of keys."""
    tokens, head_dim = make.size(65_536, 37), make.size(128 if feature == "causal" else 64, 8)
    options = LONG[feature](make, tokens, tokens)
    judge_attention(attention_tensors(make, 1, 2, 1, tokens, tokens, head_dim), options, "bf16")


@pytest.mark.parametrize("feature", ["full", "causal", "window"])
def test_64k_packed_tokens(feature: str, make: Maker) -> None:
    """Packed attention of 64k tokens is accurate, also with an empty sequence and one of a single token."""
    lengths = [
        make.size(length, tiny) for length, tiny in ((20_001, 9), (1, 1), (0, 0), (130, 5), (28_000, 20), (17_404, 6))
    ]
    ends = list(accumulate(lengths, initial=0))
    head_dim = make.size(64, 8)
    tensors = [make.normal(ends[-1], heads, head_dim) for heads in (2, 1, 1)]
    judge_attention(tensors, LONG[feature](make, ends[-1], ends[-1]), "bf16", ends)
