"""Decode attention: both backends and float64 agree for caches, features, lengths, strides and splits of any kind."""

from __future__ import annotations

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings

import fastformer
from fastformer.ops import attention, decode_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GARBAGE_PAGE = 2**31 - 1


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pages_of(cache: torch.Tensor, lengths: list[int], page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same keys in shuffled pages, and their block table, with garbage wherever there is no key."""
    batch, kv_heads, capacity, head_dim = cache.shape
    per_sequence = -(-capacity // page_size)
    torch.manual_seed(per_sequence)
    table = torch.randperm(batch * per_sequence + 2)[: batch * per_sequence].view(batch, per_sequence)
    pages = cache.new_full((batch * per_sequence + 2, page_size, kv_heads, head_dim), float("nan"))
    for sequence, length in enumerate(lengths):
        for position in range(length):
            pages[table[sequence, position // page_size], position % page_size] = cache[sequence, :, position]
        table[sequence, -(-length // page_size) :] = GARBAGE_PAGE
    return pages, table.to(torch.int32)


def expected(
    tensors: list[torch.Tensor],
    lengths: list[int],
    query_lengths: list[int],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in `dtype`, computed for each sequence alone; padding queries give zeros."""
    query, key, value = tensors
    outputs, lses = [], []
    for sequence, (length, queries) in enumerate(zip(lengths, query_lengths, strict=True)):
        part = slice(sequence, sequence + 1)
        output = torch.zeros(1, *query.shape[1:3], value.shape[-1], dtype=dtype)
        lse = torch.full((1, *query.shape[1:3]), float("-inf"), dtype=dtype)
        alone = {
            name: as_dtype(option[sequence] if name == "alibi_slopes" and option.dim() == 2 else option, dtype)
            for name, option in options.items()
        }
        output[:, :, :queries], lse[:, :, :queries] = reference.attention(
            query[part, :, :queries].to(dtype),
            key[part, :, :length].to(dtype),
            value[part, :, :length].to(dtype),
            **alone,
        )
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


def as_dtype(option: Any, dtype: torch.dtype) -> Any:
    return option.to(dtype) if isinstance(option, torch.Tensor) else option


def check(
    tensors: list[torch.Tensor],
    lengths: list[int],
    options: dict[str, Any],
    *,
    query_lengths: list[int] | None = None,
    splits: int | None = None,
    page_size: int = 16,
) -> None:
    """Fail unless both backends obey the rule of accuracy on this call, with both layouts of the cache."""
    query, key, value = tensors
    options = {"causal": True, **options}
    counts = [query.shape[2]] * query.shape[0] if query_lengths is None else query_lengths
    exact, exact_lse = expected(tensors, lengths, counts, options, torch.float64)
    pytorch, pytorch_lse = expected(tensors, lengths, counts, options, query.dtype)
    finite = torch.isfinite(exact_lse)
    # As in the tests of attention: a float32 exponent errs by a unit of its magnitude, a sum of n terms by sqrt(n).
    largest = max([1.0, *exact_lse[finite].abs().tolist()])
    unit = (1.0 + largest) * max(key.shape) ** 0.5 if query.dtype == torch.float32 else 1.0
    key_pages, table = pages_of(key, lengths, page_size)
    value_pages, _ = pages_of(value, lengths, page_size)
    given = {**options, "lengths": int32(lengths), "splits": splits, "return_lse": True}
    if query_lengths is not None:
        given["query_lengths"] = int32(query_lengths)
    for backend in ("triton", "torch"):
        with fastformer.backend(backend):
            for layout, caches, paging in (
                ("contiguous", (key, value), {}),
                ("paged", (key_pages, value_pages), {"block_table": table}),
            ):
                output, lse = decode_attention(query, *caches, **given, **paging)
                name = f"{backend} {layout}"
                assert torch.equal(torch.isfinite(lse), finite), f"{name}: rows without keys differ"
                magnitude = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
                assert_as_accurate(f"{name} output", output, pytorch, exact, scale=unit * magnitude)
                wide = pytorch_lse[finite].float()
                assert_as_accurate(f"{name} lse", lse[finite], wide, exact_lse[finite], scale=unit * largest)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (60, None), "softcap": 5.0}])
