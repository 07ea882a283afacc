"""Attention: both backends are compared with the float64 reference, with features in any combination."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from attention_accuracy import as_dtype, magnitudes, result_names, run
from devices import here
from fastformer_kernels.attention import launch
from fastformer_kernels.configurations import forced
from fastformer_kernels.constants import LOG2_E
from hypothesis import given, seed, settings

import fastformer
import fastformer.nn
from fastformer.ops import attention, scaled_dot_product_attention
from fastformer.ops import attention as attention_function
from fastformer.ops.attention.attention import checked_arguments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GPU = torch.cuda.is_available()
# Twice the error of the log-sum-exp of PyTorch's 16-bit kernel on a CPU, whose exponentials have 14 bits.
FLASH_LSE = 1.2e-4


def check(tensors: list[torch.Tensor], options: dict[str, Any], dropout_seed: int = 0) -> None:
    """Fail unless both backends obey the rule of accuracy on this call."""
    query, _, value = tensors
    weights = [torch.randn(*query.shape[:-1], value.shape[-1]), torch.randn(query.shape[:-1])]
    plain = dict(options)
    if "dropout_p" in options:
        torch.manual_seed(dropout_seed)
        state = torch.randint(0, 2**63 - 1, (2,)).tolist()
        plain["keep"] = reference.dropout_keep(*state, options["dropout_p"], (*query.shape[:3], tensors[1].shape[2]))
    exact = run(reference.attention, [t.double() for t in tensors], as_dtype(plain, torch.float64), weights)
    pytorch = run(reference.attention, tensors, as_dtype(plain, query.dtype), weights)
    # The log-sum-exp is float32 for any dtype, and must be as accurate as float32.
    pytorch[1] = reference.attention(*(t.float() for t in tensors), **as_dtype(plain, torch.float32))[1]
    names = result_names(options)
    wanted = dict(zip(names, exact, strict=True))
    for backend in ("triton", "torch"):
        torch.manual_seed(dropout_seed)
        with fastformer.backend(backend):
            actual = dict(zip(names, run(with_lse, tensors, options, weights), strict=True))
        scales = magnitudes(actual, wanted, weights[0], tensors, options)
        if backend == "torch" and query.dtype != torch.float32:
            scales["lse"] = max(scales["lse"], FLASH_LSE / torch.finfo(torch.float32).eps)
        for name, p in zip(names, pytorch, strict=True):
            a, e = actual[name], wanted[name]
            assert torch.equal(torch.isfinite(a), torch.isfinite(e)), f"{backend} {name}: infinities differ"
            finite = torch.isfinite(e)
            assert_as_accurate(f"{backend} {name}", a[finite], p[finite].to(a.dtype), e[finite], scale=scales[name])


def with_lse(*tensors: torch.Tensor, **options: Any) -> Any:
    return attention_function(*tensors, return_lse=True, **options)


# Lengths around the borders of the interpreter's tiles, 16 queries and 16 keys, and extents of up to two tiles.
LENGTHS = [15, 16, 17, 32, 33]
EXTENTS = st.integers(0, 33)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Draw a whole call: shapes, strides, dtypes and any subset of the features, often at the borders of tiles."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3), (1, 2, 2), (2, 2, 3)]))
    queries, keys = draw(st.sampled_from(LENGTHS) | st.integers(1, 36)), draw(st.sampled_from(LENGTHS) | EXTENTS)
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

    def broadcast() -> tuple[int, ...]:
        return tuple(draw(st.sampled_from([1, size])) for size in (batch, heads, queries, keys))

    tensors = [
        tensor(batch, heads, queries, head_dim),
        tensor(batch, kv_heads, keys, head_dim),
        tensor(batch, kv_heads, keys, value_dim),
    ]
    features: dict[str, Any] = {
        "mask": lambda: torch.rand(broadcast()) > 0.3,
        "bias": lambda: torch.randn(broadcast()).to(dtype),
        "causal": lambda: True,
        "window": lambda: (
            draw(st.one_of(st.none(), EXTENTS)),
            draw(st.one_of(st.none(), EXTENTS)),
        ),
        "alignment": lambda: "top_left",
        "scale": lambda: draw(st.sampled_from([0.5, -0.3, 0.0, torch.rand(heads) - 0.3])),
        "softcap": lambda: draw(st.sampled_from([1.0, 30.0])),
        "relative_bias": lambda: torch.randn(heads, 2 * draw(EXTENTS) + 1).to(dtype),
        "chunk": lambda: draw(EXTENTS.filter(bool)),
        "prefix_lengths": lambda: torch.randint(0, keys + 1, (batch,), dtype=torch.int32),
        "alibi_slopes": lambda: torch.rand((batch, heads) if draw(st.booleans()) else (heads,)) * 0.2,
        "sinks": lambda: torch.randn(heads),
        "key_lengths": lambda: torch.randint(0, keys + 1, (batch,), dtype=torch.int32),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(features)), unique=True, max_size=5))
    if "prefix_lengths" in chosen and "window" not in chosen:
        chosen.append("causal")
    options = {name: features[name]() for name in chosen}
    if "prefix_lengths" in chosen and options.get("causal") is None and options["window"][1] is None:
        options["causal"] = True
    return tensors, options


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, launch.AttentionConfiguration]:
    """Draw a way to walk over tiles, and the sizes of the tiles."""
    sizes, switches = st.sampled_from([16, 32]), st.booleans()
    return {
        operation: dataclasses.replace(
            launch._INTERPRETER,
            block_m=draw(sizes),
            block_n=draw(sizes),
            one_loop=draw(switches),
            two_kernels=draw(switches),
            lazy_rescale=draw(switches),
        )
        for operation in ("attention_forward", "attention_backward", "attention_query_gradient")
    }


# The first example of each part is its simplest.
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_any_combination_matches_float64(part: int, request: pytest.FixtureRequest) -> None:
    """Any combination of features obeys the rule of accuracy; `pytest --cases N` draws N of them in all."""
    cases = -(-request.config.getoption("cases") // PARTS)

    @seed(part)
    @settings(max_examples=cases)
    @given(call=calls(), tiles=st.just({}) if GPU else configurations())
    def obeys_the_rule(call: tuple[list[torch.Tensor], dict[str, Any]], tiles: dict[str, Any]) -> None:
        with forced(tiles):
            check(*call)

    obeys_the_rule()


BORDERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "left": lambda extent: {"window": (extent, None)},
    "right": lambda extent: {"window": (None, extent)},
    "both": lambda extent: {"window": (extent, extent)},
    "chunk": lambda extent: {"chunk": extent + 1},
    "prefix": lambda extent: {"causal": True, "prefix_lengths": torch.full((len(PAIRS),), extent, dtype=torch.int32)},
}
PAIRS = [(17, 33), (33, 16), (16, 32)]


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("border", BORDERS)
def test_every_border(backend: str, border: str, alignment: str) -> None:
    """A border of any extent is exact for lengths around the borders of tiles, packed into one call."""
    queries, keys = torch.tensor(PAIRS).unbind(1)
    cu_q, cu_k = (F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (queries, keys))
    leaves = [torch.randn(int(cu[-1]), 1, 4, requires_grad=True) for cu in (cu_q, cu_k, cu_k)]
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 33, "max_seqlen_k": 33}
    sequence_q, sequence_k = (torch.arange(len(each)).repeat_interleave(each) for each in (queries, keys))
    position = torch.arange(len(sequence_q)) - cu_q[sequence_q]
    position = position + (keys - queries)[sequence_q] * (alignment == "bottom_right")
    place = torch.arange(len(sequence_k)) - cu_k[sequence_k]
    same = sequence_q[:, None] == sequence_k
    for extent in range(34):
        output, lse = with_lse(*leaves, **packed, **BORDERS[border](extent), alignment=alignment)
        wide = [tensor.detach().double().transpose(0, 1)[None].requires_grad_() for tensor in leaves]
        mask = same & allowed_pairs(place, position[:, None], border, extent)
        exact, exact_lse = (result[0] for result in reference.attention(*wide, mask=mask))
        seen = torch.isfinite(exact_lse)
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=0.0)
        torch.testing.assert_close(output.double(), exact.transpose(0, 1), atol=2e-5, rtol=0.0)
        actual = torch.autograd.grad(output.square().sum() + lse[seen].square().sum(), leaves)
        expected = torch.autograd.grad(exact.square().sum() + exact_lse[seen].square().sum(), wide)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e[0].transpose(0, 1), atol=2e-4, rtol=0.0)


def allowed_pairs(key: torch.Tensor, query: torch.Tensor, border: str, extent: int) -> torch.Tensor:
    """Return a mask of the keys that each query sees by their positions alone."""
    if border == "chunk":
        return key.div(extent + 1, rounding_mode="floor") == query.div(extent + 1, rounding_mode="floor")
    if border == "prefix":
        return (key <= query) | (key < extent)
    return ((key >= query - extent) | (border == "right")) & ((key <= query + extent) | (border == "left"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (20, 3)}, {"window": (20, None)}, {"chunk": 9}, {"softcap": 5.0}],
    ids=["nothing", "causal", "window", "left", "chunk", "softcap"],
)
def test_across_tile_borders(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, size, 16).to(dtype) for heads, size in ((2, 37), (1, 41), (1, 41))]
    check(tensors, options)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "options"),
    [
        (257, 320, torch.float32, {"causal": True}),
        (320, 257, torch.bfloat16, {"softcap": 5.0}),
        (512, 512, torch.float16, {"causal": True, "dropout_p": 0.2}),
        (512, 40, torch.float32, {"window": (20, 3)}),
        (192, 128, torch.bfloat16, {"causal": True}),
    ],
)
def test_wide_heads(head_dim: int, value_dim: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shapes = ((2, 17, head_dim), (1, 21, head_dim), (1, 21, value_dim))
    check([torch.randn(1, *shape).to(dtype) for shape in shapes], options)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(130, 9), (16, 251)])
def test_wide_heads_at_odd_addresses(head_dim: int, value_dim: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, 17, head_dim), (1, 21, head_dim), (1, 21, value_dim))
    check([torch.randn(1, *shape[:-1], shape[-1] + 1)[..., 1:] for shape in shapes], {"causal": True})


@pytest.mark.quick
def test_only_wide_heads_are_copied_to_aligned_rows() -> None:
    odd, even, narrow = torch.randn(3, 4, 251)[..., 1:], torch.randn(3, 4, 256), torch.randn(3, 4, 65)[..., 1:]
    copied, same = launch.with_aligned_rows(odd, even)
    assert torch.equal(copied, odd) and launch.uses_descriptors(copied) and not launch.uses_descriptors(odd)
    assert same is even
    assert launch.with_aligned_rows(narrow)[0] is narrow


EVERYTHING: dict[str, Any] = {
    "bias": torch.linspace(-1, 1, 2 * 37).view(1, 2, 37, 1),
    "relative_bias": torch.linspace(-1, 1, 2 * 21).view(2, 21),
    "alibi_slopes": torch.tensor([0.1, 0.3]),
    "scale": torch.tensor([0.4, 0.2]),
    "softcap": 4.0,
    "sinks": torch.tensor([0.5, -0.5]),
    "window": (30, 7),
    "dropout_p": 0.2,
}


def with_two_heads() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, size, 16) for heads, size in ((2, 37), (1, 41), (1, 41))]


def test_deterministic_mode_is_as_accurate_and_repeats_itself() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        everything = here(EVERYTHING)
        check(with_two_heads(), everything)
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            with fastformer.backend("triton"):
                runs.append(
                    run(with_lse, with_two_heads(), everything, [torch.ones(1, 2, 37, 16), torch.ones(1, 2, 37)])
                )
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.quick
@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": torch.linspace(-1, 1, 32).view(1, 1, 32, 1)},
        {"relative_bias": torch.linspace(-1, 1, 2 * 21).view(2, 21)},
        {"alibi_slopes": torch.tensor([0.1, 0.3])},
        {"dropout_p": 0.5},
    ],
    ids="-".join,
)
def test_whole_tiles_alone_and_one_key_less(options: dict[str, Any], missing: int) -> None:
    torch.manual_seed(0)
    check([torch.randn(1, 2, size, 16) for size in (32, 32 - missing, 32 - missing)], here(options))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"key_lengths": torch.tensor([5], dtype=torch.int32)}], ids="-".join
)
def test_tensor_descriptors(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    described = dataclasses.replace(launch._INTERPRETER, descriptors=True)
    monkeypatch.setattr(launch, "_INTERPRETER", described)
    # Outside deterministic mode dQ is summed by a descriptor's addition, which the interpreter lacks.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, size, 24).half() for heads, size in ((2, 37), (1, 41), (1, 41))]
    assert launch.uses_descriptors(*tensors)
    check(tensors, here(options))


SPECIALIZED = ("two_kernels", "one_loop", "descriptors", "warp_specialize")
SOME_KEYS: dict[str, Any] = {"key_lengths": torch.tensor([5], dtype=torch.int32)}


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (20, 3)}, SOME_KEYS, EVERYTHING], ids="-".join)
@pytest.mark.parametrize(
    "fields", [("one_loop",), ("two_kernels", "one_loop"), ("lazy_rescale",), SPECIALIZED], ids=str
)
def test_other_ways_to_walk_over_tiles(options: dict[str, Any], fields: tuple[str, ...]) -> None:
    configuration = dataclasses.replace(launch._INTERPRETER, block_m=32, **dict.fromkeys(fields, True))
    with forced(dict.fromkeys(("attention_forward", "attention_backward", "attention_query_gradient"), configuration)):
        check(with_two_heads(), here(options))


# The greatest score of each of five tiles of keys, in units of log2. Maxima may lag by 8.
MAXIMA = {
    "slow": [0.0, 5.0, 7.9, 10.0, 15.8],
    "fast": [0.0, 9.0, 30.0, 31.0, 60.0],
    "falling": [50.0, 20.0, 0.0, -40.0, 57.0],
    "huge": [-300.0, 300.0, 307.0, 309.0, 2000.0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("growth", MAXIMA)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"sinks": torch.tensor([3.0])}], ids="-".join)
def test_sums_that_are_seldom_rescaled(options: dict[str, Any], growth: str, dtype: torch.dtype) -> None:
    """Maxima grow from tile to tile; rows of opposite sign see them fall. Some tiles and one row are hidden."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 80, 16) * 0.1, torch.randn(1, 1, 80, 16)
    query[..., 0] = torch.tensor([1.0, -1.0]).repeat(40)
    key[..., 0] = torch.tensor(MAXIMA[growth]).repeat_interleave(16) / LOG2_E.value
    mask = torch.ones(1, 1, 80, 80, dtype=torch.bool)
    mask[..., :20, :32] = False
    mask[..., 40:45, 48:64] = False
    mask[..., 79, :] = False
    lazy = dataclasses.replace(launch._INTERPRETER, lazy_rescale=True)
    with forced({"attention_forward": lazy}):
        tensors = [tensor.to(dtype) for tensor in (query, key, torch.randn(1, 1, 80, 16))]
        check(tensors, here({**options, "mask": mask, "scale": 1.0}))


