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

    For splits of a cache, for a prefix that a batch shares, and for tree and ring attention. Parts are added in their
    order, so the result is deterministic.

    Args:
        outputs: (parts, ..., head_dim), each part's attention output; float32, float16 or bfloat16, any strides.
        lses: (parts, ...) float32, each part's log-sum-exp, as `fastformer.attention` and `fastformer.decode_attention`
            return it with ``return_lse=True``. A part whose log-sum-exp is -inf has no effect.

    Returns:
        The output (..., head_dim), in the dtype of `outputs`, and its log-sum-exp (...), float32. Where no part has a
        key, they are zeros and -inf.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.

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
    if lses.shape != outputs.shape[:-1]:
        check_shape("lses", lses, outputs.shape[:-1])
    check_device("lses", lses, "outputs", outputs)
    return _merge_attention(outputs, lses)


@operator("fastformer::merge_attention", mutates_args=())
def _merge_attention(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_triton(outputs):
        return _merge_torch(outputs, lses)
    from fastformer_kernels.attention.merge import merge

    output, lse = _empty_results(outputs, lses)
    parts, head_dim = outputs.shape[0], outputs.shape[-1]
    merge(outputs.reshape(parts, -1, head_dim), lses.reshape(parts, -1), output, lse)
    return output, lse


@_merge_attention.register_fake
def _(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_results(outputs, lses)


def _empty_results(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs.new_empty(outputs.shape[1:]), lses.new_empty(lses.shape[1:])


def _merge_torch(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absent = _absent(lses)
    first, *others = zip(outputs.unbind(), _weights(lses, absent).unsqueeze(-1).unbind(), strict=True)
    if absent is None:
        total = torch.mul(*first)
        for part in others:
            total.addcmul_(*part)
    else:
        nothing = absent.unsqueeze(-1).unbind()
        total = torch.mul(*first).masked_fill_(nothing[0], 0.0)
        for (output, weight), none in zip(others, nothing[1:], strict=True):
            total += (output * weight).masked_fill_(none, 0.0)
    return total.to(outputs.dtype), torch.logsumexp(lses, 0)


def _absent(lses: torch.Tensor) -> torch.Tensor | None:
    """True where a part has no keys. On a CPU, where values can be read, None if there is no such place."""
    absent = lses == NEGATIVE_INFINITY
    return None if absent.is_cpu and not absent.any() else absent


def _weights(lses: torch.Tensor, absent: torch.Tensor | None) -> torch.Tensor:
    """The weight of each part, (parts, ...); 0 for a part without keys."""
    weights = torch.softmax(lses, 0)
    return weights if absent is None else weights.masked_fill(absent, 0.0)


@_merge_attention.register_formula
def _(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absent = lses == NEGATIVE_INFINITY
    nowhere = absent.all(0)
    lses = lses.masked_fill(nowhere, 0.0)
    weights = torch.softmax(lses, 0).masked_fill(absent, 0.0).unsqueeze(-1)
    merged = (outputs.float().masked_fill(absent.unsqueeze(-1), 0.0) * weights).sum(0)
    return merged.to(outputs.dtype), torch.logsumexp(lses, 0).masked_fill(nowhere, NEGATIVE_INFINITY)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Compute ``d output_i = w_i d output`` and ``d lse_i = w_i (p_i - sum_j w_j p_j + d lse)``.

    Here ``p_i = d output . output_i``.
    """
    outputs, lses = ctx.saved_tensors
    absent = lses == NEGATIVE_INFINITY
    weights = _weights(lses, absent)
    grad_outputs = grad_lses = None
    if grad_output is not None:
        grad_output = grad_output.float()
        grad_outputs = (weights.unsqueeze(-1) * grad_output).to(outputs.dtype)
    if grad_output is not None and ctx.needs_input_grad[1]:
        products = (outputs * grad_output).sum(-1).masked_fill(absent, 0.0)
        grad_lses = weights * (products - (weights * products).sum(0))
    if grad_lse is not None:
        of_lse = weights * grad_lse
        grad_lses = of_lse if grad_lses is None else grad_lses + of_lse
    return grad_outputs, grad_lses


_merge_attention.register_autograd(_backward, setup_context=_setup_context)
