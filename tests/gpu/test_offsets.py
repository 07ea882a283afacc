"""Tensors of more than 2^31 elements are right in the rows beyond this border too.

Only one test at a time may take this much memory. Some rows are judged alone, by the usual rule of accuracy.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from fastformer_kernels.plans import forced_plan
from gpu.judging import Function, assert_within, results
from gpu.making import Maker
from torch import Tensor

from fastformer import ops

pytestmark = [pytest.mark.usefixtures("much_memory"), pytest.mark.slow]
BF16 = torch.bfloat16
BORDER = 2**31


def rows_beyond(make: Maker, row: int) -> int:
    """Return a number of rows of `row` elements, so large that the last rows begin beyond the border."""
    return make.size(BORDER // row + 40, 60)


def chosen(rows: int, row: int) -> list[int]:
    """Return the first rows, one in the middle, those at the border, and the last ones."""
    at_border = min(rows - 2, BORDER // row)
    return sorted({0, 1, rows // 2, at_border - 1, at_border, at_border + 1, rows - 2, rows - 1})


def some(x: Tensor, rows: list[int]) -> Tensor:
    """Copy the rows, each from a view whose offset PyTorch computes on the CPU."""
    return torch.stack([x[row] for row in rows])


def judge_rows(
    operator: Function, exact: Function, x: Tensor, shared: list[Tensor], grad: Tensor, pytorch: Function | None = None
) -> None:
    """Judge output and gradient of some rows of `x` (rows, ...), all with the same row of the output's gradient."""
    rows = chosen(len(x), x[0].numel())
    leaf = x.detach().requires_grad_()
    output = operator(leaf, *shared)
    (grad_x,) = torch.autograd.grad(output, leaf, grad.expand_as(output))
    actual = [some(output.detach(), rows), some(grad_x, rows)]
    few, grads = some(x, rows), [grad.expand_as(actual[0])]
    wanted = results(lambda x: exact(x, *(t.double() for t in shared)), [few.double()], grads)
    own = results(lambda x: (pytorch or exact)(x, *shared), [few], grads)
    for name, a, p, e in zip(("output", "gradient"), actual, own, wanted, strict=True):
        assert_within(name, a, p, e, units=1.0)


def test_softmax(make: Maker) -> None:
    columns = make.size(65_536, 33)
    x = make.normal(rows_beyond(make, columns), columns, dtype=BF16)
    grad = make.normal(1, columns, dtype=BF16)
    judge_rows(ops.softmax, lambda x: reference.softmax(x, -1), x, [], grad, pytorch=lambda x: x.softmax(-1))