def test_block_masks(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """Rows and columns of a block mask are positions; queries may lie in two tiles of it, or before its first row."""
    torch.manual_seed(0)
    capacity, lengths, queries = 288, [131, 280, 2], 4
    mask = torch.rand(*shape, capacity, capacity) > 0.5
    mask[:, :, :, 128:256] = False
    mask[:, :, 128:, :128] = True
    mask[0, 0, 279] = False
    tensors = [torch.randn(3, heads, size, 16) for heads, size in ((4, queries), (2, capacity), (2, capacity))]
    key, value = tensors[1:]
    block_mask = fastformer.BlockMask.from_mask(mask)
    exact = {torch.float64: [], torch.float32: []}
    for sequence, length in enumerate(lengths):
        rows = torch.arange(length - queries, length)
        part = mask[sequence % shape[0], :, rows.clamp(min=0), :length].masked_fill(rows[:, None] < 0, False)
        dense = part.repeat_interleave(4 // shape[1], 0)[None]
        for dtype, results in exact.items():
            alone = [
                tensor[sequence : sequence + 1, :, :size].to(dtype)
                for tensor, size in zip(tensors, (queries, length, length), strict=True)
            ]
            results.append(reference.attention(*alone, mask=dense, **{"causal": True, **options}))
    (wanted, wanted_lse), (pytorch, _) = (
        [torch.cat(each) for each in zip(*results, strict=True)] for results in exact.values()
    )
    key_pages, table = pages_of(key, lengths, 16)
    value_pages, _ = pages_of(value, lengths, 16)
    for backend in ("triton", "torch"):
        for caches, paging in (((key, value), {}), ((key_pages, value_pages), {"block_table": table})):
            for splits in (1, 3):
                with fastformer.backend(backend):
                    output, lse = decode_attention(
                        tensors[0],
                        *caches,
                        lengths=int32(lengths),
                        mask=block_mask,
                        splits=splits,
                        return_lse=True,
                        **options,
                        **paging,
                    )
                assert torch.equal(torch.isfinite(lse), torch.isfinite(wanted_lse))
                assert_as_accurate(f"{backend} {splits}", output, pytorch, wanted, scale=2 * capacity**0.5)


def test_a_mask_of_other_sizes_is_refused() -> None:
    query, cache = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 20, 8)
    mask = fastformer.BlockMask.from_mask(torch.ones(1, 2, 20, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must have the sizes .* of \(1, 1, 20, 20\); got \(1, 2, 20, 20\)"):
        decode_attention(query, cache, cache, lengths=int32([3]), mask=mask)
    with pytest.raises(TypeError, match=r"mask must be a fastformer.BlockMask .*; got torch.Tensor"):
        decode_attention(query, cache, cache, lengths=int32([3]), mask=torch.ones(20, 20, dtype=torch.bool))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a whole call: shapes, strides, dtypes, lengths, pages, splits and any subset of the features."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    queries, capacity = draw(st.integers(1, 7)), draw(st.integers(1, 90))
    head_dim, value_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    heads = kv_heads * group

    def tensor(*shape: int) -> torch.Tensor:
        layout = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
        if layout == "transposed":
            return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
        if layout == "sliced":
            return torch.randn(*shape[:-1], shape[-1] * 2).to(dtype)[..., ::2]
        if layout == "expanded":
            return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
        return torch.randn(shape).to(dtype)

    extent = st.one_of(st.none(), st.integers(0, 40))
    features: dict[str, Any] = {
        "causal": lambda: False,
        "window": lambda: (draw(extent), draw(extent)),
        "scale": lambda: draw(st.sampled_from([0.5, -0.3, 0.0])),
        "softcap": lambda: draw(st.sampled_from([1.0, 30.0])),
        "alibi_slopes": lambda: torch.rand((batch, heads) if draw(st.booleans()) else (heads,)) * 0.2,
        "sinks": lambda: torch.randn(heads),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(features)), unique=True))
    query_lengths = st.lists(st.integers(0, queries), min_size=batch, max_size=batch)
    return {
        "tensors": [
            tensor(batch, heads, queries, head_dim),
            tensor(batch, kv_heads, capacity, head_dim),
            tensor(batch, kv_heads, capacity, value_dim),
        ],
        "lengths": draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch)),
        "options": {name: features[name]() for name in chosen},
        "query_lengths": draw(st.one_of(st.none(), query_lengths)),
        "splits": draw(st.sampled_from([None, 1, 2, 7])),
        "page_size": draw(st.sampled_from([1, 5, 16, 32])),
    }