def test_nan_and_infinity_where_sums_are_seldom_rescaled() -> None:
    query, key, value = torch.randn(3, 1, 1, 48, 4).unbind()
    query[0, 0, 3, 1], query[0, 0, 5, 1] = float("nan"), float("inf")
    sinks = torch.tensor([float("nan")])
    for options in ({}, {"sinks": sinks}):
        results = []
        for lazy in (False, True):
            configuration = dataclasses.replace(launch._INTERPRETER, lazy_rescale=lazy)
            with fastformer.backend("triton"), forced({"attention_forward": configuration}):
                results.append(with_lse(query, key, value, **options))
        for usual, lazily in zip(*results, strict=True):
            assert usual[0, 0, 3].isnan().all()
            torch.testing.assert_close(lazily, usual, equal_nan=True)


def test_tensors_that_no_descriptor_describes() -> None:
    aligned = torch.zeros(1, 2, 8, 16, dtype=torch.float16)
    assert launch.uses_descriptors(aligned)
    assert not launch.uses_descriptors(aligned[..., 1:])
    assert not launch.uses_descriptors(aligned[..., ::2])
    assert not launch.uses_descriptors(aligned[:, :, :1].expand(1, 2, 8, 16))
    assert not launch.uses_descriptors(torch.zeros(1, 2, 8, 12, dtype=torch.float16))


