"""LayerNorm and RMSNorm of rows, after bias, dropout and residual addition, and their gradients.

    x = residual + dropout(input + input_bias)

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

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.configurations import chosen
from fastformer_kernels.dropout import Dropout, dropout_keep
from fastformer_kernels.launch import COMPILER_OPTIONS, device_guard, multiprocessors_of
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import RowConfiguration, aligned, alignment, row_class

FORWARD_ONE_PASS_COLUMNS = 16384
BACKWARD_ONE_PASS_BYTES = 16384
BACKWARD_THREE_SUMS_COLUMNS = 4096
_FORWARD_CONFIGURATION = RowConfiguration(tile_elements=4096, thread_elements=16)
# The backward holds a row, its gradient and up to three running sums at once: half as much to a thread, and at most 512
# threads, to leave each 128 registers. Enough programs to keep the memory busy, few enough that their partial sums of
# dw and db stay small beside dx.
_BACKWARD_CONFIGURATION = RowConfiguration(tile_elements=4096, thread_elements=8, most_threads=512, programs=4)


@triton.jit
def _load_sum(
    input_row,
    input_stride,
    input_bias_pointer,
    residual_row,
    residual_stride,
    seed_pointer,
    threshold,
    dropout_scale,
    row,
    row_valid,
    start,
    columns,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """What is normalised, in float32 and rounded to `dtype`, from column `start` on; zero beyond the rows' end."""
    column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    valid = row_valid & (column < columns)
    x = tl.load(input_row + column * input_stride, mask=valid, other=0.0).to(tl.float32)
    if input_bias_pointer is not None:
        x += tl.load(input_bias_pointer + column, mask=column < columns, other=0.0).to(tl.float32)
    if seed_pointer is not None:
        keep = dropout_keep(seed_pointer, row, start, threshold, BLOCK_ROWS, BLOCK_COLUMNS)
        x = tl.where(keep, x * dropout_scale, 0.0)
    if residual_row is not None:
        x += tl.load(residual_row + column * residual_stride, mask=valid, other=0.0).to(tl.float32)
    x = round_to(x, dtype).to(tl.float32)
    return tl.where(valid, x, 0.0)


