"""Dense masks that are packed to bits: the same results as dense ones, when they are packed, and when again."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from accuracy import assert_as_accurate
from attention_accuracy import as_dtype, magnitudes, result_names, run
from fastformer_kernels.attention import launch, mask_tiles
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.configurations import forced
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastformer
from fastformer.ops.attention import packed_mask
from fastformer.ops.attention.block_mask import listed_tiles, shown_in_rows

BATCH, HEADS, QUERIES, KEYS = 2, 4, 140, 300


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Pack masks of any size; the list has an element for each time that one is packed, whether by key."""
    calls: list[bool] = []
    pack = packed_mask._pack

    def watched(arguments: AttentionArguments, by_key: bool) -> Any:
        calls.append(by_key)
        return pack(arguments, by_key)

    monkeypatch.setattr(packed_mask, "_FEWEST_ELEMENTS", 1)
    monkeypatch.setattr(packed_mask, "_pack", watched)
    packed_mask._kept.clear()
    # Large tiles: the interpreter is slow for each.
    configuration = dataclasses.replace(launch._INTERPRETER, block_m=64, block_n=128)
    operations = ("attention_forward", "attention_backward", "attention_deterministic", "attention_query_gradient")
    with fastformer.backend("triton"), forced(dict.fromkeys(operations, configuration)):
        yield calls


def random_mask(batch: int = BATCH, queries: int = QUERIES, keys: int = KEYS) -> Tensor:
    """Random elements, with tiles that are hidden, whole and partial, and rows that see nothing."""
    mask = torch.rand(batch, 1, queries, keys) > 0.5
    mask[:, :, :128, 128:256] = True
    mask[:, :, 128:, :128] = False
    mask[:, :, ::7] = False
    mask[:, :, 1:128:7, 128:256] = True
    return mask


def with_lse(*tensors: Tensor, **options: Any) -> Any:
    return fastformer.attention(*tensors, return_lse=True, **options)


LENGTHS = torch.tensor([170, 300], dtype=torch.int32)
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "bias": lambda: {"bias": torch.randn(1, HEADS, QUERIES, 1), "softcap": 10.0},
    "alibi": lambda: {"alibi_slopes": torch.rand(HEADS) * 0.1, "window": (90, 20), "key_lengths": LENGTHS},
    "relative": lambda: {"relative_bias": torch.randn(HEADS, 101), "sinks": torch.randn(HEADS), "causal": True},
    "dropout": lambda: {"dropout_p": 0.3, "causal": True},
    "chunk": lambda: {"chunk": 100, "alignment": "top_left"},
    "prefix": lambda: {"causal": True, "prefix_lengths": LENGTHS // 2},
}


@pytest.mark.parametrize(
    ("feature", "deterministic"), [*((feature, False) for feature in FEATURES), ("plain", True), ("alibi", True)]
)
def test_attention_matches_float64(feature: str, deterministic: bool, packed: list[bool]) -> None:
    torch.manual_seed(0)
    mask = random_mask(1 if feature in ("plain", "alibi") else BATCH)
    shapes = (HEADS, QUERIES, 8), (2, KEYS, 8), (2, KEYS, 5)
    tensors = [torch.randn(BATCH, *shape) for shape in shapes]
    options = {**FEATURES[feature](), "mask": mask}
    plain = dict(options)
    if "dropout_p" in options:
        torch.manual_seed(1)
        state = torch.randint(0, 2**63 - 1, (2,)).tolist()
        plain["keep"] = reference.dropout_keep(*state, options["dropout_p"], (BATCH, HEADS, QUERIES, KEYS))
    weights = [torch.randn(BATCH, HEADS, QUERIES, 5), torch.randn(BATCH, HEADS, QUERIES)]
    exact = run(reference.attention, [t.double() for t in tensors], as_dtype(plain, torch.float64), weights)
    pytorch = run(reference.attention, tensors, plain, weights)
    torch.use_deterministic_algorithms(deterministic)
    try:
        torch.manual_seed(1)
        actual = run(with_lse, tensors, options, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    assert packed == [False, True]
    names = result_names(options)
    scales = magnitudes(
        *(dict(zip(names, results, strict=True)) for results in (actual, exact)), weights[0], tensors, options
    )
    for name, a, p, e in zip(names, actual, pytorch, exact, strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(e)), f"{name}: infinities differ"
        finite = torch.isfinite(e)
        assert_as_accurate(name, a[finite], p[finite], e[finite], scale=scales[name])


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "bytes"])
@pytest.mark.parametrize("by_key", [False, True])
def test_lists_hold_the_mask_in_any_layout(layout: str, by_key: bool) -> None:
    torch.manual_seed(0)
    mask = random_mask(2)
    if layout == "transposed":
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "expanded":
        mask = mask[:1].expand(2, HEADS, -1, -1)
    elif layout == "bytes":  # what is not zero is True
        mask = (mask.to(torch.uint8) * 6).view(torch.bool)
    tiles = packed_mask._pack(arguments_of(mask), by_key)
    assert tiles.lists.shape[:2] == (1 if layout == "expanded" else 2, 1)
    rows, columns = (KEYS, QUERIES) if by_key else (QUERIES, KEYS)
    shown = shown_in_rows(*tiles, slice(0, 2), slice(0, rows), columns)
    wanted = mask[:, :1] != 0
    assert torch.equal(shown.expand(2, 1, rows, columns), wanted.transpose(2, 3) if by_key else wanted)