WHOLE: dict[str, tuple[Callable[[], torch.Tensor], bool]] = {
    "contiguous": (lambda: torch.empty(2, 3, 64, 32), True),
    "heads side by side": (lambda: torch.empty(2, 64, 3, 32).transpose(1, 2), True),
    "part of a projection": (lambda: torch.empty(2, 64, 3, 3, 32)[:, :, 1].transpose(1, 2), True),
    "sequence first": (lambda: torch.empty(64, 2, 3, 32).permute(1, 2, 0, 3), True),
    "shared head": (lambda: torch.empty(2, 1, 64, 32).expand(2, 3, 64, 32), True),
    "head_dim that fills no tile": (lambda: torch.empty(2, 3, 64, 24), False),
    "batches between rows": (lambda: torch.empty_strided((2, 3, 64, 32), (48, 64 * 96, 96, 1)), False),
    "heads across rows": (lambda: torch.empty_strided((2, 3, 64, 32), (64 * 96, 48, 96, 1)), False),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tensors_that_one_descriptor_describes(name: str) -> None:
    make, wanted = WHOLE[name]
    tensor = make()
    assert launch._is_matrix_of_heads(tensor) is wanted
    if wanted:  # the head at the place that kernels compute is the tensor's own
        batch, head = 1, 2
        first = batch * tensor.stride(0) + head * tensor.stride(1)
        matrix = torch.arange(2**20).as_strided((1000, tensor.stride(2)), (tensor.stride(2), 1))
        row, column = divmod(first, tensor.stride(2))
        exact = torch.arange(2**20).as_strided(tensor.shape, tensor.stride())[batch, head]
        assert torch.equal(matrix[row : row + 64, column : column + 32], exact)


def test_query_and_key_norms(backend: str) -> None:
    query, key, value = with_two_heads()
    query_norm, key_norm = fastformer.nn.RMSNorm(16), fastformer.nn.LayerNorm(16)
    torch.testing.assert_close(
        attention(query, key, value, query_norm=query_norm, key_norm=key_norm),
        attention(query_norm(query), key_norm(key), value),
    )


def test_dropout_is_the_reference_s() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, size, 8) for size in (35, 19, 19)]
    check(tensors, {"dropout_p": 0.3, "causal": True, "sinks": torch.randn(2)}, dropout_seed=5)


