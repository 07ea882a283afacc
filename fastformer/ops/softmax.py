"""Softmax and log-softmax along one dimension, with optional scale and mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import autocast_float32_dtype
from fastformer.ops.checks import FLOATING_DTYPES, broadcasts, check_device, check_floating
from fastformer.ops.operator import in_dtype, operator, runs_in_pytorch


def softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    alignment: str = "bottom_right",
    inplace: bool = False,
) -> Tensor:
    """Softmax: ``y_i = exp(s_i) / sum_j exp(s_j)`` along `dim`, with ``s = scale * input + mask``.

    The first three arguments are those of `torch.nn.functional.softmax`.

    Args:
        input: float32, float16 or bfloat16, any shape, any strides.
        dim: the dimension to normalise; negative counts from the end.
        dtype: the result's, float32, float16 or bfloat16; by default input's. `input` (of any dtype but complex) is
            converted to it first.
        mask: boolean, True = takes part, or floating, added to the scaled input; broadcasts to input's shape. A
            floating one is differentiable.
        scale: multiplies the input.
        causal: `dim`, which must be one of the last two dimensions, counts keys and the other one counts queries. No
            key after a query's own position takes part.
        alignment: the own position of a query when queries and keys differ in number: "bottom_right" (the last query is
            at the last key) or "top_left" (the first query is at the first key).
        inplace: overwrite `input` with the result and return it. Autograd's rules for in-place operations hold.
            Use the returned tensor: torch.compile before PyTorch 2.13 does not take gradients through the argument.

    Returns:
        A tensor of input's shape, accumulated in float32. A row in which nothing takes part gives zeros and no gradient
        (PyTorch: NaN).

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.
        IndexError: `dim` is out of range.

    >>> fastformer.softmax(torch.tensor([0.0, 0.0, float("-inf")]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    return _checked_softmax(input, dim, dtype, mask, scale, causal, alignment, inplace, log=False)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    alignment: str = "bottom_right",
    inplace: bool = False,
) -> Tensor:
    """Log-softmax: ``y_i = s_i - log sum_j exp(s_j)`` along `dim`, with ``s = scale * input + mask``.

    Arguments and errors as in `softmax`. Excluded elements give ``-inf``, and their gradients are dropped.
    """
    return _checked_softmax(input, dim, dtype, mask, scale, causal, alignment, inplace, log=True)


def _checked_softmax(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    alignment: str,
    inplace: bool,
    log: bool,
) -> Tensor:
    if dtype is None:
        check_floating("input", input)
        output_dtype = input.dtype if inplace else autocast_float32_dtype(input)
    elif dtype not in FLOATING_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
    elif inplace and dtype != input.dtype:
        raise TypeError(f"dtype must be input's, {input.dtype}, when inplace=True; got {dtype}")
    elif input.is_complex():
        raise TypeError(f"input must be real; got {input.dtype}")
    else:
        output_dtype = dtype
    if input.dim() == 0 and dim in (-1, 0) and mask is None and not (causal or inplace):
        # Treat a scalar as a row of one element.
        return _checked_softmax(input[None], 0, dtype, mask, scale, causal, alignment, inplace, log)[0]
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim must be in [{-input.dim()}, {input.dim() - 1}] for a {input.dim()}-D input; got {dim}")
    if mask is not None:
        _check_mask(mask, input)
    causal_offset = _causal_offset(input, dim, alignment) if causal else None
    if inplace:
        return _InplaceSoftmax.apply(input, mask, dim, scale, causal_offset, log)
    if input.dtype == output_dtype:
        if mask is None and scale == 1.0 and not causal and runs_in_pytorch(input):
            output = _softmax_of_pytorch(input, dim, log)
            if output is not None:
                return output
    elif torch.promote_types(input.dtype, output_dtype) != output_dtype or input.dtype not in FLOATING_DTYPES:
        input = input.to(output_dtype)
    return _softmax(input, mask, dim, scale, causal_offset, log, output_dtype)


def _softmax_of_pytorch(input: Tensor, dim: int, log: bool) -> Tensor | None:
    """Return PyTorch's softmax with its derivative; None where our operator gives another result."""
    if not input.numel():
        return None
    output = torch.log_softmax(input, dim) if log else torch.softmax(input, dim)
    found = output.detach()
    if log and output.requires_grad:
        # An excluded element needs our gradient rule, and NaN fails this comparison too.
        return output if found.amin() > -math.inf else None
    return None if _has_row_of_nan(found, dim) else output


def _has_row_of_nan(output: Tensor, dim: int) -> bool:
    """Whether a softmax on a CPU has a row of NaN. Such a row is NaN from its first element on."""
    return math.isnan(output.select(dim, 0).sum())


def _check_mask(mask: Tensor, input: Tensor) -> None:
    check_device("mask", mask, "input", input)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING_DTYPES:
        raise TypeError(
            "mask must be boolean (True = takes part), float32, float16 or bfloat16 (added to the scaled input); got "
            f"{mask.dtype}"
        )
    given, wanted = tuple(mask.shape), tuple(input.shape)
    if not broadcasts(given, wanted):
        raise ValueError(f"mask must broadcast to input's shape, {wanted}; got {given}")


def _causal_offset(input: Tensor, dim: int, alignment: str) -> int:
    """Return a query's own position among the keys minus its index."""
    if alignment not in ("bottom_right", "top_left"):
        raise ValueError(f"alignment must be 'bottom_right' or 'top_left'; got {alignment!r}")
    if input.dim() < 2 or dim % input.dim() < input.dim() - 2:
        raise ValueError(
            f"causal needs an input of two or more dimensions with dim one of the last two; got dim={dim} of a "
            f"{input.dim()}-D input"
        )
    keys, queries = input.shape[dim], input.shape[_query_dim(input, dim)]
    return keys - queries if alignment == "bottom_right" else 0


def _query_dim(input: Tensor, dim: int) -> int:
    return -2 if dim in (-1, input.dim() - 1) else -1


@operator("fastformer::softmax")
def _softmax(
    input: Tensor,
    mask: Tensor | None,
    dim: int,
    scale: float,
    causal_offset: int | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    output = torch.empty_like(input, dtype=dtype)
    _run_softmax(input, output, mask, dim, scale, causal_offset, log)
    return output


@operator("fastformer::softmax_", mutates_args=("input",))
def _softmax_inplace(
    input: Tensor, mask: Tensor | None, dim: int, scale: float, causal_offset: int | None, log: bool
) -> None:
    _run_softmax(input, input, mask, dim, scale, causal_offset, log)


@operator("fastformer::softmax_backward")
def _softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, scale: float, log: bool, dtype: torch.dtype
) -> Tensor:
    grad_input = torch.empty_like(output, dtype=dtype)
    if output.numel() == 0:
        return grad_input
    if use_triton(output):
        from fastformer_kernels.softmax import softmax_backward

        softmax_backward(grad_output, output, grad_input, dim, scale=scale, log=log)
    else:
        _softmax_backward_torch(grad_output, output, grad_input, dim, scale, log)
    return grad_input


@_softmax.register_fake
def _(
    input: Tensor,
    mask: Tensor | None,
    dim: int,
    scale: float,
    causal_offset: int | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(input, dtype=dtype)


@_softmax_backward.register_fake
def _(grad_output: Tensor, output: Tensor, dim: int, scale: float, log: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(output, dtype=dtype)


@_softmax.register_formula
def _(
    input: Tensor,
    mask: Tensor | None,
    dim: int,
    scale: float,
    causal_offset: int | None,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    scores = in_dtype(input, torch.float32) * scale
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
        scores = (scores if mask.dtype == torch.bool else scores + mask).masked_fill(hidden, -math.inf)
    if causal_offset is not None:
        scores = scores.masked_fill(_later_keys(scores, dim, causal_offset), -math.inf)
    maximum = scores.detach().amax(dim, keepdim=True) if scores.numel() else scores.detach()
    shifted = scores - maximum.masked_fill(maximum == -math.inf, 0.0)
    total = shifted.exp().sum(dim, keepdim=True)
    total = total.masked_fill(total == 0.0, 1.0)
    if not log:
        return in_dtype(shifted.exp() / total, dtype)
    # Excluded elements are -inf, whatever their tangents.
    return in_dtype((shifted - total.log()).masked_fill(scores == -math.inf, -math.inf), dtype)


@_softmax_backward.register_formula
def _(grad_output: Tensor, output: Tensor, dim: int, scale: float, log: bool, dtype: torch.dtype) -> Tensor:
    grad, y = grad_output.float(), output.float()
    if log:
        absent = output == -math.inf
        grad = grad.masked_fill(absent, 0.0)
        gradient = grad - y.exp() * grad.sum(dim, keepdim=True)
    else:
        gradient = y * (grad - (grad * y).sum(dim, keepdim=True))
    return (gradient * scale).to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mask, ctx.dim, ctx.scale, _, ctx.log, _ = inputs
    ctx.input_dtype = input.dtype
    if mask is not None:
        ctx.mask_dtype, ctx.mask_shape = mask.dtype, mask.shape
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (output,) = ctx.saved_tensors
    return *_input_and_mask_gradients(ctx, grad_output, output), None, None, None, None, None


_softmax.register_autograd(_backward, setup_context=_setup_context)
_softmax.register_decomposition(backward=_backward, setup_context=_setup_context)
_softmax_backward.register_decomposition()


class _InplaceSoftmax(torch.autograd.Function):
    """A softmax in place with a derivative: PyTorch accepts registered derivatives only for functional operators."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, mask: Tensor | None, dim: int, scale: float, causal_offset: int | None, log: bool
    ) -> Tensor:
        _softmax_inplace(input, mask, dim, scale, causal_offset, log)
        ctx.mark_dirty(input)
        _setup_context(ctx, (input, mask, dim, scale, causal_offset, log, input.dtype), input)
        return input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return *_input_and_mask_gradients(ctx, grad_output, output), None, None, None, None


def _input_and_mask_gradients(ctx: Any, grad_output: Tensor, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    input_needs_grad, mask_needs_grad = ctx.needs_input_grad[:2]
    grad_input = grad_mask = None
    if mask_needs_grad:
        # In float32, since the sum over the mask's broadcast dimensions would add up the rounding of every term.
        dtype = ctx.mask_dtype if ctx.mask_shape == output.shape else torch.float32
        grad_mask = _softmax_backward(grad_output, output, ctx.dim, 1.0, ctx.log, dtype)
        grad_mask = grad_mask.sum_to_size(ctx.mask_shape).to(ctx.mask_dtype)
    if input_needs_grad:
        grad_input = _softmax_backward(grad_output, output, ctx.dim, ctx.scale, ctx.log, ctx.input_dtype)
    return grad_input, grad_mask


def _run_softmax(
    input: Tensor, output: Tensor, mask: Tensor | None, dim: int, scale: float, causal_offset: int | None, log: bool
) -> None:
    if input.numel() == 0:
        return
    mask = None if mask is None else mask.expand(input.shape)
    if use_triton(input):
        from fastformer_kernels.softmax import softmax_forward

        softmax_forward(input, output, dim, mask=mask, scale=scale, causal_offset=causal_offset, log=log)
    else:
        _softmax_torch(input, output, mask, dim, scale, causal_offset, log)


def _softmax_torch(
    input: Tensor, output: Tensor, mask: Tensor | None, dim: int, scale: float, causal_offset: int | None, log: bool
) -> None:
    scores = input
    if scale != 1.0 or (mask is not None and mask.dtype != torch.bool):
        scores = input.float() * scale
    excluded = None if causal_offset is None else _later_keys(scores, dim, causal_offset)
    if mask is not None and mask.dtype == torch.bool:
        excluded = ~mask if excluded is None else excluded | ~mask
    elif mask is not None:
        scores.add_(mask)
        # A mask of -inf excludes an element even if its score is NaN.
        hidden = mask == -math.inf
        excluded = hidden if excluded is None else excluded | hidden
    if excluded is not None:
        scores = scores.masked_fill(excluded, float("-inf"))
    # Search before the scores are overwritten; otherwise PyTorch's NaN shows the empty rows.
    look_first = scores is output or output.device.type != "cpu"
    empty_row = _empty_rows(scores, dim) if look_first else None
    function = torch.log_softmax if log else torch.softmax
    if scores.dtype == output.dtype:
        function(scores, dim, out=output)
    else:
        output.copy_(function(scores, dim, torch.promote_types(scores.dtype, output.dtype)))
    if empty_row is None and _has_row_of_nan(output, dim):
        empty_row = _empty_rows(scores, dim)
    if empty_row is not None:
        output.masked_fill_(empty_row, float("-inf") if log else 0.0)


def _empty_rows(scores: Tensor, dim: int) -> Tensor:
    return scores.amax(dim, keepdim=True) == float("-inf")


def _later_keys(scores: Tensor, dim: int, causal_offset: int) -> Tensor:
    """True where a key comes after its query; broadcasts to scores' shape."""
    query_dim = _query_dim(scores, dim)
    keys = torch.arange(scores.shape[dim], device=scores.device)
    queries = torch.arange(scores.shape[query_dim], device=scores.device)
    return keys > queries[:, None] + causal_offset if query_dim == -2 else keys[:, None] > queries + causal_offset


def _softmax_backward_torch(
    grad_output: Tensor, output: Tensor, grad_input: Tensor, dim: int, scale: float, log: bool
) -> None:
    grad_output = grad_output.to(output.dtype)
    # On a CPU one check is cheaper than two passes that mostly change nothing.
    if log and (output.device.type != "cpu" or output.amin() == float("-inf")):
        grad_output = grad_output.masked_fill(output == float("-inf"), 0.0)
    backward = torch._log_softmax_backward_data if log else torch._softmax_backward_data
    # PyTorch writes as if the memory were contiguous.
    if scale == 1.0 and grad_input.dtype == output.dtype and grad_input.is_contiguous():
        written = {"out" if log else "grad_input": grad_input}
        backward(grad_output, output, dim, output.dtype, **written)
        return
    torch.mul(backward(grad_output, output, dim, output.dtype), scale, out=grad_input)
