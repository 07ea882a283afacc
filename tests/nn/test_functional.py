"""`scaled_dot_product_attention` takes every shape that PyTorch's takes, and gives what PyTorch gives."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F

import fastformer

pytestmark = pytest.mark.cpu


def drawn_shapes(dims: int, draw: random.Random) -> tuple[list[list[int]], list[int], bool]:
    """Draw shapes of query, key, value and mask, with dimensions of 1 or left out, and whether heads are grouped."""
    grouped = dims > 2 and draw.random() < 0.3
    leading = [draw.choice([2, 3]) for _ in range(dims - 3)]
    heads, queries, keys = 4 if grouped else draw.choice([1, 2, 4]), draw.choice([1, 3, 5]), draw.choice([1, 3, 5])

    def shape(others: list[int], rows: int, columns: int) -> list[int]:
        sizes = [size if draw.random() < 0.8 else 1 for size in leading]
        sizes += [draw.choice(others)] if dims > 2 else []
        left_out = draw.randrange(len(sizes)) if sizes and draw.random() < 0.1 and not grouped else 0
        return [*sizes[left_out:], rows, columns]

    # Without grouped heads, one head broadcasts to all heads.
    of_keys = [1, 2, 4] if grouped else [1, heads, heads]
    shapes = [
        shape([heads] if grouped else of_keys, queries, 8),
        shape(of_keys, keys, 8),
        shape(of_keys, keys, draw.choice([4, 8])),
    ]
    scores = [*torch.broadcast_shapes(*(size[:-3] if grouped else size[:-2] for size in shapes[:2]))]
    scores += [heads, queries, keys] if grouped else [queries, keys]
    mask = [size if draw.random() < 0.7 else 1 for size in scores]
    return shapes, mask[draw.randrange(len(mask)) if draw.random() < 0.6 else 0 :], grouped


@pytest.mark.parametrize("dims", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(40))
def test_drawn_shapes(dims: int, seed: int) -> None:
    torch.manual_seed(seed)
    shapes, mask_shape, grouped = drawn_shapes(dims, random.Random(f"{dims} {seed}"))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    mask = torch.randn(mask_shape)
    for attn_mask in (None, mask, mask > -1.0):
        # PyTorch fails on some masks whose only dimension is the keys.
        theirs = attn_mask[None] if attn_mask is not None and attn_mask.dim() == 1 else attn_mask
        results = []
        for function, given in (
            (F.scaled_dot_product_attention, theirs),
            (fastformer.scaled_dot_product_attention, attn_mask),
        ):
            output = function(*tensors, given, enable_gqa=grouped)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected.nan_to_num(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, head_dim", [(torch.float64, 8), (torch.float32, 260)])
@pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
def test_what_pytorch_computes_takes_every_shape(shape: tuple[int, ...], dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, size, head_dim, dtype=dtype) for size in (4, 5, 5))
    for mask in (None, torch.randn(5, dtype=dtype), torch.randn(4, 5, dtype=dtype), torch.rand(5) > 0.3):
        theirs = mask[None] if mask is not None and mask.dim() == 1 else mask
        expected = F.scaled_dot_product_attention(q, k, v, theirs)
        torch.testing.assert_close(fastformer.scaled_dot_product_attention(q, k, v, mask), expected)
        given = {"key": k, "value": v, "attn_mask": mask}
        (tangent, expected) = (
            torch.func.jvp(functools.partial(function, **given), (q,), (q,))[1]
            for function in (fastformer.scaled_dot_product_attention, softmax_of_products)
        )
        torch.testing.assert_close(tangent, expected)


def softmax_of_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if attn_mask is not None:
        added = attn_mask if attn_mask.is_floating_point() else torch.where(attn_mask, 0.0, -torch.inf)
        scores = scores + added
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("empty", ["head_dim", "value head_dim", "heads"])
def test_nothing_in_a_dimension(empty: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    if empty == "heads":
        found = fastformer.scaled_dot_product_attention(q[:, :0].requires_grad_(), k[:, :0], v[:, :0])
        assert found.shape == (2, 0, 4, 8) and found.requires_grad
        return
    if empty == "head_dim":
        q, k = q[..., :0], k[..., :0]
    else:
        v = v[..., :0]
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(fastformer.scaled_dot_product_attention(q, k, v), expected)


def test_what_pytorch_refuses() -> None:
    q, k, v = torch.randn(3, 2, 3, 4, 5, 8)
    with pytest.raises(
        ValueError, match=r"attn_mask's leading dimensions must broadcast to \(2, 3\); got \(2, 2, 1, 5, 5\)"
    ):
        fastformer.scaled_dot_product_attention(q, k, v, torch.zeros(2, 2, 1, 5, 5))
    with pytest.raises(
        ValueError, match="query has 4 heads, key 2 and value 2; equal numbers are needed, or 1, unless"
    ):
        fastformer.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="query's heads must be a multiple of value's; got 4 and 3"):
        fastformer.scaled_dot_product_attention(q, k, v[:, :, :3], enable_gqa=True)