def test_dropout_drops_its_share(backend: str) -> None:
    q = torch.zeros(1, 4, 64, 8)
    v = torch.eye(64)[None, None].expand(1, 4, 64, 64)
    torch.manual_seed(0)
    weights = attention(q, torch.zeros(1, 4, 64, 8), v, dropout_p=0.25)
    share, standard_error = (weights == 0).float().mean().item(), (0.25 * 0.75 / weights.numel()) ** 0.5
    assert abs(share - 0.25) < 5 * standard_error
    assert weights.max().item() == pytest.approx(1 / 64 / 0.75)


def packed_and_padded() -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
    torch.manual_seed(0)
    lengths = [5, 0, 40, 17]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [torch.randn(sum(lengths), heads, 12) for heads in (4, 2, 2)], cu_seqlens, lengths


PACKED_FEATURES: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (4, None), "bias": torch.linspace(-1, 1, 40).view(1, 1, 1, 40)},
    {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "sinks": torch.tensor([0.5, 0.0, 1.0, -1.0])},
    {
        "relative_bias": torch.linspace(-1, 1, 4 * 13).view(4, 13),
        "chunk": 7,
        "scale": torch.tensor([0.1, 0.3, -0.2, 0.4]),
    },
    {"causal": True, "prefix_lengths": torch.tensor([2, 0, 20, 17], dtype=torch.int32)},
]


