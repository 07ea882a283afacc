"""Softmax and log-softmax along one dimension of masked and scaled scores, and their gradients.

    s = scale x + mask,  y_i = exp(s_i - max s) / sum_j exp(s_j - max s),  dx = scale y (dy - sum_j y_j dy_j)
    log-softmax:  y_i = s_i - max s - log sum_j exp(s_j - max s),          dx = scale (dy - exp(y) sum_j dy_j)

A row that fits in registers is read once and kept there. A longer one is read twice, the first time with the online
normaliser of Milakov and Gimelshein (2018, https://arxiv.org/abs/1805.02867). A row of -inf gives zeros (log-softmax:
-inf), and an element without probability has gradient zero. The maximum is subtracted before a score is multiplied by
log2 e: the rounding error of a large product would otherwise go into the result in full.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.configurations import chosen
from fastformer_kernels.constants import LN_2, LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import (
    RowConfiguration,
    RowLayout,
    RowTensor,
    addressable,
    aligned,
    row_class,
    row_layout,
    row_offset,
)

# Longest row that one tile holds: 16 elements for each of 1024 threads. Longer rows are read once more.
ONE_PASS_COLUMNS = 16384
_CONFIGURATION = RowConfiguration(tile_elements=4096, thread_elements=16)
# Rows of a tile where neighbouring rows, not columns, are next to each other in memory: at least a sector of 32 bytes.
STRIDED_BLOCK_ROWS = 32


@triton.jit
def _rows_of(tensor, row, size_1, size_2, ALIGNMENT: tl.constexpr):
    """Pointers, (rows, 1), to the rows `row` of a `RowTensor`; None if its pointer is None."""
    pointer = tensor.pointer
    if tensor.pointer is not None:
        pointer = tensor.pointer + row_offset(row, size_1, size_2, tensor, ALIGNMENT)[:, None]
    return pointer


@triton.jit
def _load_scores(
    x_row, x_stride, mask_row, mask_stride, limit, row_valid, column, columns, scale, CAUSAL: tl.constexpr
):
    """A tile of scores in float32; -inf where absent or masked. `limit` is the last column that a row may see."""
    valid = row_valid & (column < columns)
    if CAUSAL:
        # The test is in steps of 16 columns, so that the loads stay wide.
        valid = valid & (column // 16 <= limit // 16)
    scores = tl.load(x_row + column * x_stride, mask=valid, other=float("-inf")).to(tl.float32) * scale
    scores = tl.where(valid, scores, float("-inf"))
    if mask_row is not None:
        mask = tl.load(mask_row + column * mask_stride, mask=valid, other=0)
        if mask.dtype.is_floating():
            scores = tl.where(mask == float("-inf"), float("-inf"), scores + mask.to(tl.float32))
        else:
            scores = tl.where(mask != 0, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(column <= limit, scores, float("-inf"))
    return scores


@triton.jit
def _finite(maximum):
    """`maximum`, or zero where the row is empty, so that a score of -inf minus it stays -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _normalised(scores, maximum, total, LOG: tl.constexpr):
    """Probabilities of `scores`, or their logarithms, from their row's maximum and sum of exp(score - maximum)."""
    shifted = scores - _finite(maximum)
    total = tl.where(total == 0.0, 1.0, total)
    if LOG:
        y = shifted - tl.log2(total) * LN_2
    else:
        y = tl.exp2(shifted * LOG2_E) * (1.0 / total)
    return y


