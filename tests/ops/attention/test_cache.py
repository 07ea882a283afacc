"""Appending to a cache, contiguous or paged, with rotary embedding: both backends and plain loops in float64 agree."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from accuracy import assert_as_accurate
from einops import rearrange
from hypothesis import given, settings

import fastformer
from fastformer.ops import append_to_cache, attention, decode_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GARBAGE_PAGE = 2**31 - 1


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rotary_tables(positions: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10.0 ** -torch.arange(rotary_dim // 2)
    angles = torch.arange(positions)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(
    x: torch.Tensor, first: int, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Rotate (heads, tokens, head_dim) at positions from `first`, pair by pair, in `dtype`."""
    pairs = cos.shape[1]
    rotated = x.to(dtype, copy=True)
    for pair in range(pairs):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        c, s = (table[first : first + x.shape[1], pair].to(dtype) for table in (cos, sin))
        rotated[..., a] = x[..., a].to(dtype) * c - x[..., b].to(dtype) * s
        rotated[..., b] = x[..., b].to(dtype) * c + x[..., a].to(dtype) * s
    return rotated


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Draw shapes, strides, dtypes, lengths, pages and rotary embeddings."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens, head_dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(2, 40)), draw(st.integers(1, 40))

    def tensor(heads: int, dim: int) -> torch.Tensor:
        layout = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
        if layout == "transposed":
            return torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
        if layout == "sliced":
            return torch.randn(batch, heads, tokens, 2 * dim).to(dtype)[..., ::2]
        if layout == "expanded":
            return torch.randn(1, heads, tokens, dim).to(dtype).expand(batch, -1, -1, -1)
        return torch.randn(batch, heads, tokens, dim).to(dtype)

    new_lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, tokens), min_size=batch, max_size=batch)))
    return {
        "key": tensor(kv_heads, head_dim),
        "value": tensor(kv_heads, value_dim),
        "query": draw(st.sampled_from([None, tensor(kv_heads * group, head_dim)])),
        "lengths": draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)),
        "new_lengths": new_lengths,
        "rotary_dim": 2 * draw(st.integers(1, head_dim // 2)),
        "interleaved": draw(st.booleans()),
        "page_size": draw(st.sampled_from([1, 5, 16])),
    }


@settings(max_examples=25)
@given(call=calls())
def test_any_append_matches_float64(call: dict[str, Any]) -> None:
    check(**call)


def check(
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor | None,
    lengths: list[int],
    new_lengths: list[int] | None,
    rotary_dim: int,
    interleaved: bool,
    page_size: int,
) -> None:
    """Fail unless both backends store the right numbers in the right places of both layouts, and touch nothing else."""
    (batch, kv_heads, tokens, _), capacity = key.shape, 50
    counts = [tokens] * batch if new_lengths is None else new_lengths
    tables = rotary_tables(capacity, rotary_dim)

    def placed(new: torch.Tensor, dtype: torch.dtype, rotated: bool) -> torch.Tensor:
        cache = torch.full((batch, kv_heads, capacity, new.shape[-1]), 7.0, dtype=dtype)
        for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            part = new[sequence, :, :count]
            part = rotate(part, length, *tables, interleaved, dtype) if rotated else part.to(dtype)
            cache[sequence, :, length : length + count] = part
        return cache

    options: dict[str, Any] = {"lengths": int32(lengths), "cos": tables[0], "sin": tables[1]}
    options |= {"query": query, "interleaved": interleaved}
    if new_lengths is not None:
        options["new_lengths"] = int32(new_lengths)
    for backend in ("triton", "torch"):
        for paged in (False, True):
            caches, paging, read = empty_caches(key, value, capacity, page_size if paged else None, lengths, counts)
            with fastformer.backend(backend):
                rotated_query = append_to_cache(key, value, *caches, **options, **paging)
            keys, values = (read(cache) for cache in caches)
            exact = placed(key, torch.float64, rotated=True)
            assert torch.equal(keys == 7.0, exact == 7.0)
            assert_as_accurate(f"{backend} keys", keys, placed(key, key.dtype, rotated=True), exact)
            assert torch.equal(values, placed(value, value.dtype, rotated=False))
            if query is None:
                assert rotated_query is None
                continue
            assert rotated_query is not None
            for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
                part, actual = query[sequence], rotated_query[sequence]
                exact, pytorch = (
                    rotate(part[:, :count], length, *tables, interleaved, dtype) for dtype in (torch.float64, key.dtype)
                )
                assert_as_accurate(f"{backend} query", actual[:, :count], pytorch, exact)
                assert torch.equal(actual[:, count:], part[:, count:])


def empty_caches(
    key: torch.Tensor,
    value: torch.Tensor,
    capacity: int,
    page_size: int | None,
    lengths: list[int],
    counts: list[int],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], Any]:
    """Make two caches of sevens, a block table, and a function: cache -> (batch, kv_heads, capacity, head_dim)."""
    batch, kv_heads = key.shape[:2]
    if page_size is None:
        shape = (batch, capacity, kv_heads)
        return [key.new_full((*shape, t.shape[-1]), 7.0).transpose(1, 2) for t in (key, value)], {}, lambda cache: cache
    per_sequence = -(-capacity // page_size)
    pages = torch.randperm(batch * per_sequence).view(batch, per_sequence)
    table = torch.full((batch, per_sequence), GARBAGE_PAGE, dtype=torch.int32)
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        written = slice(length // page_size, -(-(length + count) // page_size))
        table[sequence, written] = pages[sequence, written].to(torch.int32)
    caches = [key.new_full((pages.numel(), page_size, kv_heads, t.shape[-1]), 7.0) for t in (key, value)]
    contiguous = "batch pages slots heads dim -> batch heads (pages slots) dim"
    return caches, {"block_table": table}, lambda cache: rearrange(cache[pages], contiguous)[:, :, :capacity]


@pytest.mark.quick
@pytest.mark.parametrize("paged", [False, True])
def test_generation_is_causal_attention(backend: str, paged: bool) -> None:
    """A padded prompt, then steps of one or several tokens, give the rows of attention over whole sequences."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    cos, sin = rotary_tables(24, 8)
    whole_q, whole_k = (torch.stack([rotate(x, 0, cos, sin, False, x.dtype) for x in t]) for t in (q, k))
    whole = attention(whole_q, whole_k, v, causal=True)
    assert isinstance(whole, torch.Tensor)
    caches, paging, _ = empty_caches(k, v, 24, 16 if paged else None, [0, 0], [24, 24])
    lengths = int32([0, 0])
    for step in ([9, 4], [1, 1], [3, 5], [1, 1]):
        starts, new = lengths.tolist(), int32(step)
        tokens = torch.stack([torch.arange(start, start + max(step)) for start in starts]).clamp(max=23)
        some_q, some_k, some_v = (torch.stack([x[b][:, tokens[b]] for b in range(2)]) for x in (q, k, v))
        rotated = append_to_cache(
            some_k, some_v, *caches, lengths=lengths, new_lengths=new, query=some_q, cos=cos, sin=sin, **paging
        )
        assert rotated is not None
        lengths = lengths + new
        output = decode_attention(rotated, *caches, lengths=lengths, query_lengths=new, **paging)
        assert isinstance(output, torch.Tensor)
        for b, (start, count) in enumerate(zip(starts, step, strict=True)):
            torch.testing.assert_close(output[b, :, :count], whole[b, :, start : start + count])


@pytest.mark.parametrize(("head_dim", "value_dim"), [(4, 6), (576, 512)])
def test_without_rotary_embedding(backend: str, head_dim: int, value_dim: int) -> None:
    key, value = torch.randn(2, 1, 2, head_dim), torch.randn(2, 1, 2, value_dim)
    key_cache, value_cache = torch.zeros(2, 1, 5, head_dim), torch.zeros(2, 1, 5, value_dim)
    assert append_to_cache(key, value, key_cache, value_cache, lengths=int32([3, 0])) is None
    assert torch.equal(key_cache[0, :, 3:], key[0]) and torch.equal(value_cache[1, :, :2], value[1])
    assert not key_cache[0, :, :3].any() and not value_cache[1, :, 2:].any()


def test_empty(backend: str) -> None:
    cache = torch.zeros(2, 1, 5, 4)
    append_to_cache(cache[:, :, :0], cache[:, :, :0], cache, cache.clone(), lengths=int32([5, 0]))
    append_to_cache(cache[:0], cache[:0], cache[:0], cache[:0], lengths=int32([]))
    assert not cache.any()


def test_registration(backend: str) -> None:
    key, query = torch.randn(2, 2, 3, 8), torch.randn(2, 4, 3, 8)
    caches, paging, _ = empty_caches(key, key, 20, 16, [4, 0], [3, 3])
    tables = rotary_tables(20, 6)
    for table, q, rotary in ((paging["block_table"], query, tables), (None, None, (None, None))):
        targets = caches if table is not None else [torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 8)]
        arguments = (key, key, *targets, q, int32([4, 0]), None, table, *rotary, False)
        torch.library.opcheck(torch.ops.fastformer.append_to_cache.default, arguments)


def test_compiles_without_graph_break() -> None:
    def step(query: torch.Tensor, key: torch.Tensor, caches: list[torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        rotated = append_to_cache(key, key, *caches, lengths=lengths, query=query, cos=cos, sin=sin)
        assert rotated is not None
        return decode_attention(rotated, *caches, lengths=lengths + key.shape[2])  # type: ignore[return-value]

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    cos, sin = rotary_tables(40, 8)
    for tokens, capacity in ((2, 20), (3, 31)):
        query, key = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
        caches, compiled_caches = ([torch.ones(2, 2, capacity, 8) for _ in range(2)] for _ in range(2))
        lengths = int32([capacity - 5, 4])
        torch.testing.assert_close(compiled(query, key, compiled_caches, lengths), step(query, key, caches, lengths))
        torch.testing.assert_close(compiled_caches, caches)


def test_refuses_gradients() -> None:
    key, cache = torch.zeros(1, 1, 1, 4, requires_grad=True), torch.zeros(1, 1, 5, 4)
    with pytest.raises(RuntimeError, match="append_to_cache has no gradient"):
        append_to_cache(key, key, cache, cache.clone(), lengths=int32([0]))


K, CACHE, LENGTHS = torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 9, 8), torch.tensor([6, 0], dtype=torch.int32)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
COS = torch.zeros(20, 4)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ((K.double(), K, CACHE, CACHE), {}, TypeError, "key must be float32, float16 or bfloat16"),
        ((K[0], K, CACHE, CACHE), {}, ValueError, r"key must be \(batch, kv_heads, tokens, head_dim\)"),
        ((K, K[:, :, :2], CACHE, CACHE), {}, ValueError, "key and value must agree"),
        ((K, K, CACHE.half(), CACHE), {}, TypeError, "key_cache must have key's dtype"),
        (
            (K, K, CACHE, CACHE[:, :1]),
            {},
            ValueError,
            "value_cache must have value's kv_heads and head_dim, 2 and 8; got 1",
        ),
        ((K, K, CACHE, CACHE[:, :, :8]), {}, ValueError, "key_cache and value_cache must agree"),
        ((K, K, CACHE[:1].expand(2, -1, -1, -1), CACHE), {}, ValueError, "key_cache is written to"),
        (
            (K, K, CACHE, CACHE),
            {"lengths": LENGTHS + 1},
            ValueError,
            r"lengths plus the new tokens .*capacity, 9; got \[10, 4\]",
        ),
        ((K, K, CACHE, CACHE), {"lengths": LENGTHS - 1}, ValueError, r"lengths must be from 0 .*got \[5, -1\]"),
        (
            (K, K, CACHE, CACHE),
            {"new_lengths": LENGTHS},
            ValueError,
            "new_lengths must be from 0 to the number of tokens, 3",
        ),
        ((K, K, CACHE, CACHE), {"block_table": TABLE.long()}, TypeError, "block_table must be int32"),
        ((K, K, CACHE, CACHE), {"cos": COS}, ValueError, "cos and sin must be given together"),
        ((K, K, CACHE, CACHE), {"query": K}, ValueError, "query was given without cos and sin"),
        ((K, K, CACHE, CACHE), {"cos": COS, "sin": COS.double()}, TypeError, "sin must be float32"),
        ((K, K, CACHE, CACHE), {"cos": COS, "sin": COS[:5]}, ValueError, r"sin must have shape \(20, 4\)"),
        ((K, K, CACHE, CACHE), {"cos": COS[:8], "sin": COS[:8]}, ValueError, "to the positions of cos and sin, 8"),
        (
            (K, K, CACHE, CACHE),
            {"cos": torch.zeros(20, 5), "sin": torch.zeros(20, 5)},
            ValueError,
            r"rotary_dim from 2 to head_dim, 8; got shape \(20, 5\)",
        ),
        ((K, K, CACHE, CACHE), {"cos": COS, "sin": COS, "query": K[:, :, :2]}, ValueError, "query must have shape"),
    ],
)
def test_refuses_what_it_cannot_do(tensors: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        append_to_cache(*tensors, **{"lengths": LENGTHS, **options})


@pytest.mark.cpu
@pytest.mark.parametrize(
    "expanded", [subset for size in range(1, 5) for subset in combinations(range(4), size)], ids=str
)
@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_a_cache_whose_elements_share_memory_is_refused(name: str, expanded: tuple[int, ...]) -> None:
    shape = CACHE.shape
    shared = torch.zeros([1 if d in expanded else size for d, size in enumerate(shape)]).expand(shape)
    caches = {"key_cache": CACHE, "value_cache": CACHE, name: shared}
    with pytest.raises(ValueError, match=f"{name} is written to, so its elements must not share memory"):
        append_to_cache(K, K, **caches, lengths=LENGTHS)
