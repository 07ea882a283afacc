"""Softmax and log-softmax along one dimension of masked and scaled scores, and their gradients.

    s = scale x + mask,  y_i = exp(s_i - max s) / sum_j exp(s_j - max s),  dx = scale y (dy - sum_j y_j dy_j)
    log-softmax:  y_i = s_i - max s - log sum_j exp(s_j - max s),          dx = scale (dy - exp(y) sum_j dy_j)

A row that fits in registers is read once and kept there. A longer one is read twice, the first time with the online
normaliser of Milakov and Gimelshein (2018, https://arxiv.org/abs/1805.02867). Where long rows are fewer than a GPU has
room for, several programs share a row: one launch finds the maximum and the sum of each part, and the next one combines
them and writes. The tiles of long rows that begin anywhere begin at the first multiple of 8 elements in memory, so that
they are read and written in 128 bits.

A row of -inf gives zeros (log-softmax: -inf), and an element without probability has gradient zero. The maximum is
subtracted before a score is multiplied by log2 e: the rounding error of a large product would otherwise go into the
result in full.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.configurations import chosen
from fastformer_kernels.constants import LN_2, LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS, multiprocessors_of
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import (
    ALIGNED_ELEMENTS,
    RowConfiguration,
    RowLayout,
    RowTensor,
    addressable,
    aligned,
    cut_rows,
    edge_columns,
    row_class,
    row_layout,
    row_offset,
)

# Longest row that one tile holds: 16 elements for each of 1024 threads. Longer rows are read once more.
ONE_PASS_COLUMNS = 16384
_CONFIGURATION = RowConfiguration(tile_elements=4096, thread_elements=16)
# Long rows are few, and may be split, up to this number for each multiprocessor: each has two parts or more.
FEW_ROWS = 2
_SPLIT_CONFIGURATION = RowConfiguration(tile_elements=4096, thread_elements=16, split=2 * FEW_ROWS)
# The most parts of a row, whose statistics are read at once.
MOST_PARTS = 64
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
def _load_scores(x_row, x_stride, mask_row, mask_stride, limit, valid, column, scale, CAUSAL: tl.constexpr):
    """A tile of scores in float32; -inf where not valid or masked. `limit` is the last column that a row may see."""
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
def _add_scores(scores, maximum, total):
    """The maximum and the sum of exp(score - maximum) of each row, (rows, 1), with those of a tile of scores added."""
    previous = maximum
    maximum = tl.maximum(maximum, tl.max(scores, axis=1)[:, None])
    total *= tl.exp2((previous - _finite(maximum)) * LOG2_E)
    total += tl.sum(tl.exp2((scores - _finite(maximum)) * LOG2_E), axis=1)[:, None]
    return maximum, total


@triton.jit
def _part_columns(part_columns, columns):
    """The first column of this program's part of a row, and the column after the last one."""
    begin = tl.program_id(1).to(tl.int64) * part_columns
    return begin, tl.minimum(begin + part_columns, columns)


@triton.jit
def _with_edges(row, rows):
    """Whether this program takes the edges of each cut row: those of its first part."""
    return row < tl.where(tl.program_id(1) == 0, rows, 0)


@triton.jit
def _store_part(pointer, value, row, row_valid):
    """Store a number for each row's part that this program has found, into (rows, parts)."""
    tl.store(pointer + row[:, None] * tl.num_programs(1) + tl.program_id(1), value, mask=row_valid)


@triton.jit
def _load_parts(pointer, row, row_valid, other, PARTS: tl.constexpr):
    """Load the numbers of all parts of each row, (rows, PARTS); `other` beyond the last part."""
    part = tl.arange(0, PARTS)[None, :]
    parts = tl.num_programs(1)
    return tl.load(pointer + row[:, None] * parts + part, mask=row_valid & (part < parts), other=other)