@triton.jit
def scale_and_shift(normalised, weight_pointer, bias_pointer, column, columns):
    y = normalised
    if weight_pointer is not None:
        y *= tl.load(weight_pointer + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        y += tl.load(bias_pointer + column, mask=column < columns, other=0.0).to(tl.float32)
    return y


@triton.jit
def _forward_kernel(
    input_pointer,
    input_bias_pointer,
    residual_pointer,
    seed_pointer,
    weight_pointer,
    bias_pointer,
    output_pointer,
    total_pointer,
    mean_pointer,
    rstd_pointer,
    rows,
    columns,
    eps,
    threshold,
    dropout_scale,
    input_stride_row,
    input_stride_column,
    residual_stride_row,
    residual_stride_column,
    CENTERED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    columns = aligned(columns, ALIGNMENT)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    row_valid = row < rows
    x_row = input_pointer + aligned(row * input_stride_row, ALIGNMENT)
    residual_row = residual_pointer
    if residual_pointer is not None:
        residual_row = residual_pointer + aligned(row * residual_stride_row, ALIGNMENT)
    target = row * columns
    dtype: tl.constexpr = output_pointer.dtype.element_ty
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    if ONE_PASS:
        valid = row_valid & (column < columns)
        x = _load_sum(
            x_row,
            input_stride_column,
            input_bias_pointer,
            residual_row,
            residual_stride_column,
            seed_pointer,
            threshold,
            dropout_scale,
            row,
            row_valid,
            0,
            columns,
            dtype,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
        if total_pointer is not None:
            tl.store(total_pointer + target + column, round_to(x, dtype), mask=valid)
        if CENTERED:
            shift = tl.sum(x, axis=1)[:, None] / columns
            x = tl.where(valid, x - shift, 0.0)
            remainder = tl.sum(x, axis=1)[:, None] / columns
            x = tl.where(valid, x - remainder, 0.0)
            mean = shift + remainder
        rstd = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / columns + eps)
        y = scale_and_shift(x * rstd, weight_pointer, bias_pointer, column, columns)
        tl.store(output_pointer + target + column, round_to(y, dtype), mask=valid)
    else:
        squares = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        # The first tile's mean; `mean` is what the whole row's mean is beyond it until the end.
        shift = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            valid = row_valid & (start + column < columns)
            x = _load_sum(
                x_row,
                input_stride_column,
                input_bias_pointer,
                residual_row,
                residual_stride_column,
                seed_pointer,
                threshold,
                dropout_scale,
                row,
                row_valid,
                start,
                columns,
                dtype,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
            )
            if total_pointer is not None:
                tl.store(total_pointer + target + start + column, round_to(x, dtype), mask=valid)
            if CENTERED:
                if start == 0:
                    shift = tl.sum(x, axis=1)[:, None] / BLOCK_COLUMNS
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
            x = _load_sum(
                x_row,
                input_stride_column,
                input_bias_pointer,
                residual_row,
                residual_stride_column,
                seed_pointer,
                threshold,
                dropout_scale,
                row,
                row_valid,
                start,
                columns,
                dtype,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
            )
            normalised = ((x - shift) - mean) * rstd
            y = scale_and_shift(normalised, weight_pointer, bias_pointer, start + column, columns)
            tl.store(output_pointer + target + start + column, round_to(y, dtype), mask=valid)
        mean += shift
    if CENTERED:
        tl.store(mean_pointer + row, mean, mask=row_valid)
    tl.store(rstd_pointer + row, rstd, mask=row_valid)


@triton.jit
def _store_gradients(
    dx,
    grad_input_pointer,
    grad_residual_pointer,
    seed_pointer,
    threshold,
    dropout_scale,
    row,
    start,
    target,
    valid,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store dx as the residual's gradient, if that has one of its own, and what dropout leaves of it as the input's.

    Returns the latter.
    """
    if grad_residual_pointer is not None:
        tl.store(grad_residual_pointer + target, round_to(dx, grad_residual_pointer.dtype.element_ty), mask=valid)
    if seed_pointer is not None:
        keep = dropout_keep(seed_pointer, row, start, threshold, BLOCK_ROWS, BLOCK_COLUMNS)
        dx = tl.where(keep, dx * dropout_scale, 0.0)
    tl.store(grad_input_pointer + target, round_to(dx, grad_input_pointer.dtype.element_ty), mask=valid)
    return dx


@triton.jit
def _backward_kernel(
    grad_output_pointer,
    grad_sum_pointer,
    x_pointer,
    weight_pointer,
    mean_pointer,
    rstd_pointer,
    seed_pointer,
    grad_input_pointer,
    grad_residual_pointer,
    weight_sums_pointer,
    bias_sums_pointer,
    input_bias_sums_pointer,
    rows,
    columns,
    threshold,
    dropout_scale,
    grad_output_stride_row,
    grad_output_stride_column,
    grad_sum_stride_row,
    grad_sum_stride_column,
    x_stride_row,
    x_stride_column,
    CENTERED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Rows held in registers: dx, and this program's sums for the gradients of weight and biases."""
    columns = aligned(columns, ALIGNMENT)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    column_valid = column < columns
    program = tl.program_id(0).to(tl.int64)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    input_bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_ROWS).to(tl.int64))[:, None]
        row_valid = row < rows
        valid = row_valid & column_valid
        dy_row = grad_output_pointer + aligned(row * grad_output_stride_row, ALIGNMENT)
        dy = tl.load(dy_row + column * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        x_row = x_pointer + aligned(row * x_stride_row, ALIGNMENT)
        x = tl.load(x_row + column * x_stride_column, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_pointer + row, mask=row_valid, other=0.0)
        if CENTERED:
            x = tl.where(valid, x - tl.load(mean_pointer + row, mask=row_valid, other=0.0), 0.0)
        normalised = x * rstd
        if weight_sums_pointer is not None:
            weight_sum += dy * normalised
        if bias_sums_pointer is not None:
            bias_sum += dy
        g = scale_and_shift(dy, weight_pointer, None, column, columns)
        dx = g - normalised * (tl.sum(g * normalised, axis=1)[:, None] / columns)
        if CENTERED:
            dx -= tl.sum(g, axis=1)[:, None] / columns
        dx *= rstd
        if grad_sum_pointer is not None:
            sum_row = grad_sum_pointer + aligned(row * grad_sum_stride_row, ALIGNMENT)
            dx += tl.load(sum_row + column * grad_sum_stride_column, mask=valid, other=0.0).to(tl.float32)
        dx = _store_gradients(
            dx,
            grad_input_pointer,
            grad_residual_pointer,
            seed_pointer,
            threshold,
            dropout_scale,
            row,
            0,
            row * columns + column,
            valid,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
        if input_bias_sums_pointer is not None:
            input_bias_sum += tl.where(valid, dx, 0.0)
    sums = program * columns + column
    if weight_sums_pointer is not None:
        tl.store(weight_sums_pointer + sums, tl.sum(weight_sum, axis=0)[None, :], mask=column_valid)
    if bias_sums_pointer is not None:
        tl.store(bias_sums_pointer + sums, tl.sum(bias_sum, axis=0)[None, :], mask=column_valid)
    if input_bias_sums_pointer is not None:
        tl.store(input_bias_sums_pointer + sums, tl.sum(input_bias_sum, axis=0)[None, :], mask=column_valid)


@triton.jit
def _backward_long_row_kernel(
    grad_output_pointer,
    grad_sum_pointer,
    x_pointer,
    weight_pointer,
    mean_pointer,
    rstd_pointer,
    seed_pointer,
    grad_input_pointer,
    grad_residual_pointer,
    columns,
    threshold,
    dropout_scale,
    grad_output_stride_row,
    grad_output_stride_column,
    grad_sum_stride_row,
    grad_sum_stride_column,
    x_stride_row,
    x_stride_column,
    CENTERED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx of one row that does not fit in registers, read twice."""
    columns = aligned(columns, ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    dy_row = grad_output_pointer + aligned(row * grad_output_stride_row, ALIGNMENT)
    x_row = x_pointer + aligned(row * x_stride_row, ALIGNMENT)
    sum_row = grad_sum_pointer
    if grad_sum_pointer is not None:
        sum_row = grad_sum_pointer + aligned(row * grad_sum_stride_row, ALIGNMENT)
    rstd = tl.load(rstd_pointer + row)
    mean = tl.zeros((1, 1), tl.float32)
    if CENTERED:
        mean = tl.load(mean_pointer + row)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    products = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    sums = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        at = start + column
        valid = at < columns
        dy = tl.load(dy_row + at * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_row + at * x_stride_column, mask=valid, other=0.0).to(tl.float32)
        g = scale_and_shift(dy, weight_pointer, None, at, columns)
        products += g * ((x - mean) * rstd)
        sums += g
    mean_product = tl.sum(products, axis=1)[:, None] / columns
    mean_g = tl.zeros((1, 1), tl.float32)
    if CENTERED:
        mean_g = tl.sum(sums, axis=1)[:, None] / columns
    for start in range(0, columns, BLOCK_COLUMNS):
        at = start + column
        valid = at < columns
        dy = tl.load(dy_row + at * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_row + at * x_stride_column, mask=valid, other=0.0).to(tl.float32)
        g = scale_and_shift(dy, weight_pointer, None, at, columns)
        dx = rstd * (g - (x - mean) * rstd * mean_product - mean_g)
        if grad_sum_pointer is not None:
            dx += tl.load(sum_row + at * grad_sum_stride_column, mask=valid, other=0.0).to(tl.float32)
        _store_gradients(
            dx,
            grad_input_pointer,
            grad_residual_pointer,
            seed_pointer,
            threshold,
            dropout_scale,
            row,
            start,
            row * columns + at,
            valid,
            1,
            BLOCK_COLUMNS,
        )


@triton.jit
def _parameter_sums_kernel(
    grad_output_pointer,
    x_pointer,
    mean_pointer,
    rstd_pointer,
    weight_sums_pointer,
    bias_sums_pointer,
    rows,
    columns,
    grad_output_stride_row,
    grad_output_stride_column,
    x_stride_row,
    x_stride_column,
    CENTERED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums for dw and db of one tile of columns, over every num_programs(1)-th row."""
    columns = aligned(columns, ALIGNMENT)
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    valid = column < columns
    program = tl.program_id(1).to(tl.int64)
    weight_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for row in range(program, rows, tl.num_programs(1)):
        dy_row = grad_output_pointer + aligned(row * grad_output_stride_row, ALIGNMENT)
        dy = tl.load(dy_row + column * grad_output_stride_column, mask=valid, other=0.0).to(tl.float32)
        if weight_sums_pointer is not None:
            x_row = x_pointer + aligned(row * x_stride_row, ALIGNMENT)
            x = tl.load(x_row + column * x_stride_column, mask=valid, other=0.0).to(tl.float32)
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
    input_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout: Dropout | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centered: bool,
    dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Normalise the rows of x = `residual` + dropout(`input` + `input_bias`).

    Args:
        input, residual: (rows, columns), any strides and floating dtypes.
        input_bias, weight, bias: (columns,), any floating dtypes.
        centered: LayerNorm where true, RMSNorm where false.
        dtype: of the output and x, as wide as input's and residual's or wider.
        keep_sum: return x.

    Returns:
        The output and x, both contiguous; the rows' mean (one unused element for RMSNorm) and rstd, float32.
    """
    rows, columns = input.shape
    output = input.new_empty(rows, columns, dtype=dtype)
    total = torch.empty_like(output) if keep_sum else None
    rstd = input.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else rstd.new_zeros(1)
    one_pass = columns <= FORWARD_ONE_PASS_COLUMNS
    configuration = _configuration("norm_forward", _FORWARD_CONFIGURATION, input, centered)
    block_columns = _one_pass_block(columns) if one_pass else configuration.tile_elements
    block_rows = _block_rows(block_columns, rows, configuration)
    with device_guard(input):
        _forward_kernel[(triton.cdiv(rows, block_rows),)](
            input,
            _contiguous(input_bias),
            residual,
            None if dropout is None else dropout.seed,
            _contiguous(weight),
            _contiguous(bias),
            output,
            total,
            mean,
            rstd,
            rows,
            columns,
            eps,
            *_dropout_numbers(dropout),
            *input.stride(),
            *_strides(residual),
            CENTERED=centered,
            ALIGNMENT=alignment(columns, input.stride(0), _strides(residual)[0]),
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            ONE_PASS=one_pass,
            num_warps=configuration.warps(block_rows * block_columns, input),
            **COMPILER_OPTIONS,
        )
    return output, total, mean, rstd


class NormGradients(NamedTuple):
    """What `norm_backward` returns; None for what was not asked for."""

    input: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    input_bias: torch.Tensor | None


def norm_backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    dropout: Dropout | None,
    *,
    centered: bool,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
    input_bias_needs_grad: bool,
) -> NormGradients:
    """Gradients of everything that `norm_forward` was given.

    Args:
        grad_output, grad_sum: gradients of the output and of x, shaped like `x`, any strides.
        x: what was normalised, (rows, columns), any strides.
        mean, rstd: as `norm_forward` returned them.
        input_dtype: of the input's gradient, which is contiguous.
        residual_dtype: of the residual's gradient, contiguous; None if it is not wanted.

    Returns:
        Gradients of weight and biases are float32.
    """
    rows, columns = x.shape
    grad_input = x.new_empty(rows, columns, dtype=input_dtype)
    grad_residual = None if residual_dtype is None else torch.empty_like(grad_input, dtype=residual_dtype)
    one_pass = columns * max(x.element_size(), grad_output.element_size()) <= BACKWARD_ONE_PASS_BYTES
    configuration = _configuration("norm_backward", _BACKWARD_CONFIGURATION, x, centered)
    block_columns = _one_pass_block(columns) if one_pass else configuration.tile_elements
    block_rows = _block_rows(block_columns, rows, configuration)
    programs = min(triton.cdiv(rows, block_rows), configuration.programs * multiprocessors_of(x))
    weight_sums = rstd.new_empty((programs, columns)) if weight_needs_grad else None
    bias_sums = rstd.new_empty((programs, columns)) if bias_needs_grad else None
    # Of the widest rows' registers a third running sum would spill some.
    sums_input_bias = input_bias_needs_grad and one_pass and columns <= BACKWARD_THREE_SUMS_COLUMNS
    input_bias_sums = rstd.new_empty((programs, columns)) if sums_input_bias else None
    seed = None if dropout is None else dropout.seed
    tensors = (grad_output, grad_sum, x, _contiguous(weight), mean, rstd, seed, grad_input, grad_residual)
    strides = (*grad_output.stride(), *_strides(grad_sum), *x.stride())
    options = {
        "CENTERED": centered,
        "ALIGNMENT": alignment(columns, grad_output.stride(0), _strides(grad_sum)[0], x.stride(0)),
        "BLOCK_COLUMNS": block_columns,
        "num_warps": configuration.warps(block_rows * block_columns, x),
        **COMPILER_OPTIONS,
    }
    with device_guard(x):
        if one_pass:
            _backward_kernel[(programs,)](
                *tensors,
                weight_sums,
                bias_sums,
                input_bias_sums,
                rows,
                columns,
                *_dropout_numbers(dropout),
                *strides,
                STAGES=configuration.stages or None,
                BLOCK_ROWS=block_rows,
                **options,
            )
        else:
            _backward_long_row_kernel[(rows,)](*tensors, columns, *_dropout_numbers(dropout), *strides, **options)
            if weight_needs_grad or bias_needs_grad:
                _parameter_sums_kernel[(triton.cdiv(columns, block_columns), programs)](
                    grad_output,
                    x,
                    mean,
                    rstd,
                    weight_sums,
                    bias_sums,
                    rows,
                    columns,
                    *grad_output.stride(),
                    *x.stride(),
                    **options,
                )
    grad_input_bias = _sum_of_programs(input_bias_sums)
    if input_bias_needs_grad and not sums_input_bias:
        grad_input_bias = grad_input.sum(0, dtype=torch.float32)
    return NormGradients(
        grad_input, grad_residual, _sum_of_programs(weight_sums), _sum_of_programs(bias_sums), grad_input_bias
    )


def _sum_of_programs(sums: torch.Tensor | None) -> torch.Tensor | None:
    return None if sums is None else sums.sum(0)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dropout_numbers(dropout: Dropout | None) -> tuple[int, float]:
    return (0, 1.0) if dropout is None else (dropout.threshold, dropout.scale)


def _strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def _one_pass_block(columns: int) -> int:
    """Columns of a tile that holds whole rows; dropout draws its random words for four at a time."""
    return max(4, triton.next_power_of_2(columns))


def _block_rows(block_columns: int, rows: int, configuration: RowConfiguration) -> int:
    """Whole rows in a tile: several where they are short, never two, for which ptxas spills on sm_80."""
    most = configuration.tile_elements // block_columns
    return min(most, triton.next_power_of_2(rows)) if most > 2 else 1


def _configuration(operation: str, default: RowConfiguration, tensor: torch.Tensor, centered: bool) -> RowConfiguration:
    """The configuration of `operation` on the rows of `tensor`."""

    def shape() -> tuple[str, ...]:
        return "layer" if centered else "rms", *row_class(tensor.shape[1], tensor.element_size())

    return chosen(operation, tensor, default, shape)