def arguments_of(mask: Tensor) -> AttentionArguments:
    """The arguments of a call with this mask and nothing else."""
    found: list[AttentionArguments] = []
    tensors = [torch.randn(BATCH, HEADS, size, 8) for size in (QUERIES, KEYS, KEYS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_mask, "_pays", lambda query, arguments: found.append(arguments))
        fastformer.attention(*tensors, mask=mask)
    return found[0]


@pytest.mark.quick
def test_whole_and_hidden_tiles_are_listed_without_bits() -> None:
    mask = torch.ones(1, 1, 384, 384, dtype=torch.bool).tril()
    lists = listed_tiles(*mask_tiles.mask_tiles(arguments_of_size(mask), 1, by_key=False)).lists
    assert lists[0, 0, :, :3].tolist() == [[0, 1, 2], [1, 1, 5], [2, 1, 8]]
    assert lists[0, 0, 1, 3:].tolist() == [0, 1, 2]


def arguments_of_size(mask: Tensor) -> AttentionArguments:
    return arguments_of(random_mask())._replace(mask=mask, max_seqlen_q=mask.shape[2], max_seqlen_k=mask.shape[3])


@pytest.mark.quick
def test_limits_become_a_part_of_the_mask() -> None:
    """What is left is a call with a block mask, whose tiles may reach beyond the ends."""
    query, mask = torch.randn(BATCH, HEADS, QUERIES, 8), random_mask()
    arguments = arguments_of(mask)._replace(left=70, right=0, chunk=90, key_lengths=LENGTHS)
    result = packed_mask.with_packed_mask(query, arguments)
    assert result.query_lists is not None and result.query_bits is not None
    assert (result.mask, result.left, result.right, result.chunk) == (None, UNBOUNDED, UNBOUNDED, 0)
    q, k = torch.arange(QUERIES) + (LENGTHS - QUERIES)[:, None, None, None], torch.arange(KEYS)
    q = q.transpose(-1, -2)
    wanted = mask & (k <= q) & (k >= q - 70) & (k.div(90, rounding_mode="floor") == q.div(90, rounding_mode="floor"))
    wanted &= k < LENGTHS[:, None, None, None]
    assert torch.equal(
        shown_in_rows(result.query_lists, result.query_bits, slice(0, 2), slice(0, QUERIES), KEYS), wanted
    )


def call(mask: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    shape = (BATCH, options.pop("heads", 2))
    tensors = [torch.randn(*shape, size, 8) for size in (mask.shape[2], mask.shape[3], mask.shape[3])]
    return fastformer.attention(*tensors, mask=mask, **options)


def test_layers_share_a_mask_until_it_changes(packed: list[bool]) -> None:
    mask = random_mask()
    with torch.no_grad():
        first, second = call(mask), call(mask.expand(-1, 2, -1, -1)[:, :1])
        assert torch.equal(first, second)
        assert len(packed) == 1
        # Another part of the same memory, and other limits, are other masks.
        call(mask[:, :, :130])
        call(mask, window=(3, 4))
        assert len(packed) == 3
        mask.logical_not_()
        changed = call(mask)
        assert len(packed) == 4
        assert torch.equal(changed, call(mask.clone()))
        assert not torch.allclose(changed, first)


def test_lengths_that_change_count_too(packed: list[bool]) -> None:
    mask, lengths = random_mask(), LENGTHS.clone()
    with torch.no_grad():
        before = call(mask, key_lengths=lengths)
        lengths -= 100
        after = call(mask, key_lengths=lengths)
    assert len(packed) == 2
    assert torch.equal(after, call(mask, key_lengths=lengths.clone()))
    assert not torch.allclose(after, before)


def test_a_mask_that_is_gone_leaves_nothing(packed: list[bool]) -> None:
    with torch.no_grad():
        for _ in range(3):
            mask = random_mask()
            wanted = call(mask.expand(-1, 2, -1, -1).clone())  # every head its own: not packed
            torch.testing.assert_close(call(mask), wanted)
            del mask
            gc.collect()
            assert not packed_mask._kept
    assert len(packed) == 3


def test_few_masks_are_kept_those_used_last(packed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_mask, "_MOST_KEPT", 3)
    masks = [random_mask(queries=20, keys=20) for _ in range(4)]
    with torch.no_grad():
        for number in (0, 1, 2, 0, 3, 0, 2, 1):
            call(masks[number])
    assert len(packed_mask._kept) == 3
    assert len(packed) == 5  # 0, 1, 2, 3, and 1 once more


def test_a_mask_that_validation_packed_serves_training() -> None:
    mask = random_mask()
    tensors = [torch.randn(BATCH, 2, size, 8, requires_grad=True) for size in (QUERIES, KEYS, KEYS)]
    with torch.inference_mode():
        fastformer.attention(*tensors, mask=mask)
    fastformer.attention(*tensors, mask=mask).sum().backward()
    assert tensors[0].grad is not None


def test_tensors_of_the_same_memory_count_changes_for_themselves(packed: list[bool]) -> None:
    mask, aliases = random_mask(), []
    with torch.no_grad():
        for _ in range(2):
            alias = mask.data
            alias.copy_(random_mask())
            torch.testing.assert_close(call(alias), call(alias.expand(-1, 2, -1, -1).clone()))
            aliases.append(alias)
    assert len(packed) == 2


def test_what_a_replayed_graph_returns_is_not_kept(packed: list[bool]) -> None:
    mask = random_mask()
    torch._C._set_cached_tensors_enabled(True)
    torch._C._add_cached_tensor(mask)
    try:
        with torch.no_grad():
            call(mask)
            call(mask)
    finally:
        torch._C._remove_cached_tensor(mask)
        torch._C._set_cached_tensors_enabled(False)
    assert len(packed) == 2 and not packed_mask._kept


def test_what_is_not_reused_or_counted_stays_dense(packed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_mask()
    wanted = call(mask)
    packed.clear()
    call(mask.expand(-1, 2, -1, -1).clone())  # a mask of each head
    call(mask, heads=1)
    call(mask[:, :, :1].expand(-1, -1, QUERIES, -1))  # the same keys for all queries
    with fastformer.backend("torch"):
        call(mask)
    with packed_mask.masks_as_given():
        call(mask)
    with torch.inference_mode():
        call(mask.clone())
    monkeypatch.setattr(packed_mask, "_FEWEST_ELEMENTS", 1 << 22)
    torch.testing.assert_close(call(mask), wanted)
    assert packed == []


def test_the_backward_and_a_second_layer_pack_nothing_again(packed: list[bool]) -> None:
    mask = random_mask()
    query, key, value = (torch.randn(BATCH, 2, size, 8, requires_grad=True) for size in (QUERIES, KEYS, KEYS))

    def attend(*tensors: Tensor) -> Tensor:
        return fastformer.attention(*tensors, mask=mask)

    plain = attend(query, key, value)
    recomputed = checkpoint(attend, query, key, value, use_reentrant=False)
    wanted = torch.autograd.grad(plain.square().sum(), (query, key, value))
    torch.testing.assert_close(torch.autograd.grad(recomputed.square().sum(), (query, key, value)), wanted)
    assert packed == [False, True]


def test_a_mask_may_change_between_forward_and_backward(packed: list[bool]) -> None:
    mask = random_mask()
    query, key, value = (torch.randn(BATCH, 2, size, 8, requires_grad=True) for size in (QUERIES, KEYS, KEYS))
    wanted = torch.autograd.grad(fastformer.attention(query, key, value, mask=mask).sum(), (query, key, value))
    output = fastformer.attention(query, key, value, mask=mask)
    mask.zero_()
    assert all(map(torch.equal, torch.autograd.grad(output.sum(), (query, key, value)), wanted))


def test_compiled_code_stays_dense(packed: list[bool]) -> None:
    mask = random_mask()
    tensors = [torch.randn(BATCH, 2, size, 8) for size in (QUERIES, KEYS, KEYS)]
    compiled = torch.compile(fastformer.attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            packed.clear()
            expected = fastformer.attention(*tensors, mask=mask)
            torch.testing.assert_close(compiled(*tensors, mask=mask), expected)
            assert packed == [False]  # of the call that is not compiled
            mask.logical_not_()


def test_a_recorded_graph_packs_for_itself(packed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_mask()
    with torch.no_grad():
        wanted = call(mask)
        monkeypatch.setattr(packed_mask, "_is_recorded", lambda tensor: True)
        assert torch.equal(call(mask), wanted) and torch.equal(call(mask), wanted)
    assert packed == [False] * 3
    assert len(packed_mask._kept) == 1


@pytest.mark.parametrize("ignore", [False, True])
def test_hidden_nan_has_no_effect_if_asked(ignore: bool, packed: list[bool]) -> None:
    mask = random_mask()
    mask[..., [3, 140]] = False
    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, 2, size, 8) for size in (QUERIES, KEYS, KEYS))
    wanted = fastformer.attention(query, key, value, mask=mask)
    value[:, :, [3, 140]] = float("nan")
    actual = fastformer.attention(query, key, value, mask=mask, ignore_masked_nan=ignore)
    assert packed == [False, True]
    assert torch.equal(actual.isnan().any(), torch.tensor(not ignore))
    if ignore:
        torch.testing.assert_close(actual, wanted)
