"""Block masks: their lists, attention with them on both backends, and the errors."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from accuracy import assert_as_accurate
from attention_accuracy import as_dtype, magnitudes, result_names, run
from fastformer_kernels.attention import launch
from fastformer_kernels.configurations import forced
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

import fastformer
import fastformer.nn
from fastformer import BlockMask
from fastformer.ops.attention.block_mask import shown_in_rows

DOCUMENTS = torch.tensor([0] * 150 + [1] * 40 + [2] * 160)


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k)


def window_of_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 20 * h + 50 * b


def random_mask(*shape: int) -> Tensor:
    """Random elements, with tiles that are empty, whole, and partial, and rows that see nothing."""
    mask = torch.rand(shape) > 0.5
    kinds = torch.randint(0, 3, (*shape[:2], *(-(-size // 128) for size in shape[2:])))
    kinds = kinds.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, : shape[2], : shape[3]]
    mask = torch.where(kinds == 0, False, torch.where(kinds == 1, True, mask))
    mask[:, :, ::7] = False
    return mask


@pytest.mark.quick
@pytest.mark.parametrize(
    "shape", [(1, 1, 128, 128), (2, 3, 130, 300), (1, 2, 1, 500), (2, 1, 257, 1), (1, 1, 0, 5), (1, 1, 5, 0)]
)
def test_lists_hold_the_mask_in_both_directions(shape: tuple[int, int, int, int]) -> None:
    mask = random_mask(*shape)
    block_mask = BlockMask.from_mask(mask)
    assert torch.equal(block_mask.to_dense(), mask)
    transposed = shown_in_rows(*block_mask.by_key, slice(0, shape[0]), slice(0, shape[3]), shape[2])
    assert torch.equal(transposed, mask.transpose(-1, -2))
    assert block_mask.by_key is block_mask.by_key


def test_tiles_that_are_all_or_nothing_have_no_elements() -> None:
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    block_mask = BlockMask.from_mask(mask)
    # Two of six tiles on or below the diagonal are wholly seen, and inside the mask; the last row of tiles is cut.
    assert block_mask.by_query.lists[0, 0, :, :2].tolist() == [[0, 1], [1, 1], [0, 3]]
    assert block_mask.sparsity == pytest.approx(1 / 3)
    assert repr(block_mask) == "BlockMask(shape=(1, 1, 300, 300), sparsity=33.3%, device='cpu')"


@pytest.mark.parametrize("elements", [1 << 24, 40_000, 1])
def test_functions_are_computed_some_tiles_at_a_time(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[BlockMask.__module__], "_PIECE_ELEMENTS", elements)
    largest = 0

    def watched(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        nonlocal largest
        seen = window_of_head(b, h, q, k)
        largest = max(largest, seen.numel())
        return seen

    block_mask = BlockMask.from_function(watched, 2, 3, 260, 270)
    b, h, q, k = (torch.arange(n).view(-1, *(1,) * (3 - i)) for i, n in enumerate((2, 3, 260, 270)))
    assert torch.equal(block_mask.to_dense(), window_of_head(b, h, q, k))
    assert largest <= max(elements, 128 * 270)


@pytest.mark.parametrize("block_size", [128, (64, 32), (256, 128)])
def test_masks_of_flex_attention(block_size: Any) -> None:
    theirs = flex_attention.create_block_mask(documents, None, None, 350, 350, device="cpu", BLOCK_SIZE=block_size)
    ours = BlockMask.from_flex(theirs)
    assert torch.equal(ours.to_dense(), BlockMask.from_function(documents, None, None, 350, 350).to_dense())
    query, key, value = torch.randn(3, 1, 2, 350, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        expected = flex_attention.flex_attention(query, key, value, block_mask=theirs)
    torch.testing.assert_close(fastformer.attention(query, key, value, mask=ours), expected)


TAGS = torch.rand(350, 3) > 0.6


def test_functions_of_flex_attention_may_reduce() -> None:
    """FlexAttention calls a function with single indices."""
    mask_mod = lambda b, h, q, k: (TAGS[q] & TAGS[k]).any()  # noqa: E731
    flex = flex_attention.create_block_mask(mask_mod, 1, 2, 350, 300, device="cpu")
    wanted = flex_attention.create_mask(mask_mod, 1, 2, 350, 300, device="cpu")
    assert torch.equal(BlockMask.from_flex(flex).to_dense(), wanted)


def exported(mask: BlockMask, tensors: Tensor) -> None:
    class Layer(torch.nn.Module):
        def forward(self, tensors: Tensor) -> Tensor:
            return fastformer.attention(*tensors, mask=mask)

    torch.export.export(Layer(), (tensors,), strict=False)


@pytest.mark.parametrize(
    "first",
    [
        exported,
        lambda mask, tensors: torch.func.grad(lambda each: fastformer.attention(*each, mask=mask).sum())(tensors),
        lambda mask, tensors: torch.func.vmap(lambda each: fastformer.attention(*each, mask=mask))(tensors[None]),
    ],
    ids=["export", "torch.func.grad", "vmap"],
)
def test_a_trace_or_transform_leaves_the_mask_as_it_was(first: Callable[..., object]) -> None:
    torch.manual_seed(0)
    tensors, elements = torch.randn(3, 1, 2, 20, 8), torch.rand(20, 20) > 0.5
    mask = BlockMask.from_mask(elements)
    first(mask, tensors)
    results = []
    for given in (mask, BlockMask.from_mask(elements)):
        leaves = tensors.clone().requires_grad_()
        with fastformer.backend("triton"):
            fastformer.attention(*leaves, mask=given).sum().backward()
        results.append(leaves.grad)
    assert torch.equal(*results)
    assert torch.equal(copy.deepcopy(mask).by_key.bits, BlockMask.from_mask(elements).by_key.bits)


def with_lse(*tensors: Tensor, **options: Any) -> Any:
    return fastformer.attention(*tensors, return_lse=True, **options)


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "bias": lambda: {"bias": torch.randn(1, 4, 130, 1), "softcap": 10.0},
    "alibi": lambda: {"alibi_slopes": torch.rand(4) * 0.1, "scale": 0.3},
    "relative": lambda: {"relative_bias": torch.randn(4, 101), "sinks": torch.randn(4)},
    "dropout": lambda: {"dropout_p": 0.3},
}


@pytest.mark.parametrize(
    ("feature", "broadcast", "deterministic"),
    [
        *(("plain", broadcast, False) for broadcast in ("batch", "heads", "both", "none")),
        ("plain", "none", True),
        *((feature, "none", False) for feature in FEATURES if feature != "plain"),
    ],
)
def test_attention_matches_float64(feature: str, broadcast: str, deterministic: bool) -> None:
    torch.manual_seed(0)
    batch, heads, kv_heads, queries, keys = 2, 4, 2, 130, 290
    mask = random_mask(
        1 if broadcast in ("batch", "both") else batch, 1 if broadcast in ("heads", "both") else heads, queries, keys
    )
    shapes = (heads, queries, 8), (kv_heads, keys, 8), (kv_heads, keys, 5)
    tensors = [torch.randn(batch, *shape) for shape in shapes]
    options = FEATURES[feature]()
    plain = {**options, "mask": mask}
    if "dropout_p" in options:
        torch.manual_seed(1)
        state = torch.randint(0, 2**63 - 1, (2,)).tolist()
        plain["keep"] = reference.dropout_keep(*state, options["dropout_p"], (batch, heads, queries, keys))
    weights = [torch.randn(batch, heads, queries, 5), torch.randn(batch, heads, queries)]
    exact = run(reference.attention, [t.double() for t in tensors], as_dtype(plain, torch.float64), weights)
    pytorch = run(reference.attention, tensors, plain, weights)
    names = result_names(options)
    wanted = dict(zip(names, exact, strict=True))
    configuration = dataclasses.replace(launch._INTERPRETER, block_m=128, block_n=64)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for backend in ("triton", "torch"):
            torch.manual_seed(1)
            with (
                fastformer.backend(backend),
                forced(
                    {
                        "attention_forward": configuration,
                        "attention_backward": dataclasses.replace(configuration, block_m=32, block_n=128),
                        "attention_deterministic": dataclasses.replace(configuration, block_m=128, block_n=128),
                    }
                ),
            ):
                block_mask = BlockMask.from_mask(mask)
                actual = dict(zip(names, run(with_lse, tensors, {**options, "mask": block_mask}, weights), strict=True))
            scales = magnitudes(actual, wanted, weights[0], tensors, {**options, "mask": mask})
            for name, p in zip(names, pytorch, strict=True):
                a, e = actual[name], wanted[name]
                assert torch.equal(torch.isfinite(a), torch.isfinite(e)), f"{backend} {name}: infinities differ"
                finite = torch.isfinite(e)
                assert_as_accurate(f"{backend} {name}", a[finite], p[finite], e[finite], scale=scales[name])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tile", [16, 32])
def test_small_tiles_read_their_part_of_the_bits(tile: int) -> None:
    """A block mask gives the same as its elements, for tiles smaller than a word of bits and as large."""
    torch.manual_seed(0)
    mask = random_mask(1, 1, 70, 200)
    query, key, value = (torch.randn(1, 1, size, 8) for size in (70, 200, 200))
    weights = [torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70)]
    configuration = dataclasses.replace(launch._INTERPRETER, block_m=tile, block_n=tile)
    operations = ("attention_forward", "attention_backward", "attention_deterministic")
    with fastformer.backend("triton"), forced(dict.fromkeys(operations, configuration)):
        dense, listed = (
            run(with_lse, [query, key, value], {"mask": each}, weights) for each in (mask, BlockMask.from_mask(mask))
        )
    for name, expected, actual in zip(result_names({}), dense, listed, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_mask_that_shows_nothing_gives_zeros(backend: str) -> None:
    tensors = [torch.randn(1, 1, 20, 8) for _ in range(3)]
    weights = [torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20)]
    mask = BlockMask.from_mask(torch.zeros(20, 20, dtype=torch.bool))
    with fastformer.backend(backend):
        output, lse, *gradients = run(with_lse, tensors, {"mask": mask}, weights)
    assert not output.any() and (lse == float("-inf")).all()
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    mask = BlockMask.from_function(documents, None, None, 350, 350)
    compiled = torch.compile(fastformer.attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    query, key, value = torch.randn(3, 1, 2, 350, 16)
    for requires_grad in (False, True):
        leaves = [tensor.detach().requires_grad_(requires_grad) for tensor in (query, key, value)]
        expected = fastformer.attention(*leaves, mask=mask)
        actual = compiled(*leaves, mask=mask)
        torch.testing.assert_close(actual, expected)
        if requires_grad:
            wanted = torch.autograd.grad(expected.sum(), leaves)
            torch.testing.assert_close(torch.autograd.grad(actual.sum(), leaves), wanted)


def test_checkpointing_and_autocast() -> None:
    mask = BlockMask.from_function(documents, None, None, 350, 350)
    query, key, value = (tensor.requires_grad_() for tensor in torch.randn(3, 1, 2, 350, 16).unbind())

    def attend(*tensors: Tensor) -> Tensor:
        return fastformer.attention(*tensors, mask=mask)

    with torch.autocast("cpu", torch.bfloat16):
        plain = attend(query, key, value)
        recomputed = checkpoint(attend, query, key, value, use_reentrant=False)
    assert plain.dtype == recomputed.dtype == torch.bfloat16
    wanted = torch.autograd.grad(plain.float().square().sum(), (query, key, value))
    torch.testing.assert_close(torch.autograd.grad(recomputed.float().square().sum(), (query, key, value)), wanted)


@pytest.mark.quick
def test_weights_are_those_of_the_elements() -> None:
    mask = BlockMask.from_function(documents, None, None, 350, 350)
    query, key, value = torch.randn(3, 1, 2, 350, 16)
    _, lse = fastformer.attention(query, key, value, mask=mask, return_lse=True)
    weights = fastformer.attention_weights(query, key, lse, mask=mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 350))
    assert not weights.masked_fill(mask.to_dense(), 0.0).any()


@pytest.mark.quick
def test_what_is_wrong_is_said() -> None:
    tensors = torch.randn(3, 2, 4, 20, 8)
    mask = BlockMask.from_mask(torch.ones(20, 20, dtype=torch.bool))
    for option in (
        {"causal": True},
        {"window": (3, None)},
        {"chunk": 4},
        {"key_lengths": torch.tensor([3, 4], dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))} cannot be combined with a BlockMask"):
            fastformer.attention(*tensors, mask=mask, **option)
    packed = {"cu_seqlens_q": torch.tensor([0, 20], dtype=torch.int32), "max_seqlen_q": 20}
    with pytest.raises(ValueError, match="cu_seqlens_q cannot be combined with a BlockMask"):
        fastformer.attention(*(tensor[0].transpose(0, 1) for tensor in tensors), mask=mask, **packed)
    with pytest.raises(ValueError, match=r"a BlockMask must have the sizes .* of \(2, 4, 20, 20\); got"):
        fastformer.attention(*tensors, mask=BlockMask.from_mask(torch.ones(3, 1, 20, 20, dtype=torch.bool)))
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        BlockMask.from_mask(torch.ones(20, 20))
    with pytest.raises(ValueError, match="mask must have 2 to 4 dimensions"):
        BlockMask.from_mask(torch.ones(20, dtype=torch.bool))
    with pytest.raises(TypeError, match="the result of mask_mod must be a boolean tensor"):
        BlockMask.from_function(lambda b, h, q, k: q - k, None, None, 20, 20)
    with pytest.raises(ValueError, match=r"mask_mod must return 4 dimensions .*\(1, 1, 20, 20\); got \(\)"):
        BlockMask.from_function(lambda b, h, q, k: (TAGS[q] & TAGS[k]).any(), None, None, 20, 20)
    flex = flex_attention.create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 300, 300, device="cpu")
    for call in (
        lambda: fastformer.attention(*tensors, mask=flex),
        lambda: fastformer.decode_attention(
            tensors[0], *tensors[1:], lengths=torch.tensor([20, 20], dtype=torch.int32), mask=flex
        ),
    ):
        with pytest.raises(TypeError, match=r"BlockMask \(BlockMask.from_flex .*got torch.nn.attention.flex"):
            call()
    with pytest.raises(ValueError, match="lists of all its 300 queries; got 2 blocks of 128"):
        BlockMask.from_flex(flex[:, :, 1:3])
    with pytest.raises(TypeError, match="block_mask must be FlexAttention's BlockMask; got Tensor"):
        BlockMask.from_flex(tensors)
    with pytest.raises(TypeError, match="attn_mask must be a tensor; got BlockMask"):
        fastformer.nn.MultiheadAttention(8, 1)(*torch.zeros(3, 20, 1, 8), attn_mask=mask)
    with pytest.raises(TypeError, match="device"):
        mask.to(torch.float16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queries must not be negative"):
        BlockMask.from_function(documents, None, None, -1, 20)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_hidden_nan_has_no_effect(backend: str) -> None:
    """NaN in a hidden key and value reaches neither the rows that do not see it nor their gradients."""
    torch.manual_seed(0)
    tensors = list(torch.randn(3, 1, 1, 150, 8).unbind())
    mask = torch.rand(150, 150) > 0.3
    mask[:, [3, 140]] = False
    weights = [torch.randn(1, 1, 150, 8), torch.randn(1, 1, 150)]
    options = {"mask": BlockMask.from_mask(mask), "ignore_masked_nan": True}
    with fastformer.backend(backend):
        wanted = run(with_lse, tensors, options, weights)
        tensors[1:] = [tensor.index_fill(2, torch.tensor([3, 140]), float("nan")) for tensor in tensors[1:]]
        actual = run(with_lse, tensors, options, weights)
    torch.testing.assert_close(actual[:3], wanted[:3])
