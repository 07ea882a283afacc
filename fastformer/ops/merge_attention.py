"""Merge attention over disjoint parts of the keys into attention over all of them."""

from __future__ import annotations

from typing import Any

import torch

from fastformer.backends import use_triton
from fastformer.ops.checks import check_device, check_floating, check_shape
from fastformer.ops.operator import operator

NEGATIVE_INFINITY = float("-inf")


def merge_attention(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint parts of the keys: ``output = sum_i exp(lse_i - lse) output_i``. Differentiable.

    For splits of a cache, a prefix shared by a batch, tree and ring attention. Parts are added in their order, so that
    the result is deterministic.

    Args:
        outputs: (parts, ..., head_dim), each part's attention output; float32, float16 or bfloat16, any strides.
        lses: (parts, ...) float32, each part's log-sum-exp, as `fastformer.attention` and `fastformer.decode_attention`
            return it with ``return_lse=True``. A part whose log-sum-exp is -inf counts for nothing.

    Returns:
        The output (..., head_dim), in the dtype of `outputs`, and its log-sum-exp (...), float32. Zeros and -inf where
        no part has a key.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.

    Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.

    >>> q, k, v = torch.randn(3, 1, 4, 10, 64).unbind()
    >>> halves = [fastformer.attention(q, k[:, :, i], v[:, :, i], return_lse=True) for i in (slice(5), slice(5, 10))]
    >>> outputs, lses = (torch.stack(part) for part in zip(*halves))
    >>> torch.testing.assert_close(fastformer.merge_attention(outputs, lses)[0], fastformer.attention(q, k, v))
    """
    check_floating("outputs", outputs)
    if outputs.dim() < 2 or 0 in (outputs.shape[0], outputs.shape[-1]):
        raise ValueError(
            f"outputs must be (parts, ..., head_dim), parts and head_dim at least 1; got shape {tuple(outputs.shape)}"
        )
    if lses.dtype != torch.float32:
        raise TypeError(f"lses must be float32; got {lses.dtype}")
    check_shape("lses", lses, tuple(outputs.shape[:-1]))
    check_device("lses", lses, "outputs", outputs)
    rows = tuple(outputs.shape[1:-1])
    if not rows:
        outputs, lses = outputs[:, None], lses[:, None]
    output, lse = _merge_attention(outputs.flatten(1, -2), lses.flatten(1))
    return output.view(*rows, outputs.shape[-1]), lse.view(rows)


@operator("fastformer::merge_attention", mutates_args=())
def _merge_attention(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_triton(outputs):
        return _merge_torch(outputs, lses)
    from fastformer_kernels.attention.merge import merge

    output, lse = _empty_results(outputs, lses)
    merge(outputs, lses, output, lse)
    return output, lse


@_merge_attention.register_fake
def _(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_results(outputs, lses)


def _empty_results(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs.new_empty(outputs.shape[1:]), lses.new_empty(lses.shape[1:])


def _merge_torch(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros(outputs.shape[1:], dtype=torch.float32, device=outputs.device)
    for output, weight, lse in zip(outputs, _weights(lses), lses, strict=True):
        total += (output * weight[:, None]).masked_fill_((lse == NEGATIVE_INFINITY)[:, None], 0.0)
    return total.to(outputs.dtype), torch.logsumexp(lses, 0)


def _weights(lses: torch.Tensor) -> torch.Tensor:
    """(parts, rows): the share of each part, 0 for one without keys."""
    return torch.softmax(lses, 0).masked_fill_(lses == NEGATIVE_INFINITY, 0.0)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d output_i = w_i d output; d lse_i = w_i (p_i - sum_j w_j p_j + d lse) with p_i = d output . output_i."""
    outputs, lses = ctx.saved_tensors
    weights = _weights(lses)
    products = (outputs.float() * grad_output.float()).sum(-1).masked_fill(lses == NEGATIVE_INFINITY, 0.0)
    grad_lses = weights * (products - (weights * products).sum(0) + grad_lse)
    return (weights[..., None] * grad_output.float()).to(outputs.dtype), grad_lses


_merge_attention.register_autograd(_backward, setup_context=_setup_context)