# Shrinking would interpret kernels for many minutes; the failing call is printed whole.
@settings(max_examples=40)
@given(call=calls())
def test_any_combination_matches_float64(call: dict[str, Any]) -> None:
    check(**call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3, 12])
def test_splits_do_not_matter(splits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, size, 16).to(dtype) for heads, size in ((3, 4), (1, 150), (1, 150))]
    check(tensors, [150, 37], {"sinks": torch.randn(3)}, splits=splits)


# Keys that one tile holds, and keys that are split between two tiles.
@pytest.mark.parametrize("head_dim", [16, 33, 48, 49, 96, 257, 320, 512, 576])
def test_keys_of_any_width(head_dim: int) -> None:
    torch.manual_seed(0)
    value_dim = min(head_dim, 512)
    tensors = [torch.randn(1, heads, size, dim) for heads, size, dim in ((3, 2, head_dim), (1, 35, head_dim))]
    check([*tensors, torch.randn(1, 1, 35, value_dim)], [35], {"softcap": 20.0}, splits=2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("paged", [False, True])
def test_values_are_the_first_columns_of_the_keys(backend: str, paged: bool) -> None:
    """Absorbed multi-head latent attention: the cache of values is a view of that of the keys."""
    torch.manual_seed(0)
    query, keys, lengths = torch.randn(2, 5, 1, 576), torch.randn(2, 1, 40, 576), [40, 19]
    cache, table = pages_of(keys, lengths, 16) if paged else (keys, None)
    values = cache[..., :512]
    with fastformer.backend(backend):
        output = decode_attention(query, cache, values, lengths=int32(lengths), block_table=table)
    exact, _ = expected([query, keys, keys[..., :512]], lengths, [1, 1], {"causal": True}, torch.float64)
    torch.testing.assert_close(output, exact.float())
    assert not values.is_contiguous()


def test_more_rows_than_a_tile_holds() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, size, 8) for heads, size in ((6, 11), (2, 50), (2, 50))]
    check(tensors, [50], {"window": (9, None)}, splits=2)


