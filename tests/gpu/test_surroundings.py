"""Results do not depend on memory next to a tensor or on its old contents, and kernels write nothing outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu.judging import SEED, Call, assert_same, deterministic, output_grads, results, run
from gpu.making import Maker
from torch import Tensor

from fastformer.ops import (
    append_to_cache,
    cross_entropy,
    decode_attention,
    rotary,
    rotary_frequencies,
    rotary_table,
    softmax,
)

ROWS, COLUMNS = 8, 16  # the size of a frame, which keeps aligned rows aligned
NAN = float("nan")


@contextmanager
def poisoned_memory(dry: bool) -> Iterator[None]:
    """Make `torch.empty` return memory whose bits are all ones: NaN, or -1.

    The allocator takes the smallest free block that is large enough. So many blocks of all sizes are filled that holes
    between living tensors are among them. In a dry run PyTorch's deterministic mode fills the memory.
    """
    if dry:
        with deterministic(fill=True):
            yield
        return
    torch.cuda.empty_cache()
    numbers = {1 << 30: 3, 1 << 22: 100, 1 << 19: 200, 1 << 15: 500, 1 << 10: 2000}
    sizes = [size for size, number in numbers.items() for _ in range(number)]
    blocks = [torch.empty(size, dtype=torch.uint8, device="cuda").fill_(255) for size in sizes]
    del blocks
    for elements in (1 << 8, 1 << 20):
        assert torch.empty(elements, device="cuda").isnan().all(), "memory is not poisoned"
    yield


def test_memory_that_was_used_before(call: Call, dry: bool) -> None:
    """Every result is written completely, and no scratch memory is read before it is written."""
    expected = run(call, torch.bfloat16)
    inputs, grads = call.inputs(torch.bfloat16), output_grads(call, torch.bfloat16)
    torch.manual_seed(SEED)
    with poisoned_memory(dry):
        actual = results(call.operator, inputs, grads)
    assert_same(actual, expected)


def framed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of the tensor in a frame of NaN around its last two dimensions, and the copy with its frame."""
    frame = [COLUMNS] if tensor.dim() == 1 else [*[0] * (tensor.dim() - 2), ROWS, COLUMNS]
    whole = tensor.new_full([size + 2 * extra for size, extra in zip(tensor.shape, frame, strict=True)], NAN)
    view = whole[tuple(slice(extra, extra + size) for size, extra in zip(tensor.shape, frame, strict=True))]
    return view.copy_(tensor), whole


def test_inputs_within_nan(call: Call) -> None:
    expected = run(call, torch.bfloat16)
    inputs, grads = call.inputs(torch.bfloat16), output_grads(call, torch.bfloat16)
    inputs = [framed(tensor)[0] for tensor in inputs]
    grads = None if grads is None else [framed(grad)[0] if grad.dim() else grad for grad in grads]
    torch.manual_seed(SEED)
    assert_same(results(call.operator, inputs, grads), expected)


def _softmax(make: Maker, x: Tensor) -> None:
    softmax(x, inplace=True)


def _rotary(make: Maker, x: Tensor) -> None:
    tables = rotary_table(rotary_frequencies(x.shape[1] // 2 * 2), x.shape[0], device=make.device)
    rotary(x[None, None], None, *tables, inplace=True)


def _cross_entropy(make: Maker, x: Tensor) -> None:
    """A cross-entropy whose gradient is written over the logits."""
    logits = x.detach().requires_grad_()
    target = make.integers(x.shape[1], x.shape[0])
    torch.autograd.grad(cross_entropy(logits.view_as(logits), target, inplace=True), logits)


def _append(make: Maker, x: Tensor) -> None:
    tokens = make.normal(1, 1, 3, x.shape[1]).to(x.dtype)
    append_to_cache(tokens, tokens, x[None, None], x.clone()[None, None], lengths=make.tensor([1], torch.int32))


@pytest.mark.parametrize("write", [_softmax, _rotary, _cross_entropy, _append], ids=lambda each: each.__name__[1:])
@pytest.mark.parametrize("aligned", [True, False])
def test_nothing_is_written_beside(write: Callable[[Maker, Tensor], None], aligned: bool, make: Maker) -> None:
    columns = make.size(256, 32) - (0 if aligned else 7)
    x, whole = framed(make.normal(make.size(1000, 9), columns).bfloat16())
    before = x.clone()
    write(make, x)
    assert not torch.equal(x, before) and torch.isfinite(x).all()
    assert torch.equal(whole.isnan(), framed(before)[1].isnan())


@pytest.mark.parametrize("paged", [False, True])
def test_what_lies_beyond_a_cache_s_length(paged: bool, make: Maker) -> None:
    """Decoding reads nothing beyond a cache's length, where keys and values are NaN and page numbers are invalid."""
    batch, kv_heads, head_dim, page_size, pages = 3, 2, make.size(128, 8), make.size(16, 4), make.size(200, 6)
    lengths = make.tensor([1, page_size * 2, page_size * pages - 3], torch.int32)
    shape = (batch * pages, page_size, kv_heads, head_dim) if paged else (batch, kv_heads, pages * page_size, head_dim)
    query = make.normal(batch, 8, 1, head_dim).bfloat16()
    caches = [make.normal(*shape).bfloat16() for _ in range(2)]
    position = torch.arange(pages * page_size, device=make.device)
    beyond = position >= lengths[:, None]
    table = torch.arange(batch * pages, device=make.device, dtype=torch.int32).view(batch, pages) if paged else None
    expected = decode_attention(query, *caches, lengths=lengths, block_table=table)
    if table is not None:
        table = table.masked_fill(position[None, ::page_size] >= lengths[:, None], 2**31 - 1)
    in_order = beyond.view(batch * pages, page_size, 1, 1) if paged else beyond[:, None, :, None]
    caches = [cache.masked_fill(in_order, NAN) for cache in caches]
    actual = decode_attention(query, *caches, lengths=lengths, block_table=table)
    assert isinstance(actual, Tensor) and isinstance(expected, Tensor)
    assert_same([actual], [expected], exactly=True)