@pytest.mark.parametrize("two_kernels", [False, True])
@pytest.mark.parametrize("options", PACKED_FEATURES, ids=lambda options: "-".join(options))
def test_packed_is_each_sequence_alone(backend: str, options: dict[str, Any], two_kernels: bool) -> None:
    tensors, cu_seqlens, lengths = packed_and_padded()
    options = here(options)
    leaves = [t.requires_grad_() for t in tensors]
    with forced({"attention_backward": dataclasses.replace(launch._INTERPRETER, two_kernels=two_kernels)}):
        output, lse = with_lse(*leaves, cu_seqlens_q=cu_seqlens, max_seqlen_q=max(lengths), **options)
        grads = torch.autograd.grad(output.square().sum() + lse.sum(), leaves)
    start = 0
    for index, length in enumerate(lengths):
        part = [t.detach()[start : start + length].transpose(0, 1)[None].requires_grad_() for t in tensors]
        own = dict(options)
        if "prefix_lengths" in own:
            own["prefix_lengths"] = own["prefix_lengths"][index : index + 1]
        if "bias" in own:
            own["bias"] = own["bias"][..., :length]
        alone, alone_lse = with_lse(*part, **own)
        torch.testing.assert_close(output[start : start + length].transpose(0, 1)[None], alone)
        torch.testing.assert_close(lse[:, start : start + length][None], alone_lse)
        for whole, grad in zip(grads, torch.autograd.grad(alone.square().sum() + alone_lse.sum(), part), strict=True):
            torch.testing.assert_close(whole[start : start + length].transpose(0, 1)[None], grad)
        start += length