@pytest.mark.quick
def test_speculative_tokens_are_the_last_rows_of_causal_attention(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    whole = attention(q, k, v, causal=True)
    last = decode_attention(q[:, :, -5:], k, v, lengths=int32([40, 40]))
    assert isinstance(whole, torch.Tensor)
    torch.testing.assert_close(last, whole[:, :, -5:])


def test_pages_outside_the_window_may_be_gone(backend: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 100, 8)
    pages, table = pages_of(k, [100], 16)
    options: dict[str, Any] = {"lengths": int32([100]), "window": (20, None)}
    kept = decode_attention(q, pages, pages, block_table=table, **options)
    table[:, : (100 - 21) // 16] = GARBAGE_PAGE
    torch.testing.assert_close(decode_attention(q, pages, pages, block_table=table, **options), kept)
    torch.testing.assert_close(decode_attention(q, k, k, **options), kept)


@pytest.mark.cpu
@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_pages_taken_together_or_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU pages give the same in any chunks, for four query heads on two kv heads and one or several sequences."""
    monkeypatch.setattr(importlib.import_module("fastformer.ops.attention.decode"), "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    for lengths in ([37], [37, 0, 37, 5]):
        q, k = torch.randn(len(lengths), 4, 2, 8), torch.randn(len(lengths), 2, 40, 8)
        pages, table = pages_of(k, lengths, 16)
        options: dict[str, Any] = {"lengths": int32(lengths), "causal": False, "return_lse": True}
        expected = decode_attention(q, k, k, **options)
        torch.testing.assert_close(decode_attention(q, pages, pages, block_table=table, **options), expected)


@pytest.mark.cpu
@pytest.mark.parametrize(("key_step", "value_step"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_caches_with_any_stride_within_a_token(key_step: int, value_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided caches are right: PyTorch's flash attention gets only those whose elements are next to each other."""
    module = importlib.import_module("fastformer.ops.attention.decode")
    flash, called = module._decode_flash, []
    monkeypatch.setattr(module, "_decode_flash", lambda *arguments: called.append(1) or flash(*arguments))
    torch.manual_seed(0)
    q, keys, values = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    k, v = keys[..., : 8 * key_step : key_step], values[..., : 8 * value_step : value_step]
    lengths = int32([40, 17])
    actual = decode_attention(q, k, v, lengths=lengths)
    assert bool(called) == (key_step == value_step == 1)
    expected = reference.attention(*(each.double() for each in (q, k, v)), key_lengths=lengths)[0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_capacity_costs_nothing(backend: str) -> None:
    q = torch.randn(2, 2, 1, 8)
    endless = torch.randn(1, 1, 1, 8).expand(2, 2, 2**33, 8)
    output = decode_attention(q, endless, endless, lengths=int32([5, 17]), splits=1)
    torch.testing.assert_close(output, endless[:, :, :1])


def test_what_lies_beyond_a_length_is_never_used(backend: str) -> None:
    k = torch.full((2, 1, 40, 8), float("nan"))
    k[0, :, :20] = 1.0
    output, lse = decode_attention(torch.ones(2, 1, 1, 8), k, k, lengths=int32([20, 0]), return_lse=True)
    assert torch.equal(output[:, 0, 0, 0], torch.tensor([1.0, 0.0]))
    assert lse[1] == float("-inf")


def test_nan_in_nan_out(backend: str) -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 40, 8)
    q[0, 0, 1] = float("nan")
    output = decode_attention(q, k, k, lengths=int32([40]), splits=3)
    assert output.isnan().all(-1).tolist() == [[[False, True, False], [False] * 3]]


@pytest.mark.parametrize("shape", [(0, 2, 1, 8), (2, 2, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    cache = torch.randn(shape[0], 2, 5, 8)
    output, lse = decode_attention(
        torch.randn(shape), cache, cache, lengths=torch.zeros(shape[0], dtype=torch.int32), return_lse=True
    )
    assert output.shape == shape and lse.shape == shape[:-1]


def test_one_split_launches_no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels.attention import decode

    launched, merge_launch = [], decode.merge_launch

    def watch(*tensors: torch.Tensor) -> Any:
        launched.append(tensors)
        return merge_launch(*tensors)

    monkeypatch.setattr(decode, "merge_launch", watch)
    cache = torch.randn(1, 1, 100, 8)
    with fastformer.backend("triton"):
        for splits in (1, 2):
            decode_attention(torch.randn(1, 1, 1, 8), cache, cache, lengths=int32([100]), splits=splits)
    assert len(launched) == 1


def test_splits_fill_one_wave_of_the_device() -> None:
    from fastformer_kernels.attention.decode import choose_splits, decode_configuration
    from fastformer_kernels.launch import ARCHITECTURES, target_architecture

    q = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16)
    with target_architecture("sm_90"):
        configuration = decode_configuration(q, q, paged=False)
        multiprocessors = ARCHITECTURES["sm_90"].multiprocessors
        for programs in (1, 8, 100, 1000):
            splits = choose_splits(programs, 2**20, configuration, q)
            assert splits == 1 or multiprocessors < programs * splits <= 2 * multiprocessors or splits == 128
        assert choose_splits(1, configuration.block_n, configuration, q) == 1
        assert choose_splits(1, 2**20, configuration, q) > choose_splits(1, 2048, configuration, q) > 1


ARGUMENTS = (None, None, None, None, None, None, 0.3, -1, 0, 0.0, 2)


def test_registration(backend: str) -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 20, 8)
    torch.library.opcheck(torch.ops.fastformer.decode_attention.default, (q, k, k, int32([20, 3]), *ARGUMENTS))
    pages, table = pages_of(k, [20, 3], 16)
    arguments = (q, pages, pages, int32([20, 3]), int32([2, 3]), table, *ARGUMENTS[2:])
    torch.library.opcheck(torch.ops.fastformer.decode_attention.default, arguments)


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(decode_attention, fullgraph=True, dynamic=True)
    for capacity, queries in ((9, 2), (21, 3)):
        q, k = torch.randn(2, 4, queries, 8), torch.randn(2, 2, capacity, 8)
        lengths = int32([capacity, capacity - 3])
        torch.testing.assert_close(compiled(q, k, k, lengths=lengths), decode_attention(q, k, k, lengths=lengths))


def test_autocast(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 20, 8).bfloat16()
    plain = decode_attention(q.bfloat16(), k, k, lengths=int32([20]))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(decode_attention(q, k, k, lengths=int32([20])), plain)


def test_refuses_gradients() -> None:
    q, k = torch.randn(1, 1, 1, 8, requires_grad=True), torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match=r"decode_attention has no gradient.*fastformer\.attention"):
        decode_attention(q, k, k, lengths=int32([4]))
    with torch.no_grad():
        decode_attention(q, k, k, lengths=int32([4]))


Q, K, LENGTHS = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 5, 8), torch.tensor([5, 2], dtype=torch.int32)
TABLE = torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ((Q.double(), K, K), {}, TypeError, "query must be float32, float16 or bfloat16"),
        ((Q[0], K, K), {}, ValueError, r"query must be \(batch, heads, queries, head_dim\); got shape \(4, 1, 8\)"),
        ((Q, K.half(), K), {}, TypeError, "key_cache must have query's dtype"),
        ((Q, K[0], K), {}, ValueError, r"key_cache must be \(batch, kv_heads, capacity, head_dim\)"),
        (
            (Q, K[0], K),
            {"block_table": TABLE},
            ValueError,
            r"key_cache must be \(pages, page_size, kv_heads, head_dim\)",
        ),
        ((Q, K[:1], K[:1]), {}, ValueError, "key_cache must have query's batch size, 2; got 1"),
        ((Q, K, K[:, :, :4]), {}, ValueError, "key_cache and value_cache must agree"),
        ((Q, K[..., :4], K), {}, ValueError, "same head_dim; got 8 and 4"),
        ((torch.zeros(1, 1, 1, 577),) * 3, {}, ValueError, "key_cache's head_dim must be from 1 to 576; got 577"),
        (
            (Q, K, torch.zeros(2, 2, 5, 513)),
            {},
            ValueError,
            "value_cache's head_dim must be from 1 to 512; got 513",
        ),
        ((Q[:, :3], K, K), {}, ValueError, "heads must be a multiple of key_cache's; got 3 and 2"),
        ((Q, K, K), {"lengths": LENGTHS.long()}, TypeError, "lengths must be int32"),
        ((Q, K, K), {"lengths": LENGTHS[:1]}, ValueError, r"lengths must have shape \(2,\)"),
        (
            (Q, K, K),
            {"lengths": LENGTHS + 1},
            ValueError,
            r"lengths must be from 0 to the cache's capacity, 5; got \[6, 3\]",
        ),
        ((Q, K, K), {"lengths": LENGTHS - 3}, ValueError, r"lengths must be from 0 to .*got \[2, -1\]"),
        ((Q, K, K), {"query_lengths": LENGTHS}, ValueError, "query_lengths must be from 0 to the number of queries, 1"),
        ((Q, K, K), {"block_table": TABLE.long()}, TypeError, "block_table must be int32"),
        ((Q, K, K), {"block_table": TABLE[0]}, ValueError, r"block_table must be \(batch, max_pages\)"),
        ((Q, K, K), {"window": (-1, None)}, ValueError, "window's left extent"),
        ((Q, K, K), {"softcap": -1.0}, ValueError, "softcap must be positive"),
        ((Q, K, K), {"splits": 0}, ValueError, "splits must be at least 1"),
        ((Q, K, K), {"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
    ],
)
def test_refuses_what_it_cannot_do(tensors: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        decode_attention(*tensors, **{"lengths": LENGTHS, **options})


def test_any_strides_of_a_query(backend: str) -> None:
    torch.manual_seed(0)
    query, cache = torch.randn(2, 8, 4, 1).permute(0, 2, 3, 1), torch.randn(2, 2, 9, 8)
    for q in (query, query[:, :1, :, :1].expand(2, 4, 1, 8)):
        found = decode_attention(q, cache, cache, lengths=int32([9, 4]))
        torch.testing.assert_close(found, decode_attention(q.contiguous(), cache, cache, lengths=int32([9, 4])))