@triton.jit
def _of_row(x):
    """A number for each row, (rows, 1); of a single row a scalar, which ties no layouts together.

    Triton 3.6 would give the numbers of the parts the layout of a tile of scores, and compute each many times.
    """
    return tl.sum(x, axis=0) if x.shape[0] == 1 else x[:, None]


@triton.jit
def _softmax_forward_kernel(
    input,
    mask,
    output,
    maximum_pointer,
    total_pointer,
    rows,
    size_1,
    size_2,
    columns,
    part_columns,
    queries,
    causal_offset,
    scale,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
    WRITES: tl.constexpr,
):
    """Compute y_i = exp(s_i - max s) / sum_j exp(s_j - max s) with s = scale x + mask, or log y_i, for BLOCK_ROWS rows.

    Args:
        input, mask, output: x, the mask (its pointer None without one) and y, a `RowTensor` each.
        maximum_pointer, total_pointer: (rows, parts) float32 each, the statistics of the parts; with PARTS only.
        rows, size_1, size_2, columns: from the `RowLayout`: number of rows, the inner row dimensions, a row's length.
        part_columns: with PARTS, the columns of a program's part, a multiple of BLOCK_COLUMNS.
        queries, causal_offset: with CAUSAL, row r sees the columns up to r % queries + causal_offset.
        LOG: whether to write the logarithm.
        ALIGNMENT: the alignment of the `RowLayout`.
        BLOCK_ROWS, BLOCK_COLUMNS: the size of a tile.
        ONE_PASS: whether a tile holds whole rows.
        CUT: whether tiles begin at the first multiple of ALIGNED_ELEMENTS in each row. Then x and y have the same
            strides.
        PARTS: a power of two, at least the number of parts of a row, or 0 where rows are whole.
        WRITES: with PARTS, whether to write y from the parts' statistics, or else to find those of one part.
    """
    columns = aligned(columns, ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = (row < rows)[:, None]
    mask_row = _rows_of(mask, row, size_1, size_2, ALIGNMENT)
    limit = (row % queries + causal_offset)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    if CUT:
        first, start_of_tiles, end = cut_rows(row_offset(row, size_1, size_2, input, 1)[:, None], columns)
        x_row = input.pointer + start_of_tiles
        y_row = output.pointer + start_of_tiles
        if mask_row is not None:
            mask_row += first * mask.stride_column
        limit -= first
        edge, edge_valid = edge_columns(first, end, columns)
        edge_valid &= _with_edges(row, rows)[:, None]
    else:
        x_row = _rows_of(input, row, size_1, size_2, ALIGNMENT)
        y_row = _rows_of(output, row, size_1, size_2, ALIGNMENT)
        end = columns
    if ONE_PASS:
        valid = row_valid & (column < columns)
        scores = _load_scores(
            x_row, input.stride_column, mask_row, mask.stride_column, limit, valid, column, scale, CAUSAL
        )
        maximum = tl.max(scores, axis=1)[:, None]
        total = tl.sum(tl.exp2((scores - _finite(maximum)) * LOG2_E), axis=1)[:, None]
        y = round_to(_normalised(scores, maximum, total, LOG), output.pointer.dtype.element_ty)
        tl.store(y_row + column * output.stride_column, y, mask=valid)
    else:
        begin = 0
        stop = columns
        if PARTS:
            begin, stop = _part_columns(part_columns, columns)
        if PARTS and WRITES:
            maxima = _load_parts(maximum_pointer, row, row_valid, float("-inf"), PARTS)
            totals = _load_parts(total_pointer, row, row_valid, 0.0, PARTS)
            maximum = _of_row(tl.max(maxima, axis=1))
            total = _of_row(tl.sum(totals * tl.exp2((maxima - _finite(maximum)) * LOG2_E), axis=1))
        else:
            maximum = tl.full((BLOCK_ROWS, 1), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_ROWS, 1), tl.float32)
            for start in range(begin, stop, BLOCK_COLUMNS):
                at = start + column
                scores = _load_scores(
                    x_row, input.stride_column, mask_row, mask.stride_column, limit, row_valid & (at < end), at, scale,
                    CAUSAL,
                )  # fmt: skip
                maximum, total = _add_scores(scores, maximum, total)
            if CUT:
                edge_scores = _load_scores(
                    x_row, input.stride_column, mask_row, mask.stride_column, limit, edge_valid, edge, scale, CAUSAL
                )
                maximum, total = _add_scores(edge_scores, maximum, total)
            if PARTS:
                _store_part(maximum_pointer, maximum, row, row_valid)
                _store_part(total_pointer, total, row, row_valid)
        if WRITES:
            for start in range(begin, stop, BLOCK_COLUMNS):
                at = start + column
                valid = row_valid & (at < end)
                scores = _load_scores(
                    x_row, input.stride_column, mask_row, mask.stride_column, limit, valid, at, scale, CAUSAL
                )
                y = round_to(_normalised(scores, maximum, total, LOG), output.pointer.dtype.element_ty)
                tl.store(y_row + at * output.stride_column, y, mask=valid)
            if CUT:
                edge_scores = _load_scores(
                    x_row, input.stride_column, mask_row, mask.stride_column, limit, edge_valid, edge, scale, CAUSAL
                )
                edge_y = round_to(_normalised(edge_scores, maximum, total, LOG), output.pointer.dtype.element_ty)
                tl.store(y_row + edge * output.stride_column, edge_y, mask=edge_valid)


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
    dot_pointer,
    rows,
    size_1,
    size_2,
    columns,
    part_columns,
    scale,
    LOG: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    CUT: tl.constexpr,
    PARTS: tl.constexpr,
    WRITES: tl.constexpr,
):
    """Compute dx = scale y (dy - sum_j y_j dy_j), or with LOG scale (dy - exp(y) sum_j dy_j), for BLOCK_ROWS rows.

    Args:
        grad_output, output, grad_input: dy, y and dx, a `RowTensor` each; with CUT, their strides are the same.
        dot_pointer: (rows, parts) float32, the sum of each part; with PARTS only.

    The other arguments are those of `_softmax_forward_kernel`.
    """
    columns = aligned(columns, ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = (row < rows)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    if CUT:
        first, start_of_tiles, end = cut_rows(row_offset(row, size_1, size_2, output, 1)[:, None], columns)
        dy_row = grad_output.pointer + start_of_tiles
        y_row = output.pointer + start_of_tiles
        dx_row = grad_input.pointer + start_of_tiles
        edge, edge_valid = edge_columns(first, end, columns)
        edge_valid &= _with_edges(row, rows)[:, None]
    else:
        dy_row = _rows_of(grad_output, row, size_1, size_2, ALIGNMENT)
        y_row = _rows_of(output, row, size_1, size_2, ALIGNMENT)
        dx_row = _rows_of(grad_input, row, size_1, size_2, ALIGNMENT)
        end = columns
    if ONE_PASS:
        valid = row_valid & (column < columns)
        y, dy = _load_gradient(dy_row, grad_output.stride_column, y_row, output.stride_column, valid, column, LOG)
        dot = tl.sum(_dot_term(y, dy, LOG), axis=1)[:, None]
        dx = round_to(scale * _grad_scores(y, dy, dot, LOG), grad_input.pointer.dtype.element_ty)
        tl.store(dx_row + column * grad_input.stride_column, dx, mask=valid)
    else:
        begin = 0
        stop = columns
        if PARTS:
            begin, stop = _part_columns(part_columns, columns)
        if PARTS and WRITES:
            dot = _of_row(tl.sum(_load_parts(dot_pointer, row, row_valid, 0.0, PARTS), axis=1))
        else:
            terms = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for start in range(begin, stop, BLOCK_COLUMNS):
                at = start + column
                valid = row_valid & (at < end)
                y, dy = _load_gradient(dy_row, grad_output.stride_column, y_row, output.stride_column, valid, at, LOG)
                terms += _dot_term(y, dy, LOG)
            dot = tl.sum(terms, axis=1)[:, None]
            if CUT:
                edge_y, edge_dy = _load_gradient(
                    dy_row, grad_output.stride_column, y_row, output.stride_column, edge_valid, edge, LOG
                )
                dot += tl.sum(_dot_term(edge_y, edge_dy, LOG), axis=1)[:, None]
            if PARTS:
                _store_part(dot_pointer, dot, row, row_valid)
        if WRITES:
            for start in range(begin, stop, BLOCK_COLUMNS):
                at = start + column
                valid = row_valid & (at < end)
                y, dy = _load_gradient(dy_row, grad_output.stride_column, y_row, output.stride_column, valid, at, LOG)
                dx = round_to(scale * _grad_scores(y, dy, dot, LOG), grad_input.pointer.dtype.element_ty)
                tl.store(dx_row + at * grad_input.stride_column, dx, mask=valid)
            if CUT:
                edge_y, edge_dy = _load_gradient(
                    dy_row, grad_output.stride_column, y_row, output.stride_column, edge_valid, edge, LOG
                )
                edge_dx = scale * _grad_scores(edge_y, edge_dy, dot, LOG)
                edge_dx = round_to(edge_dx, grad_input.pointer.dtype.element_ty)
                tl.store(dx_row + edge * grad_input.stride_column, edge_dx, mask=edge_valid)


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
    _launch_forward(x, y, mask, *_of_parts(x, dim, 2), dim % input.dim(), scale, causal_offset, log)
    if y is not output:
        output.copy_(y)


@kept_launch
def _launch_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    maximum: torch.Tensor | None,
    total: torch.Tensor | None,
    dim: int,
    scale: float,
    causal_offset: int | None,
    log: bool,
) -> list[Launch]:
    """Describe the launches that write to `y` the softmax of `x`. `dim` is not negative."""
    layout = row_layout(dim, [x, y] if mask is None else [x, y, mask])
    queries = 1 if causal_offset is None else x.shape[-2 if dim == x.dim() - 1 else -1]
    return _launches(
        "softmax_forward",
        _softmax_forward_kernel,
        layout,
        x,
        {
            "input": RowTensor(x, *layout.strides[0]),
            "mask": RowTensor(mask, *((0, 0, 0, 0) if mask is None else layout.strides[2])),
            "output": RowTensor(y, *layout.strides[1]),
            "maximum_pointer": maximum,
            "total_pointer": total,
            "queries": queries,
            "causal_offset": causal_offset or 0,
            "scale": scale,
            "CAUSAL": causal_offset is not None,
            "LOG": log,
            "CUT": _cut(layout, 2),
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
    _launch_backward(dy, y, dx, *_of_parts(y, dim, 1), dim % output.dim(), scale, log)
    if dx is not grad_input:
        grad_input.copy_(dx)


@kept_launch
def _launch_backward(
    dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, dot: torch.Tensor | None, dim: int, scale: float, log: bool
) -> list[Launch]:
    """Describe the launches that write to `dx` the gradient, from `dy` and the output `y`. `dim` is not negative."""
    layout = row_layout(dim, [dy, y, dx])
    return _launches(
        "softmax_backward",
        _softmax_backward_kernel,
        layout,
        y,
        {
            "grad_output": RowTensor(dy, *layout.strides[0]),
            "output": RowTensor(y, *layout.strides[1]),
            "grad_input": RowTensor(dx, *layout.strides[2]),
            "dot_pointer": dot,
            "scale": scale,
            "LOG": log,
            "CUT": _cut(layout, 3),
        },
    )


def _few(rows: int, columns: int, tensor: torch.Tensor) -> bool:
    """Whether long rows are so few that they may be split."""
    return columns > ONE_PASS_COLUMNS and rows <= FEW_ROWS * multiprocessors_of(tensor)


def _of_parts(tensor: torch.Tensor, dim: int, numbers: int) -> list[torch.Tensor | None]:
    """Memory for `numbers` float32 numbers of each part of a row; None each where rows are not split."""
    columns = tensor.shape[dim]
    rows = tensor.numel() // columns
    if not _few(rows, columns, tensor):
        return [None] * numbers
    return list(tensor.new_empty(numbers, rows * MOST_PARTS, dtype=torch.float32).unbind())


def _cut(layout: RowLayout, tensors: int) -> bool:
    """Whether long rows begin anywhere, and at the same places in the first `tensors` tensors of the layout."""
    strides = layout.strides[:tensors]
    unaligned = layout.alignment < ALIGNED_ELEMENTS.value
    return layout.columns > ONE_PASS_COLUMNS and unaligned and len(set(strides)) == 1 and strides[0][-1] == 1


def _launches(
    operation: str, kernel: Any, layout: RowLayout, tensor: torch.Tensor, arguments: dict[str, Any]
) -> list[Launch]:
    """One launch for whole rows; two for parts of rows: the first finds their statistics, the second writes.

    Args:
        tensor: any tensor on the device that has the dtype of the rows.
        arguments: the kernel's, except those that both kernels share.
    """
    few = _few(layout.rows, layout.columns, tensor)
    configuration = _configuration(operation, layout, tensor, few)
    tiles = _tiles(layout, tensor, configuration)
    programs = triton.cdiv(layout.rows, tiles["BLOCK_ROWS"])
    parts, part_columns = 1, layout.columns
    if few:
        wanted = configuration.split * multiprocessors_of(tensor) // programs
        part_tiles = triton.cdiv(triton.cdiv(layout.columns, tiles["BLOCK_COLUMNS"]), max(1, min(MOST_PARTS, wanted)))
        part_columns = part_tiles * tiles["BLOCK_COLUMNS"]
        parts = triton.cdiv(layout.columns, part_columns)
    common = {
        "rows": layout.rows,
        "size_1": layout.sizes[1],
        "size_2": layout.sizes[2],
        "columns": layout.columns,
        "part_columns": part_columns,
        "ALIGNMENT": layout.alignment,
        "PARTS": triton.next_power_of_2(parts) if parts > 1 else 0,
        **tiles,
        **COMPILER_OPTIONS,
    }
    steps = (False, True) if parts > 1 else (True,)
    return [Launch(kernel, (programs, parts), {**arguments, **common, "WRITES": writes}) for writes in steps]


def _configuration(operation: str, layout: RowLayout, tensor: torch.Tensor, few: bool) -> RowConfiguration:
    """The configuration of these rows."""

    def shape() -> tuple[str, ...]:
        along_or_across = "along" if _along_memory(layout) else "across"
        return *row_class(layout.columns, tensor.element_size()), along_or_across, "few" if few else "many"

    return chosen(operation, tensor, _SPLIT_CONFIGURATION if few else _CONFIGURATION, shape)


def _along_memory(layout: RowLayout) -> bool:
    """Whether the neighbours of an element in memory are in its own row."""
    return layout.strides[0][-1] <= max(1, layout.strides[0][-2])


def _tiles(layout: RowLayout, tensor: torch.Tensor, configuration: RowConfiguration) -> dict[str, int]:
    """Warps and tile sizes. A tile holds whole rows where they fit, and several if they are short or not contiguous."""
    columns = triton.next_power_of_2(layout.columns)
    most_rows = triton.next_power_of_2(layout.rows)
    fewest_rows = 1 if _along_memory(layout) else min(STRIDED_BLOCK_ROWS, most_rows)
    one_pass = columns * fewest_rows <= ONE_PASS_COLUMNS
    if not one_pass:
        columns = configuration.tile_elements // fewest_rows
    rows = min(max(fewest_rows, configuration.tile_elements // columns), most_rows)
    warps = configuration.warps(rows * columns, tensor)
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "ONE_PASS": one_pass, "num_warps": warps}