@pytest.mark.parametrize("head_dim", [8, 320])
def test_packed_cross_attention(backend: str, head_dim: int) -> None:
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 3, 40], [0, 21, 25]))
    q, k = torch.randn(40, 2, head_dim), torch.randn(25, 2, head_dim)
    packed = attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=37, max_seqlen_k=21)
    for (q0, q1), (k0, k1) in (((0, 3), (0, 21)), ((3, 40), (21, 25))):
        alone = attention(*(t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], k[k0:k1])))
        torch.testing.assert_close(packed[q0:q1].transpose(0, 1)[None], alone)


def test_row_without_keys_gives_zeros(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    for argument in (mask, torch.zeros(3, 3).masked_fill(~mask, float("-inf"))):
        output, lse = with_lse(q, k, v, mask=argument)
        grads = torch.autograd.grad(output.sum(), (q, k, v))
        assert torch.equal(output[0, 0, 1], torch.zeros(4)) and lse[0, 0, 1] == float("-inf")
        assert torch.equal(grads[0][0, 0, 1], torch.zeros(4))
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_nan_in_nan_out(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 20, 4).unbind()
    q[0, 0, 3, 1] = float("nan")
    output = attention(q, k, v)
    assert output[0, 0, 3].isnan().all() and not output[0, 0, :3].isnan().any()


SDPA_CALLS: list[tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = [
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"is_causal": True}),
    (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), {"enable_gqa": True}),
    (((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)), {"attn_mask": torch.ones(2, 2, 1, 5, 7).tril() > 0}),
    (((3, 5, 8), (3, 7, 8), (3, 7, 8)), {"scale": 0.1}),
    (((5, 8), (7, 8), (7, 8)), {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)}),
    (((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)), {}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(-2)}),
]


@pytest.mark.quick
@pytest.mark.parametrize(("shapes", "options"), SDPA_CALLS)
def test_drop_in_for_pytorch(backend: str, shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tensors, options = [torch.randn(shape) for shape in shapes], here(options)
    actual = scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(*tensors, **options))


def test_documented_examples() -> None:
    """PyTorch's documented examples of its function give the same here: plain, and with grouped queries."""
    torch.manual_seed(0)
    query, key, value = (torch.rand(32, 8, 128, 64, dtype=torch.float16) for _ in range(3))
    actual, expected = (f(query, key, value) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(actual, expected)
    query, key, value = (torch.rand(32, heads, 128, 64, dtype=torch.float16) for heads in (32, 8, 8))
    actual, expected = (
        f(query, key, value, enable_gqa=True) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(actual, expected)


def test_documented_behaviours(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    # is_causal aligns top-left: the first query sees one key.
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, 0], v[0, 0, 0])
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal=True"):
        scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(3, 5, dtype=torch.bool), is_causal=True)
    # A boolean mask is True where a key takes part, a floating mask is added, and both broadcast.
    mask = torch.tensor([True, False, True, False, True])
    additive = torch.zeros(5).masked_fill(~mask, float("-inf"))
    for attn_mask in (mask.expand(3, 5), mask[None], additive[None]):
        actual = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        torch.testing.assert_close(actual, F.scaled_dot_product_attention(q[:, :, :], k[:, :, mask], v[:, :, mask]))
    # A row that may attend to nothing is zero, never NaN.
    nothing = scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(3, 5, dtype=torch.bool))
    assert torch.equal(nothing, torch.zeros_like(nothing))
    # A NaN that takes part makes the output NaN.
    v[0, 0, 0] = float("nan")
    assert scaled_dot_product_attention(q, k, v).isnan().all()