@triton.jit
def _softmax_forward_kernel(
    input,
    mask,
    output,
    rows,
    size_1,
    size_2,
    columns,
    queries,
    causal_offset,
    scale,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """Compute y_i = exp(s_i - max s) / sum_j exp(s_j - max s) with s = scale x + mask, or log y_i, for BLOCK_ROWS rows.

    Args:
        input, mask, output: x, the mask (its pointer None without one) and y, a `RowTensor` each.
        rows, size_1, size_2, columns: from the `RowLayout`: number of rows, the inner row dimensions, a row's length.
        queries, causal_offset: with CAUSAL, row r sees the columns up to r % queries + causal_offset.
        LOG: whether to write the logarithm.
        ALIGNMENT: the alignment of the `RowLayout`.
        BLOCK_ROWS, BLOCK_COLUMNS: the size of a tile.
        ONE_PASS: whether a tile holds whole rows.
    """
    columns = aligned(columns, ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = (row < rows)[:, None]
    x_row = _rows_of(input, row, size_1, size_2, ALIGNMENT)
    y_row = _rows_of(output, row, size_1, size_2, ALIGNMENT)
    mask_row = _rows_of(mask, row, size_1, size_2, ALIGNMENT)
    limit = (row % queries + causal_offset)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    if ONE_PASS:
        scores = _load_scores(
            x_row, input.stride_column, mask_row, mask.stride_column, limit, row_valid, column, columns, scale, CAUSAL
        )
        maximum = tl.max(scores, axis=1)[:, None]
        total = tl.sum(tl.exp2((scores - _finite(maximum)) * LOG2_E), axis=1)[:, None]
        y = round_to(_normalised(scores, maximum, total, LOG), output.pointer.dtype.element_ty)
        tl.store(y_row + column * output.stride_column, y, mask=row_valid & (column < columns))
    else:
        maximum = tl.full((BLOCK_ROWS, 1), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            at = start + column
            scores = _load_scores(
                x_row, input.stride_column, mask_row, mask.stride_column, limit, row_valid, at, columns, scale, CAUSAL
            )
            previous = maximum
            maximum = tl.maximum(maximum, tl.max(scores, axis=1)[:, None])
            total *= tl.exp2((previous - _finite(maximum)) * LOG2_E)
            total += tl.sum(tl.exp2((scores - _finite(maximum)) * LOG2_E), axis=1)[:, None]
        for start in range(0, columns, BLOCK_COLUMNS):
            at = start + column
            scores = _load_scores(
                x_row, input.stride_column, mask_row, mask.stride_column, limit, row_valid, at, columns, scale, CAUSAL
            )
            y = round_to(_normalised(scores, maximum, total, LOG), output.pointer.dtype.element_ty)
            tl.store(y_row + at * output.stride_column, y, mask=row_valid & (at < columns))


@triton.jit
def _load_gradient(dy_row, dy_stride, y_row, y_stride, valid, column, LOG: tl.constexpr):
    """A tile of probabilities and of dy, both in float32 and zero where there is no probability."""
    dy = tl.load(dy_row + column * dy_stride, mask=valid, other=0.0).to(tl.float32)
    if LOG:
        y = tl.load(y_row + column * y_stride, mask=valid, other=float("-inf")).to(tl.float32)
        dy = tl.where(y == float("-inf"), 0.0, dy)
        y = tl.exp2(y * LOG2_E)
    else:
        y = tl.load(y_row + column * y_stride, mask=valid, other=0.0).to(tl.float32)
    return y, dy


@triton.jit
def _dot_term(y, dy, LOG: tl.constexpr):
    """The terms whose sum over a row is needed for its gradient."""
    return dy if LOG else y * dy


@triton.jit
def _grad_scores(y, dy, dot, LOG: tl.constexpr):
    """The gradient of scores, from probabilities `y`, `dy` and the row's sum `dot` of `_dot_term`."""
    return dy - y * dot if LOG else y * (dy - dot)


@triton.jit
def _softmax_backward_kernel(
    grad_output,
    output,
    grad_input,
    rows,
    size_1,
    size_2,
    columns,
    scale,
    LOG: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """Compute dx = scale y (dy - sum_j y_j dy_j), or with LOG scale (dy - exp(y) sum_j dy_j), for BLOCK_ROWS rows.

    Args:
        grad_output, output, grad_input: dy, y and dx, a `RowTensor` each.

    The other arguments are those of `_softmax_forward_kernel`.
    """
    columns = aligned(columns, ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = (row < rows)[:, None]
    dy_row = _rows_of(grad_output, row, size_1, size_2, ALIGNMENT)
    y_row = _rows_of(output, row, size_1, size_2, ALIGNMENT)
    dx_row = _rows_of(grad_input, row, size_1, size_2, ALIGNMENT)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    if ONE_PASS:
        valid = row_valid & (column < columns)
        y, dy = _load_gradient(dy_row, grad_output.stride_column, y_row, output.stride_column, valid, column, LOG)
        dot = tl.sum(_dot_term(y, dy, LOG), axis=1)[:, None]
        dx = round_to(scale * _grad_scores(y, dy, dot, LOG), grad_input.pointer.dtype.element_ty)
        tl.store(dx_row + column * grad_input.stride_column, dx, mask=valid)
    else:
        terms = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            at = start + column
            valid = row_valid & (at < columns)
            y, dy = _load_gradient(dy_row, grad_output.stride_column, y_row, output.stride_column, valid, at, LOG)
            terms += _dot_term(y, dy, LOG)
        dot = tl.sum(terms, axis=1)[:, None]
        for start in range(0, columns, BLOCK_COLUMNS):
            at = start + column
            valid = row_valid & (at < columns)
            y, dy = _load_gradient(dy_row, grad_output.stride_column, y_row, output.stride_column, valid, at, LOG)
            dx = round_to(scale * _grad_scores(y, dy, dot, LOG), grad_input.pointer.dtype.element_ty)
            tl.store(dx_row + at * grad_input.stride_column, dx, mask=valid)


def softmax_forward(
    input: torch.Tensor,
    output: torch.Tensor,
    dim: int,
    *,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    causal_offset: int | None = None,
    log: bool = False,
) -> None:
    """Write the softmax of ``scale * input + mask`` along `dim` into `output`, accumulated in float32.

    Args:
        input: any floating dtype, shape and strides.
        output: the same shape, any strides and floating dtype; may be `input` itself.
        mask: the same shape, any strides (often zero); boolean (True = may attend) or floating (added).
        causal_offset: a row sees the columns up to its own index plus this; None for all columns. The index is along
            the last dimension other than `dim`.
        log: whether to compute the log-softmax instead.
    """
    x, y, mask = addressable(dim, input, output, mask)
    _launch_forward(x, y, mask, dim % input.dim(), scale, causal_offset, log)
    if y is not output:
        output.copy_(y)


@kept_launch
def _launch_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    dim: int,
    scale: float,
    causal_offset: int | None,
    log: bool,
) -> Launch:
    """Describe the launch that writes to `y` the softmax of `x`. `dim` is not negative."""
    layout = row_layout(dim, [x, y] if mask is None else [x, y, mask])
    blocks = _blocks("softmax_forward", layout, x)
    queries = 1 if causal_offset is None else x.shape[-2 if dim == x.dim() - 1 else -1]
    return Launch(
        _softmax_forward_kernel,
        (triton.cdiv(layout.rows, blocks["BLOCK_ROWS"]),),
        {
            "input": RowTensor(x, *layout.strides[0]),
            "mask": RowTensor(mask, *((0, 0, 0, 0) if mask is None else layout.strides[2])),
            "output": RowTensor(y, *layout.strides[1]),
            "rows": layout.rows,
            "size_1": layout.sizes[1],
            "size_2": layout.sizes[2],
            "columns": layout.columns,
            "queries": queries,
            "causal_offset": causal_offset or 0,
            "scale": scale,
            "CAUSAL": causal_offset is not None,
            "LOG": log,
            "ALIGNMENT": layout.alignment,
            **blocks,
            **COMPILER_OPTIONS,
        },
    )


def softmax_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    grad_input: torch.Tensor,
    dim: int,
    *,
    scale: float = 1.0,
    log: bool = False,
) -> None:
    """Write the gradient of the input into `grad_input`, from the softmax's `output` and its gradient.

    All three have the same shape, with any strides and floating dtypes.
    """
    dy, y, dx = addressable(dim, grad_output, output, grad_input)
    _launch_backward(dy, y, dx, dim % output.dim(), scale, log)
    if dx is not grad_input:
        grad_input.copy_(dx)


@kept_launch
def _launch_backward(dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, dim: int, scale: float, log: bool) -> Launch:
    """Describe the launch that writes to `dx` the gradient, from `dy` and the output `y`. `dim` is not negative."""
    layout = row_layout(dim, [dy, y, dx])
    blocks = _blocks("softmax_backward", layout, y)
    return Launch(
        _softmax_backward_kernel,
        (triton.cdiv(layout.rows, blocks["BLOCK_ROWS"]),),
        {
            "grad_output": RowTensor(dy, *layout.strides[0]),
            "output": RowTensor(y, *layout.strides[1]),
            "grad_input": RowTensor(dx, *layout.strides[2]),
            "rows": layout.rows,
            "size_1": layout.sizes[1],
            "size_2": layout.sizes[2],
            "columns": layout.columns,
            "scale": scale,
            "LOG": log,
            "ALIGNMENT": layout.alignment,
            **blocks,
            **COMPILER_OPTIONS,
        },
    )


def _blocks(operation: str, layout: RowLayout, tensor: torch.Tensor) -> dict[str, int]:
    """Warps and tile sizes. A tile holds whole rows where they fit, and several if they are short or not contiguous."""
    columns = triton.next_power_of_2(layout.columns)
    along_memory = layout.strides[0][-1] <= max(1, layout.strides[0][-2])

    def shape() -> tuple[str, ...]:
        return *row_class(layout.columns, tensor.element_size()), "along" if along_memory else "across"

    configuration = chosen(operation, tensor, _CONFIGURATION, shape)
    most_rows = triton.next_power_of_2(layout.rows)
    fewest_rows = 1 if along_memory else min(STRIDED_BLOCK_ROWS, most_rows)
    one_pass = columns * fewest_rows <= ONE_PASS_COLUMNS
    if not one_pass:
        columns = configuration.tile_elements // fewest_rows
    rows = min(max(fewest_rows, configuration.tile_elements // columns), most_rows)
    warps = configuration.warps(rows * columns, tensor)
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "ONE_PASS": one_pass, "num_warps": warps}
