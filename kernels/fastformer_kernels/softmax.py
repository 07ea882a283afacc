"""Softmax along one dimension: y_i = exp(x_i - max x) / sum_j exp(x_j - max x), and its gradient
dx = y * (dy - sum_j y_j dy_j).

A row that fits is read once and kept in registers; a longer one is read twice, the first time with the online
normaliser of Milakov and Gimelshein (2018, https://arxiv.org/abs/1805.02867). A row of -inf gives zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.launch import device_guard
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import RowLayout, row_layout, row_offset

LOG2_E = tl.constexpr(1.4426950408889634)
ONE_PASS_COLUMNS = 16384
TILE_ELEMENTS = 4096


@triton.jit
def _softmax_forward_kernel(
    input_pointer,
    output_pointer,
    rows,
    size_1,
    size_2,
    columns,
    input_stride_0,
    input_stride_1,
    input_stride_2,
    input_stride_column,
    output_stride_0,
    output_stride_1,
    output_stride_2,
    output_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = (row < rows)[:, None]
    x_row = input_pointer + row_offset(row, size_1, size_2, input_stride_0, input_stride_1, input_stride_2)[:, None]
    y_row = output_pointer + row_offset(row, size_1, size_2, output_stride_0, output_stride_1, output_stride_2)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    if ONE_PASS:
        valid = row_valid & (column < columns)
        x = tl.load(x_row + column * input_stride_column, mask=valid, other=float("-inf")).to(tl.float32) * LOG2_E
        maximum = tl.max(x, axis=1)[:, None]
        numerator = tl.exp2(x - tl.where(maximum == float("-inf"), 0.0, maximum))
        total = tl.sum(numerator, axis=1)[:, None]
        y = numerator * (1.0 / tl.where(total == 0.0, 1.0, total))
        tl.store(y_row + column * output_stride_column, round_to(y, output_pointer.dtype.element_ty), mask=valid)
    else:
        maximum = tl.full((BLOCK_ROWS, 1), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            valid = row_valid & (start + column < columns)
            x = tl.load(x_row + (start + column) * input_stride_column, mask=valid, other=float("-inf"))
            x = x.to(tl.float32) * LOG2_E
            tile_maximum = tl.max(x, axis=1)[:, None]
            new_maximum = tl.maximum(maximum, tile_maximum)
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(x - shift), axis=1)[:, None]
            maximum = new_maximum
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        reciprocal = 1.0 / tl.where(total == 0.0, 1.0, total)
        for start in range(0, columns, BLOCK_COLUMNS):
            valid = row_valid & (start + column < columns)
            x = tl.load(x_row + (start + column) * input_stride_column, mask=valid, other=float("-inf"))
            y = tl.exp2(x.to(tl.float32) * LOG2_E - shift) * reciprocal
            tl.store(
                y_row + (start + column) * output_stride_column,
                round_to(y, output_pointer.dtype.element_ty),
                mask=valid,
            )


@triton.jit
def _softmax_backward_kernel(
    grad_output_pointer,
    output_pointer,
    grad_input_pointer,
    rows,
    size_1,
    size_2,
    columns,
    grad_output_stride_0,
    grad_output_stride_1,
    grad_output_stride_2,
    grad_output_stride_column,
    output_stride_0,
    output_stride_1,
    output_stride_2,
    output_stride_column,
    grad_input_stride_0,
    grad_input_stride_1,
    grad_input_stride_2,
    grad_input_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = (row < rows)[:, None]
    dy_offset = row_offset(row, size_1, size_2, grad_output_stride_0, grad_output_stride_1, grad_output_stride_2)
    dy_row = grad_output_pointer + dy_offset[:, None]
    y_row = output_pointer + row_offset(row, size_1, size_2, output_stride_0, output_stride_1, output_stride_2)[:, None]
    dx_offset = row_offset(row, size_1, size_2, grad_input_stride_0, grad_input_stride_1, grad_input_stride_2)
    dx_row = grad_input_pointer + dx_offset[:, None]
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        valid = row_valid & (start + column < columns)
        y = tl.load(y_row + (start + column) * output_stride_column, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + (start + column) * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        product += y * dy
    dot = tl.sum(product, axis=1)[:, None]
    for start in range(0, columns, BLOCK_COLUMNS):
        valid = row_valid & (start + column < columns)
        y = tl.load(y_row + (start + column) * output_stride_column, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_row + (start + column) * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        dx = y * (dy - dot)
        dx_column = (start + column) * grad_input_stride_column
        tl.store(dx_row + dx_column, round_to(dx, grad_input_pointer.dtype.element_ty), mask=valid)


def softmax_forward(input: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax of `input` (any shape and strides) along `dim`; same shape and dtype, accumulated in float32."""
    output = torch.empty_like(input)
    layout, (input, target) = row_layout(dim, [input, output])
    one_pass = layout.columns <= ONE_PASS_COLUMNS
    blocks = _blocks(layout, ONE_PASS_COLUMNS if one_pass else TILE_ELEMENTS)
    with device_guard(input):
        _softmax_forward_kernel[(triton.cdiv(layout.rows, blocks["BLOCK_ROWS"]),)](
            input,
            target,
            layout.rows,
            *layout.sizes[1:],
            layout.columns,
            *layout.strides[0],
            *layout.strides[1],
            ONE_PASS=one_pass,
            **blocks,
            num_warps=_warps(blocks),
        )
    return target


def softmax_backward(grad_output: torch.Tensor, output: torch.Tensor, dim: int) -> torch.Tensor:
    """Gradient of the softmax's input from the gradient of its `output`; shaped and typed like `output`."""
    grad_input = torch.empty_like(output)
    layout, (grad_output, output, target) = row_layout(dim, [grad_output, output, grad_input])
    blocks = _blocks(layout, TILE_ELEMENTS)
    with device_guard(output):
        _softmax_backward_kernel[(triton.cdiv(layout.rows, blocks["BLOCK_ROWS"]),)](
            grad_output,
            output,
            target,
            layout.rows,
            *layout.sizes[1:],
            layout.columns,
            *layout.strides[0],
            *layout.strides[1],
            *layout.strides[2],
            **blocks,
            num_warps=_warps(blocks),
        )
    return target


def _blocks(layout: RowLayout, most_columns: int) -> dict[str, int]:
    """Tile sizes: whole rows where they fit, several to a program where they are short."""
    columns = min(triton.next_power_of_2(layout.columns), most_columns)
    rows = max(1, min(TILE_ELEMENTS // columns, triton.next_power_of_2(layout.rows)))
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}


def _warps(blocks: dict[str, int]) -> int:
    """One warp for every 1,024 elements of the tile, from 1 to 16."""
    return max(1, min(16, blocks["BLOCK_ROWS"] * blocks["BLOCK_COLUMNS"] // 1024))