def test_registration(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    bias = torch.randn(1, 2, 5, 5)
    options: dict[str, Any] = dict.fromkeys(inspect.signature(checked_arguments).parameters)
    for name in ("query", "key", "value"):
        del options[name]
    options |= {"bias": bias, "causal": True, "alignment": "bottom_right", "dropout_p": 0.0}
    *_, arguments = checked_arguments(q, k, v, **options)
    torch.library.opcheck(torch.ops.fastformer.attention.default, (q, k, v, *arguments))


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for size in (9, 21):
        leaves = [torch.randn(1, 2, size, 8, requires_grad=True) for _ in range(3)]
        expected = attention(*leaves, causal=True)
        actual = compiled(*leaves, causal=True)
        torch.testing.assert_close(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), leaves)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids="-".join)
def test_autocast_rounds_the_inputs_and_nothing_else(
    backend: str, options: dict[str, Any], device: torch.device
) -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = attention(*leaves, **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        within = torch.autograd.grad(actual.sum(), leaves, retain_graph=True)
    for grad, wanted in zip(within, torch.autograd.grad(actual.sum(), leaves), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


Q = torch.zeros(2, 4, 5, 8)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q.double(), Q, Q), {}, TypeError, "query must be float32, float16 or bfloat16"),
        ((Q, Q.half(), Q), {}, TypeError, "key must have query's dtype"),
        ((Q[0], Q[0], Q[0]), {}, ValueError, r"query must be dense .*got shape \(4, 5, 8\)"),
        ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, "heads must be a multiple of key's; got 4 and 3"),
        ((Q, Q[..., :4], Q), {}, ValueError, "same head_dim; got 8 and 4"),
        ((Q, Q[:, :, :3], Q), {}, ValueError, "key and value must agree"),
        ((Q, Q[:1], Q[:1]), {}, ValueError, "same batch size; got 2 and 1"),
        ((torch.zeros(1, 1, 1, 513),) * 3, {}, ValueError, "head_dim must be from 1 to 512; got 513"),
        ((Q, Q, Q), {"mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError, r"mask must broadcast.*\(3, 5\)"),
        ((Q, Q, Q), {"mask": torch.ones(5, 5, dtype=torch.int64)}, TypeError, "mask must be boolean"),
        ((Q, Q, Q), {"window": (-1, 2)}, ValueError, "window's left extent"),
        ((Q, Q, Q), {"window": (1.5, None)}, TypeError, "window's left extent must be a whole number.*got 1.5"),
        ((Q, Q, Q), {"window": 3}, TypeError, "window must be a pair .left, right.*got 3"),
        ((Q, Q, Q), {"chunk": 2.5}, TypeError, "chunk must be a whole number, or None for no limit; got 2.5"),
        ((Q, Q, Q), {"softcap": float("inf")}, ValueError, "softcap must be positive and finite.*got inf"),
        ((Q, Q, Q), {"mask": [[1]]}, TypeError, "mask must be a tensor or a fastformer.BlockMask.*got list"),
        ((Q, Q, Q), {"bias": np.zeros((1, 1))}, TypeError, "bias must be a tensor; got numpy.ndarray"),
        ((Q, Q, Q), {"chunk": 0}, ValueError, "chunk must be 1 or more"),
        ((Q, Q, Q), {"prefix_lengths": CU[1:]}, ValueError, "prefix_lengths needs causal=True"),
        ((Q, Q, Q), {"scale": torch.ones(3)}, ValueError, r"scale must have shape \(4,\); got \(3,\)"),
        ((Q, Q, Q), {"scale": torch.ones(4).half()}, TypeError, "scale must be a number or float32"),
        ((Q, Q, Q), {"relative_bias": torch.ones(4, 4)}, ValueError, "relative_bias must have shape"),
        ((Q, Q, Q), {"alignment": "left"}, ValueError, "alignment must be"),
        ((Q, Q, Q), {"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]"),
        ((Q, Q, Q), {"softcap": 0.0}, ValueError, "softcap must be positive"),
        ((Q, Q, Q), {"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
        ((Q, Q, Q), {"key_lengths": torch.zeros(2)}, TypeError, "key_lengths must be int32"),
        ((Q, Q, Q), {"max_seqlen_q": 5}, ValueError, "are for packed tensors"),
        ((Q[0],) * 3, {"cu_seqlens_q": CU}, ValueError, "max_seqlen_q is needed"),
        ((torch.zeros(6, 1, 8),) * 3, {"cu_seqlens_q": CU, "max_seqlen_q": 3}, ValueError, "must rise from 0 to.*6"),
        ((torch.zeros(5, 1, 8),) * 3, {"cu_seqlens_q": CU, "max_seqlen_q": 2}, ValueError, "max_seqlen is 2"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


# (batch, heads, queries, keys) of the calls below, and the shape that each argument must then have.
SIZES = (2, 4, 5, 6)
SHAPES: dict[str, tuple[int, ...]] = {
    "mask": SIZES,
    "bias": SIZES,
    "alibi_slopes": SIZES[:2],
    "relative_bias": (4, 7),
    "sinks": (4,),
    "scale": (4,),
    "key_lengths": (2,),
    "prefix_lengths": (2,),
}


@pytest.mark.cpu
@pytest.mark.parametrize("size", ["one more", "twice", "half"])
@pytest.mark.parametrize(
    ("name", "dimension"), [(name, d) for name, shape in SHAPES.items() for d in range(len(shape))]
)
def test_a_wrong_size_in_any_dimension_is_named(backend: str, name: str, dimension: int, size: str) -> None:
    batch, heads, queries, keys = SIZES
    query, key = torch.zeros(batch, heads, queries, 8), torch.zeros(batch, heads // 2, keys, 8)
    shape = list(SHAPES[name])
    shape[dimension] = {"one more": shape[dimension] + 1, "twice": 2 * shape[dimension], "half": shape[dimension] // 2}[
        size
    ]
    # A size of 1 that broadcasts is accepted, and so is a table with another reach.
    right = name in ("mask", "bias") and shape[dimension] == 1
    right = right or (name == "relative_bias" and dimension == 1 and shape[dimension] % 2 == 1)
    argument = torch.zeros(shape, dtype=torch.int32 if name.endswith("lengths") else torch.float32)
    options = {name: argument, "causal": True}
    if right:
        assert attention(query, key, key, **options).shape == query.shape
    else:
        with pytest.raises(ValueError, match=name):
            attention(query, key, key, **options)


@pytest.mark.cpu
@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("leading", range(4))
def test_a_mask_of_torch_s_with_a_wrong_size_is_refused(backend: str, dimension: int, leading: int) -> None:
    """A mask of a wrong size is refused as PyTorch refuses it, with any number of leading dimensions left out."""
    batch, heads, queries, keys = SIZES
    query, key = torch.zeros(batch, heads, queries, 8), torch.zeros(batch, heads, keys, 8)
    shape = list(SIZES)
    shape[dimension] += 1
    mask = torch.zeros(shape[leading:])
    if leading > dimension:
        assert scaled_dot_product_attention(query, key, key, mask).shape == query.shape
        return
    with pytest.raises(ValueError, match="mask"):
        scaled_dot_product_attention(query, key, key, mask)


def test_keys_beyond_every_query_do_not_exist() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    k, v = torch.randn(2, 1, 2, 7, 8)
    k[:, :, 5:], v[:, :, 5:] = float("nan"), float("inf")
    with fastformer.backend("torch"):
        output = attention(q, k, v, causal=True, alignment="top_left")
        (gradient,) = torch.autograd.grad(output.sum(), q)
        expected = attention(q, k[:, :, :5], v[:, :, :5], causal=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), q)[0])
