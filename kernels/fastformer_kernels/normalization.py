"""LayerNorm and RMSNorm of rows, with an optional residual added first, and their gradients.

LayerNorm (Ba et al., 2016, https://arxiv.org/abs/1607.06450): y = (x - mean x) rstd * w + b with
rstd = 1 / sqrt(var x + eps); RMSNorm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467) leaves the mean out:
y = x rstd * w with rstd = 1 / sqrt(mean x^2 + eps). With n = (x - mean) rstd and g = dy * w:

    dx = rstd (g - n mean(g n) - mean(g)),  dw = sum over rows of dy * n,  db = sum over rows of dy

where RMSNorm has no mean(g). A row that fits is read once and kept in registers, and its backward sums dw and db beside
dx: each program over the rows it visits, then all programs' sums in a fixed order, so that the result is deterministic.
A longer row is read twice, its variance merged tile by tile (Chan, Golub and LeVeque, 1979). The mean is subtracted in
two parts, since one float32 cannot hold a mean far from zero to the precision of the deviations from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.launch import architecture_of, device_guard
from fastformer_kernels.precision import round_to

FORWARD_ONE_PASS_COLUMNS = 16384
BACKWARD_ONE_PASS_COLUMNS = 8192
TILE_ELEMENTS = 4096
ELEMENTS_PER_THREAD = 16
# Enough to keep the memory busy, few enough that their partial sums of dw and db stay small beside dx.
BACKWARD_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _load_sum(input_row, input_stride, residual_row, residual_stride, column, valid):
    """Elements of input, or of input + residual rounded to the input's dtype, in float32; zero where not valid."""
    x = tl.load(input_row + column * input_stride, mask=valid, other=0.0)
    if residual_row is not None:
        residual = tl.load(residual_row + column * residual_stride, mask=valid, other=0.0)
        x = round_to(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
    return x.to(tl.float32)


@triton.jit
def _scale_and_shift(normalised, weight_pointer, bias_pointer, column, columns):
    y = normalised
    if weight_pointer is not None:
        y *= tl.load(weight_pointer + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        y += tl.load(bias_pointer + column, mask=column < columns, other=0.0).to(tl.float32)
    return y


@triton.jit
def _forward_kernel(
    input_pointer,
    residual_pointer,
    weight_pointer,
    bias_pointer,
    output_pointer,
    total_pointer,
    mean_pointer,
    rstd_pointer,
    rows,
    columns,
    eps,
    input_stride_row,
    input_stride_column,
    residual_stride_row,
    residual_stride_column,
    CENTERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    row_valid = row < rows
    x_row = input_pointer + row * input_stride_row
    residual_row = residual_pointer
    if residual_pointer is not None:
        residual_row = residual_pointer + row * residual_stride_row
    target = row * columns
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    if ONE_PASS:
        valid = row_valid & (column < columns)
        x = _load_sum(x_row, input_stride_column, residual_row, residual_stride_column, column, valid)
        if residual_pointer is not None:
            tl.store(total_pointer + target + column, round_to(x, total_pointer.dtype.element_ty), mask=valid)
        if CENTERED:
            shift = tl.sum(x, axis=1)[:, None] / columns
            x = tl.where(valid, x - shift, 0.0)
            remainder = tl.sum(x, axis=1)[:, None] / columns
            x = tl.where(valid, x - remainder, 0.0)
            mean = shift + remainder
        rstd = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / columns + eps)
        y = _scale_and_shift(x * rstd, weight_pointer, bias_pointer, column, columns)
        tl.store(output_pointer + target + column, round_to(y, output_pointer.dtype.element_ty), mask=valid)
    else:
        squares = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        # The first tile's mean; `mean` is what the whole row's mean is beyond it until the end.
        shift = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        if CENTERED:
            x = _load_sum(x_row, input_stride_column, residual_row, residual_stride_column, column, row_valid)
            shift = tl.sum(x, axis=1)[:, None] / BLOCK_COLUMNS
        for start in range(0, columns, BLOCK_COLUMNS):
            valid = row_valid & (start + column < columns)
            x = _load_sum(x_row, input_stride_column, residual_row, residual_stride_column, start + column, valid)
            if residual_pointer is not None:
                total = round_to(x, total_pointer.dtype.element_ty)
                tl.store(total_pointer + target + start + column, total, mask=valid)
            if CENTERED:
                count = tl.minimum(columns - start, BLOCK_COLUMNS).to(tl.float32)
                x = tl.where(valid, x - shift, 0.0)
                tile_mean = tl.sum(x, axis=1)[:, None] / count
                x = tl.where(valid, x - tile_mean, 0.0)
                share = count / (start + count)
                difference = tile_mean - mean
                mean += difference * share
                squares += difference * difference * share * start
            squares += tl.sum(x * x, axis=1)[:, None]
        rstd = tl.rsqrt(squares / columns + eps)
        for start in range(0, columns, BLOCK_COLUMNS):
            valid = row_valid & (start + column < columns)
            x = _load_sum(x_row, input_stride_column, residual_row, residual_stride_column, start + column, valid)
            normalised = ((x - shift) - mean) * rstd
            y = _scale_and_shift(normalised, weight_pointer, bias_pointer, start + column, columns)
            y = round_to(y, output_pointer.dtype.element_ty)
            tl.store(output_pointer + target + start + column, y, mask=valid)
        mean += shift
    if CENTERED:
        tl.store(mean_pointer + row, mean, mask=row_valid)
    tl.store(rstd_pointer + row, rstd, mask=row_valid)


@triton.jit
def _backward_kernel(
    grad_output_pointer,
    grad_sum_pointer,
    input_pointer,
    weight_pointer,
    mean_pointer,
    rstd_pointer,
    grad_input_pointer,
    weight_sums_pointer,
    bias_sums_pointer,
    rows,
    columns,
    grad_output_stride_row,
    grad_output_stride_column,
    grad_sum_stride_row,
    grad_sum_stride_column,
    input_stride_row,
    input_stride_column,
    CENTERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Rows held in registers: dx, and this program's sums for dw and db."""
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    column_valid = column < columns
    program = tl.program_id(0).to(tl.int64)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS).to(tl.int64))[:, None]
        row_valid = row < rows
        valid = row_valid & column_valid
        dy_pointer = grad_output_pointer + row * grad_output_stride_row + column * grad_output_stride_column
        dy = tl.load(dy_pointer, mask=valid, other=0.0).to(tl.float32)
        x_pointer = input_pointer + row * input_stride_row + column * input_stride_column
        x = tl.load(x_pointer, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_pointer + row, mask=row_valid, other=0.0)
        if CENTERED:
            x = tl.where(valid, x - tl.load(mean_pointer + row, mask=row_valid, other=0.0), 0.0)
        normalised = x * rstd
        if weight_sums_pointer is not None:
            weight_sum += dy * normalised
        if bias_sums_pointer is not None:
            bias_sum += dy
        g = _scale_and_shift(dy, weight_pointer, None, column, columns)
        dx = g - normalised * (tl.sum(g * normalised, axis=1)[:, None] / columns)
        if CENTERED:
            dx -= tl.sum(g, axis=1)[:, None] / columns
        dx *= rstd
        if grad_sum_pointer is not None:
            sum_pointer = grad_sum_pointer + row * grad_sum_stride_row + column * grad_sum_stride_column
            dx += tl.load(sum_pointer, mask=valid, other=0.0).to(tl.float32)
        dx = round_to(dx, grad_input_pointer.dtype.element_ty)
        tl.store(grad_input_pointer + row * columns + column, dx, mask=valid)
    sums = program * columns + column
    if weight_sums_pointer is not None:
        tl.store(weight_sums_pointer + sums, tl.sum(weight_sum, axis=0)[None, :], mask=column_valid)
    if bias_sums_pointer is not None:
        tl.store(bias_sums_pointer + sums, tl.sum(bias_sum, axis=0)[None, :], mask=column_valid)


@triton.jit
def _backward_long_row_kernel(
    grad_output_pointer,
    grad_sum_pointer,
    input_pointer,
    weight_pointer,
    mean_pointer,
    rstd_pointer,
    grad_input_pointer,
    columns,
    grad_output_stride_row,
    grad_output_stride_column,
    grad_sum_stride_row,
    grad_sum_stride_column,
    input_stride_row,
    input_stride_column,
    CENTERED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx of one row that does not fit in registers, read twice."""
    row = tl.program_id(0).to(tl.int64)
    dy_row = grad_output_pointer + row * grad_output_stride_row
    x_row = input_pointer + row * input_stride_row
    rstd = tl.load(rstd_pointer + row)
    mean = 0.0
    if CENTERED:
        mean = tl.load(mean_pointer + row)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    products = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    sums = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        valid = start + column < columns
        dy = tl.load(dy_row + (start + column) * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_row + (start + column) * input_stride_column, mask=valid, other=0.0).to(tl.float32)
        g = _scale_and_shift(dy, weight_pointer, None, start + column, columns)
        products += g * ((x - mean) * rstd)
        sums += g
    mean_product = tl.sum(products) / columns
    mean_g = 0.0
    if CENTERED:
        mean_g = tl.sum(sums) / columns
    for start in range(0, columns, BLOCK_COLUMNS):
        valid = start + column < columns
        dy = tl.load(dy_row + (start + column) * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_row + (start + column) * input_stride_column, mask=valid, other=0.0).to(tl.float32)
        g = _scale_and_shift(dy, weight_pointer, None, start + column, columns)
        dx = rstd * (g - (x - mean) * rstd * mean_product - mean_g)
        if grad_sum_pointer is not None:
            sum_pointer = grad_sum_pointer + row * grad_sum_stride_row + (start + column) * grad_sum_stride_column
            dx += tl.load(sum_pointer, mask=valid, other=0.0).to(tl.float32)
        dx = round_to(dx, grad_input_pointer.dtype.element_ty)
        tl.store(grad_input_pointer + row * columns + start + column, dx, mask=valid)


@triton.jit
def _parameter_sums_kernel(
    grad_output_pointer,
    input_pointer,
    mean_pointer,
    rstd_pointer,
    weight_sums_pointer,
    bias_sums_pointer,
    rows,
    columns,
    grad_output_stride_row,
    grad_output_stride_column,
    input_stride_row,
    input_stride_column,
    CENTERED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums for dw and db of one tile of columns, over every num_programs(1)-th row."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    valid = column < columns
    program = tl.program_id(1).to(tl.int64)
    weight_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for row in range(program, rows, tl.num_programs(1)):
        dy_pointer = grad_output_pointer + row * grad_output_stride_row + column * grad_output_stride_column
        dy = tl.load(dy_pointer, mask=valid, other=0.0).to(tl.float32)
        if weight_sums_pointer is not None:
            x_pointer = input_pointer + row * input_stride_row + column * input_stride_column
            x = tl.load(x_pointer, mask=valid, other=0.0).to(tl.float32)
            if CENTERED:
                x -= tl.load(mean_pointer + row)
            weight_sum += dy * (x * tl.load(rstd_pointer + row))
        bias_sum += dy
    if weight_sums_pointer is not None:
        tl.store(weight_sums_pointer + program * columns + column, weight_sum, mask=valid)
    if bias_sums_pointer is not None:
        tl.store(bias_sums_pointer + program * columns + column, bias_sum, mask=valid)


def norm_forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Normalise the rows of `input`, or of `input` + `residual`.

    Args:
        input, residual: (rows, columns), of one dtype, any strides.
        weight, bias: (columns,), any floating dtype.
        centered: LayerNorm where true, RMSNorm where false.

    Returns:
        The output and, with a residual, the sum: contiguous, in `input`'s dtype; the rows' mean (one unused element for
        RMSNorm) and rstd, float32.
    """
    rows, columns = input.shape
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(output)
    rstd = input.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else rstd.new_zeros(1)
    one_pass = columns <= FORWARD_ONE_PASS_COLUMNS
    block_columns = triton.next_power_of_2(columns) if one_pass else TILE_ELEMENTS
    block_rows = _block_rows(block_columns, rows)
    with device_guard(input):
        _forward_kernel[(triton.cdiv(rows, block_rows),)](
            input,
            residual,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            output,
            total,
            mean,
            rstd,
            rows,
            columns,
            eps,
            *input.stride(),
            *_strides(residual),
            CENTERED=centered,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            ONE_PASS=one_pass,
            num_warps=_warps(input, block_rows * block_columns),
        )
    return output, total, mean, rstd


def norm_backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    input: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    centered: bool,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of what was normalised (contiguous, in its dtype) and, where needed, of weight and bias (float32).

    Args:
        grad_output, grad_sum: gradients of the output and of the sum, shaped like `input`, any strides.
        input: what was normalised, (rows, columns), any strides.
        mean, rstd: as `norm_forward` returned them.
    """
    rows, columns = input.shape
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
    weight = None if weight is None else weight.contiguous()
    one_pass = columns <= BACKWARD_ONE_PASS_COLUMNS
    block_columns = triton.next_power_of_2(columns) if one_pass else TILE_ELEMENTS
    block_rows = _block_rows(block_columns, rows)
    programs = min(triton.cdiv(rows, block_rows), _most_programs(input))
    weight_sums = rstd.new_empty((programs, columns)) if weight_needs_grad else None
    bias_sums = rstd.new_empty((programs, columns)) if bias_needs_grad else None
    tensors = (grad_output, grad_sum, input, weight, mean, rstd, grad_input)
    strides = (*grad_output.stride(), *_strides(grad_sum), *input.stride())
    warps = _warps(input, block_rows * block_columns)
    with device_guard(input):
        if one_pass:
            _backward_kernel[(programs,)](
                *tensors,
                weight_sums,
                bias_sums,
                rows,
                columns,
                *strides,
                CENTERED=centered,
                BLOCK_ROWS=block_rows,
                BLOCK_COLUMNS=block_columns,
                num_warps=warps,
            )
        else:
            _backward_long_row_kernel[(rows,)](
                *tensors, columns, *strides, CENTERED=centered, BLOCK_COLUMNS=block_columns, num_warps=warps
            )
            if weight_needs_grad or bias_needs_grad:
                _parameter_sums_kernel[(triton.cdiv(columns, block_columns), programs)](
                    grad_output,
                    input,
                    mean,
                    rstd,
                    weight_sums,
                    bias_sums,
                    rows,
                    columns,
                    *grad_output.stride(),
                    *input.stride(),
                    CENTERED=centered,
                    BLOCK_COLUMNS=block_columns,
                    num_warps=warps,
                )
    return (
        grad_input,
        None if weight_sums is None else weight_sums.sum(0),
        None if bias_sums is None else bias_sums.sum(0),
    )


def _strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def _block_rows(block_columns: int, rows: int) -> int:
    """Whole rows in a tile: several where they are short."""
    return max(1, min(TILE_ELEMENTS // block_columns, triton.next_power_of_2(rows)))


def _warps(tensor: torch.Tensor, tile_elements: int) -> int:
    """Warps for a tile, from one to the 1,024 threads that every architecture allows."""
    threads = min(1024, tile_elements // ELEMENTS_PER_THREAD)
    return max(1, threads // architecture_of(tensor).warp_size)


def _most_programs(tensor: torch.Tensor) -> int:
    """Programs that the sums of dw and db are divided among."""
    if not tensor.is_cuda or not torch.cuda.is_available():
        return BACKWARD_PROGRAMS_PER_MULTIPROCESSOR
    multiprocessors = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return multiprocessors * BACKWARD_PROGRAMS_PER_MULTIPROCESSOR
