"""Attention weights on demand are those of the float64 reference, for any heads and rows."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from accuracy import assert_as_accurate
from devices import here

from fastformer.ops import attention, attention_weights

FEATURES: list[dict[str, Any]] = [
    {},
    {"causal": True, "softcap": 3.0},
    {"window": (5, 3), "bias": torch.linspace(-1, 1, 4)[:, None, None]},
    {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "chunk": 7},
    {
        "relative_bias": torch.linspace(-1, 1, 4 * 11).view(4, 11),
        "key_lengths": torch.tensor([9, 23], dtype=torch.int32),
    },
]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, size, 8).to(dtype) for heads, size in ((4, 21), (2, 23), (2, 23)))


@pytest.mark.parametrize("options", FEATURES, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_reference_s(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    query, key, value = tensors(dtype)
    options = here(options)
    _, lse = attention(query, key, value, return_lse=True, **options)
    heads, rows = [3, 0], [0, 20, 7]
    actual = attention_weights(query, key, lse, heads=heads, rows=rows, **options)
    identity = torch.eye(23, dtype=torch.float64).expand(2, 2, 23, 23)

    def weights(dtype: torch.dtype) -> torch.Tensor:
        plain = {
            n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in options.items()
        }
        every, _ = reference.attention(query.to(dtype), key.to(dtype), identity.to(dtype), **plain)
        return every[:, heads][:, :, rows]

    assert_as_accurate(
        "weights", actual, weights(dtype), weights(torch.float64), scale=1.0 + lse[lse.isfinite()].abs().max().item()
    )


@pytest.mark.quick
def test_packed_sequences_have_zeros_beyond_their_ends(backend: str) -> None:
    torch.manual_seed(0)
    lengths = [3, 0, 18]
    cu_seqlens = torch.tensor([0, 3, 3, 21], dtype=torch.int32)
    query, key = torch.randn(21, 2, 8), torch.randn(21, 2, 8)
    packing = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": 18}
    _, lse = attention(query, key, key, return_lse=True, causal=True, **packing)
    weights = attention_weights(query, key, lse, causal=True, **packing)
    assert weights.shape == (3, 2, 18, 18)
    start = 0
    for sequence, length in zip(weights, lengths, strict=True):
        q, k = (t[start : start + length].transpose(0, 1)[None].double() for t in (query, key))
        alone, _ = reference.attention(
            q, k, torch.eye(length, dtype=torch.float64).expand(1, 2, length, length), causal=True
        )
        torch.testing.assert_close(sequence[:, :length, :length], alone[0].float())
        assert not sequence[:, length:].any() and not sequence[:, :, length:].any()
        start += length


def test_sinks_take_their_share(backend: str) -> None:
    query, key, value = tensors()
    _, lse = attention(query, key, value, sinks=torch.full((4,), 2.0), return_lse=True)
    _, without = attention(query, key, value, return_lse=True)
    rows = attention_weights(query, key, lse).sum(-1)
    torch.testing.assert_close(rows, torch.exp(without - lse))


def test_registration(backend: str) -> None:
    query, key, value = tensors()
    _, lse = attention(query, key, value, return_lse=True)
    compiled = torch.compile(attention_weights, fullgraph=True)
    torch.testing.assert_close(compiled(query, key, lse), attention_weights(query, key, lse))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": [4]}, IndexError, "heads must be from 0 to 3; got 4"),
        ({"rows": [-1]}, IndexError, "rows must be from 0 to 20; got -1"),
        ({"lse": torch.zeros(2, 4, 3)}, ValueError, r"lse must have shape \(2, 4, 21\)"),
        ({"lse": torch.zeros(2, 4, 21).half()}, TypeError, "lse must be float32"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key, _ = tensors()
    with pytest.raises(error, match=message):
        attention_weights(query, key, **{"lse": torch.zeros(2, 4, 21), **options})