@pytest.mark.parametrize("columns", [4096, 65_536])
def test_layer_norm(columns: int, make: Maker) -> None:
    columns = make.size(columns, columns // 256)
    x = make.normal(rows_beyond(make, columns), columns, dtype=BF16)
    weight, bias = (make.normal(columns, dtype=BF16) for _ in range(2))
    judge_rows(
        lambda x, weight, bias: ops.layer_norm(x, (columns,), weight, bias, 1e-5),
        lambda x, weight, bias: reference.layer_norm(x, weight, bias, 1e-5),
        x,
        [weight, bias],
        make.normal(1, columns, dtype=BF16),
        pytorch=lambda x, weight, bias: F.layer_norm(x, (columns,), weight, bias, 1e-5),
    )


def test_cross_entropy(make: Maker) -> None:
    classes = make.size(128_256, 70)
    x = make.normal(rows_beyond(make, classes), classes, dtype=BF16)
    target = make.integers(classes, len(x))
    targets = some(target, chosen(len(x), classes))

    def exact(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, reduction="none").to(logits.dtype)

    judge_rows(lambda x: ops.cross_entropy(x, target, reduction="none"), exact, x, [], make.normal(1, dtype=BF16))


def test_feed_forward(make: Maker) -> None:
    """Feed-forward is right when its hidden layer extends beyond the border."""
    features, intermediate = make.size(64, 8), make.size(16_384, 40)
    x = make.normal(rows_beyond(make, intermediate), features, dtype=BF16)
    up = make.normal(intermediate, features, scale=features**-0.5, dtype=BF16)
    down = make.normal(features, intermediate, scale=intermediate**-0.5, dtype=BF16)

    def exact(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return reference.feed_forward(x, up, down, None, None, None, None, "relu")

    with forced_plan("fused"):
        judge_rows(
            lambda x, up, down: ops.feed_forward(x, up, down, activation="relu"),
            exact,
            x,
            [up, down],
            make.normal(1, features, dtype=BF16),
        )


def test_rotary(make: Maker) -> None:
    """Rotary embedding is right beyond the border, in place, in one sequence as a projection gives it."""
    heads, head_dim = make.size(32, 2), make.size(128, 8)
    tokens = rows_beyond(make, heads * head_dim)
    x = make.normal(tokens, heads, head_dim, dtype=BF16)
    rows = chosen(tokens, heads * head_dim)
    before = some(x, rows)
    frequencies = ops.rotary_frequencies(head_dim)
    ops.rotary(x.transpose(0, 1)[None], None, *ops.rotary_table(frequencies, tokens, device=make.device), inplace=True)
    angles = (make.tensor(rows, torch.float64)[:, None] * frequencies.to(make.device))[:, None]
    exact = reference.rotary(before, angles, interleaved=False)
    assert_within("rotated", some(x, rows), exact.to(BF16), exact, units=1.0)


def test_embedding(make: Maker) -> None:
    """Embedding is right with a table beyond the border, whose gradient is zero except for words that occur."""
    hidden = make.size(4096, 24)
    words = rows_beyond(make, hidden)
    rows = chosen(words, hidden)
    table = make.normal(words, hidden, dtype=BF16)
    weight, bias = (make.normal(hidden, dtype=BF16) for _ in range(2))
    ids = make.tensor(rows * 4, torch.int64)[None]
    grad = make.normal(1, ids.shape[1], hidden, dtype=BF16)
    leaf = table.requires_grad_()
    output = ops.transformer_embedding(ids, leaf, norm_weight=weight, norm_bias=bias, eps=1e-5)
    (grad_table,) = torch.autograd.grad(output, leaf, grad)
    places = torch.arange(len(rows), device=make.device).repeat(4)[None]

    def exact(few: Tensor) -> Tensor:
        return F.layer_norm(few[places], (hidden,), weight.to(few), bias.to(few), 1e-5)

    few = some(table.detach(), rows)
    wanted, own = (results(exact, [tensor], [grad]) for tensor in (few.double(), few))
    for name, a, p, e in zip(
        ("output", "gradient"), (output.detach(), some(grad_table, rows)), own, wanted, strict=True
    ):
        assert_within(name, a, p, e, units=1.0)
    for row in rows:
        grad_table[row] = 0.0
    assert not grad_table.any()


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed: bool, make: Maker) -> None:
    """Attention with a window is right where queries, outputs and gradients extend beyond the border, at its end."""
    heads, head_dim, reach = make.size(32, 2), make.size(64, 8), make.size(128, 4)
    tokens, tail = rows_beyond(make, heads * head_dim) + 3 * reach, 4 * reach
    query = make.normal(tokens, heads, head_dim, dtype=BF16)
    key, value = (make.normal(tokens, 1, head_dim, dtype=BF16) for _ in range(2))
    grad = make.normal(1, 1, head_dim, dtype=BF16)
    options: dict[str, Any] = {"causal": True, "window": (reach, None)}

    def dense(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1)[None]

    def operator(*tensors: Tensor) -> Any:
        if not packed:
            return ops.attention(*map(dense, tensors), **options)[0].transpose(0, 1)
        ends = make.tensor([0, tokens], torch.int32)
        return ops.attention(*tensors, cu_seqlens_q=ends, max_seqlen_q=tokens, **options)

    def exact(*tensors: Tensor) -> Tensor:
        return reference.attention(*map(dense, tensors), **options)[0][0].transpose(0, 1)

    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = operator(*leaves)
    found = [output.detach(), *torch.autograd.grad(output, leaves, grad.expand_as(output))]
    ends = [tensor.detach()[-tail:] for tensor in leaves]
    grads = [grad.expand(tail, heads, head_dim)]
    own, wanted = results(exact, ends, grads), results(exact, [end.double() for end in ends], grads)
    # From row `reach` of the tail on, whole windows lie in the tail.
    for name, a, p, e in zip(("output", "query", "key", "value"), found, own, wanted, strict=True):
        assert_within(name, a[-tail + reach :], p[reach:], e[reach:], units=1.0)


def test_merge_attention(make: Maker) -> None:
    head_dim = make.size(128, 12)
    rows = rows_beyond(make, head_dim * 2)
    outputs, lses = make.normal(2, rows, head_dim, dtype=BF16), make.normal(2, rows)
    few = chosen(rows, head_dim * 2)
    merged, lse = ops.merge_attention(outputs, lses)
    wide = some(lses.T, few).T.double()
    exact = (some(outputs.transpose(0, 1), few).transpose(0, 1).double() * wide.softmax(0)[..., None]).sum(0)
    assert_within("output", some(merged, few), exact.to(BF16), exact, units=1.0)
    assert_within(
        "lse", some(lse, few), wide.logsumexp(0).float(), wide.logsumexp(0), units=5.0
    )  # exponents are below 5


def test_cache(make: Maker) -> None:
    """Pages beyond the border are written and attended to like those of a small cache."""
    kv_heads, head_dim, page_size = make.size(8, 2), make.size(128, 8), 16
    pages, used = rows_beyond(make, kv_heads * head_dim * page_size), make.size(39, 5)
    caches = [torch.zeros(pages, page_size, kv_heads, head_dim, device=make.device, dtype=BF16) for _ in range(2)]
    small = [cache[:used].clone() for cache in caches]
    tokens = used * page_size - 3
    query, key, value = (
        make.normal(1, heads, tokens, head_dim, dtype=BF16) for heads in (2 * kv_heads, *[kv_heads] * 2)
    )
    last = torch.arange(pages - used, pages, device=make.device, dtype=torch.int32)[None]
    attended = []
    for written, table in ((caches, last), (small, last - last[0, 0])):
        lengths = make.tensor([0], torch.int32)
        ops.append_to_cache(key, value, *written, lengths=lengths, block_table=table)
        attended.append(ops.decode_attention(query[:, :, -1:], *written, lengths=lengths + tokens, block_table=table))
    assert torch.equal(attended[0], attended[1])
    assert all(
        torch.equal(cache[-used:], few) and not cache[:-used].any() for cache, few in zip(caches, small, strict=True)
    )
