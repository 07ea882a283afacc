"""LayerNorm and RMSNorm of rows that have an odd number of 16-bit elements, and the gradients.

The formulas are those of `normalization`. Rows lie end to end, so most begin at no multiple of 32 bits, where tiles of
whole rows could only be moved element by element. Here a tile begins at the first multiple of 8 elements in its row,
and is moved in 128 bits. The up to 7 elements before it and after it, the row's edges, are a small tile of their own.

Weights must be read at the same columns, and so at any place. Therefore a program reads them once for many rows: each
8th row of the matrix, or fewer, which are all cut alike.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.configurations import chosen
from fastformer_kernels.kept_launches import Launch
from fastformer_kernels.launch import COMPILER_OPTIONS, multiprocessors_of
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import (
    ALIGNED_ELEMENTS,
    RowConfiguration,
    aligned,
    cut_rows,
    edge_columns,
    row_class,
)

# The columns of these kernels: shorter rows have few accesses, longer ones would spill.
LEAST_COLUMNS, MOST_COLUMNS = 513, 8191
# By the most columns. There are as many programs as are resident, and registers are limited so that they have 768
# threads or more.
_CONFIGURATIONS = {
    1024: RowConfiguration(tile_elements=1024, thread_elements=8, programs=6, registers=80),
    2048: RowConfiguration(tile_elements=2048, thread_elements=8, programs=3, registers=80),
    4096: RowConfiguration(tile_elements=4096, thread_elements=8, programs=2, registers=64),
    8192: RowConfiguration(tile_elements=8192, thread_elements=8, programs=1, registers=64),
}


@triton.jit
def _cut_of_program(columns, BLOCK_COLUMNS: tl.constexpr):
    """How this program's rows are cut, which is the same for all of them.

    Returns:
        The number of elements before the tile; then, counted from the tile's begin, the columns of the tile and whether
        each is in it, and the columns of the edges and whether each is in the row.
    """
    first, _, _ = cut_rows(tl.program_id(0).to(tl.int64) * columns, columns)
    first = first.to(tl.int32)
    end = aligned(columns - first, ALIGNED_ELEMENTS)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    edge, edge_valid = edge_columns(first, end, columns)
    return first, column, column < end, edge.to(tl.int32), edge_valid


@triton.jit
def _load(pointer, column, valid):
    """Elements in float32, 0 where not valid."""
    return tl.load(pointer + column, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_parameter(pointer, column, valid, default: tl.constexpr):
    """A parameter's elements in float32; `default` if there is no pointer."""
    return tl.full(column.shape, default, tl.float32) if pointer is None else _load(pointer, column, valid)


@triton.jit
def _store(pointer, x, column, valid):
    """Store x, rounded to the pointer's dtype."""
    tl.store(pointer + column, round_to(x, pointer.dtype.element_ty), mask=valid)


@triton.jit
def _load_sum(input_pointer, residual_pointer, column, valid, dtype: tl.constexpr):
    """Elements of input + residual, rounded to `dtype`, in float32."""
    x = _load(input_pointer, column, valid)
    if residual_pointer is not None:
        x += _load(residual_pointer, column, valid)
    return round_to(x, dtype).to(tl.float32)


@triton.jit
def _sum(x):
    """The sum of a tile, as a scalar. A tensor of one element would tie the layouts of tile and edges together."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _row_mean(x, edge_x, columns):
    return (_sum(x) + _sum(edge_x)) / columns


@triton.jit
def _forward_of_odd_rows_kernel(
    input_pointer,
    residual_pointer,
    weight_pointer,
    bias_pointer,
    output_pointer,
    total_pointer,
    statistics_pointer,
    rows,
    columns,
    eps,
    CENTERED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute y = (x - mean x) rstd * w + b with x = residual + input, row by row.

    Args:
        input_pointer, residual_pointer, output_pointer, total_pointer: (rows, columns), contiguous; y and x are
            written. residual_pointer and total_pointer may be None.
        weight_pointer, bias_pointer, statistics_pointer, rows, columns, eps, CENTERED: as in `normalization`.
        BLOCK_COLUMNS: the size of a tile, at least `columns`. The number of programs is a multiple of ALIGNED_ELEMENTS.
    """
    first, column, valid, edge, edge_valid = _cut_of_program(columns, BLOCK_COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    weight = _load_parameter(weight_pointer, first + column, valid, 1.0)
    bias = _load_parameter(bias_pointer, first + column, valid, 0.0)
    edge_weight = _load_parameter(weight_pointer, first + edge, edge_valid, 1.0)
    edge_bias = _load_parameter(bias_pointer, first + edge, edge_valid, 0.0)
    dtype: tl.constexpr = output_pointer.dtype.element_ty
    for row in range(program, rows, tl.num_programs(0)):
        begin = aligned(row * columns + first, ALIGNED_ELEMENTS)
        residual_row = residual_pointer
        if residual_pointer is not None:
            residual_row = residual_pointer + begin
        x = _load_sum(input_pointer + begin, residual_row, column, valid, dtype)
        edge_x = _load_sum(input_pointer + begin, residual_row, edge, edge_valid, dtype)
        if total_pointer is not None:
            _store(total_pointer + begin, x, column, valid)
            _store(total_pointer + begin, edge_x, edge, edge_valid)
        if CENTERED:
            # The mean is subtracted in two parts, as in `normalization`.
            shift = _row_mean(x, edge_x, columns)
            x = tl.where(valid, x - shift, 0.0)
            edge_x = tl.where(edge_valid, edge_x - shift, 0.0)
            remainder = _row_mean(x, edge_x, columns)
            x = tl.where(valid, x - remainder, 0.0)
            edge_x = tl.where(edge_valid, edge_x - remainder, 0.0)
            tl.store(statistics_pointer + rows + row, shift + remainder)
        rstd = tl.rsqrt(_row_mean(x * x, edge_x * edge_x, columns) + eps)
        tl.store(statistics_pointer + row, rstd)
        _store(output_pointer + begin, x * rstd * weight + bias, column, valid)
        _store(output_pointer + begin, edge_x * rstd * edge_weight + edge_bias, edge, edge_valid)


@triton.jit
def _load_terms(dy_row, x_row, weight, mean, rstd, column, valid):
    """dy, g = dy * w and n = (x - mean) rstd of a row's elements; zero where not valid."""
    dy = _load(dy_row, column, valid)
    normalised = tl.where(valid, _load(x_row, column, valid) - mean, 0.0) * rstd
    return dy, dy * weight, normalised


@triton.jit
def _store_gradient(
    g,
    normalised,
    mean_product,
    mean_g,
    rstd,
    grad_sum_pointer,
    grad_input_pointer,
    grad_residual_pointer,
    begin,
    column,
    valid,
    CENTERED: tl.constexpr,
):
    """Store dx = rstd (g - n mean(g n) - mean(g)), plus the gradient of x, as the gradients of input and residual."""
    dx = g - normalised * mean_product
    if CENTERED:
        dx -= mean_g
    dx *= rstd
    if grad_sum_pointer is not None:
        dx += _load(grad_sum_pointer + begin, column, valid)
    if grad_residual_pointer is not None:
        _store(grad_residual_pointer + begin, dx, column, valid)
    _store(grad_input_pointer + begin, dx, column, valid)


@triton.jit
def _backward_of_odd_rows_kernel(
    grad_output_pointer,
    grad_sum_pointer,
    x_pointer,
    weight_pointer,
    statistics_pointer,
    grad_input_pointer,
    grad_residual_pointer,
    sums_pointer,
    rows,
    columns,
    CENTERED: tl.constexpr,
    WEIGHT_SUMS: tl.constexpr,
    BIAS_SUMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute dx row by row, and this program's sums for dw and db.

    Args:
        grad_output_pointer, grad_sum_pointer, x_pointer, grad_input_pointer, grad_residual_pointer: (rows, columns),
            contiguous: dy, the gradient of x where x is returned too, x, and the two gradients, which are written.
            grad_sum_pointer and grad_residual_pointer may be None.
        weight_pointer, statistics_pointer, rows, columns, CENTERED, BLOCK_COLUMNS: as in `_forward_of_odd_rows_kernel`.
        sums_pointer: (number of wanted sums, programs, columns) float32, written.
        WEIGHT_SUMS, BIAS_SUMS: which sums are wanted.
    """
    first, column, valid, edge, edge_valid = _cut_of_program(columns, BLOCK_COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    weight = _load_parameter(weight_pointer, first + column, valid, 1.0)
    edge_weight = _load_parameter(weight_pointer, first + edge, edge_valid, 1.0)
    weight_sum = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    edge_weight_sum = tl.zeros((1, 2 * ALIGNED_ELEMENTS), tl.float32)
    bias_sum = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    edge_bias_sum = tl.zeros((1, 2 * ALIGNED_ELEMENTS), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        begin = aligned(row * columns + first, ALIGNED_ELEMENTS)
        rstd = tl.load(statistics_pointer + row)
        mean = 0.0
        if CENTERED:
            mean = tl.load(statistics_pointer + rows + row)
        dy_row = grad_output_pointer + begin
        x_row = x_pointer + begin
        dy, g, normalised = _load_terms(dy_row, x_row, weight, mean, rstd, column, valid)
        edge_dy, edge_g, edge_normalised = _load_terms(dy_row, x_row, edge_weight, mean, rstd, edge, edge_valid)
        weight_sum += dy * normalised
        edge_weight_sum += edge_dy * edge_normalised
        bias_sum += dy
        edge_bias_sum += edge_dy
        mean_product = _row_mean(g * normalised, edge_g * edge_normalised, columns)
        mean_g = _row_mean(g, edge_g, columns)
        _store_gradient(
            edge_g, edge_normalised, mean_product, mean_g, rstd, grad_sum_pointer, grad_input_pointer,
            grad_residual_pointer, begin, edge, edge_valid, CENTERED,
        )  # fmt: skip
        _store_gradient(
            g, normalised, mean_product, mean_g, rstd, grad_sum_pointer, grad_input_pointer, grad_residual_pointer,
            begin, column, valid, CENTERED,
        )  # fmt: skip
    sums_row = sums_pointer
    if WEIGHT_SUMS:
        sums_row = sums_pointer + program * columns + first
        _store(sums_row, weight_sum, column, valid)
        _store(sums_row, edge_weight_sum, edge, edge_valid)
        program += tl.num_programs(0)
    if BIAS_SUMS:
        sums_row = sums_pointer + program * columns + first
        _store(sums_row, bias_sum, column, valid)
        _store(sums_row, edge_bias_sum, edge, edge_valid)


def are_odd_rows(tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether these kernels handle the rows of these tensors: contiguous, an odd number of 16-bit elements each."""
    columns = tensor.shape[-1]
    odd = columns % 2 == 1 and LEAST_COLUMNS <= columns <= MOST_COLUMNS and tensor.element_size() == 2
    return odd and all(each is None or each.is_contiguous() for each in (tensor, *others))


def forward_of_odd_rows(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    total: torch.Tensor | None,
    statistics: torch.Tensor,
    eps: float,
    centered: bool,
) -> Launch:
    """Describe the launch of the forward; arguments as in `normalization.norm_forward`."""
    return _launch(
        _forward_of_odd_rows_kernel,
        input,
        _configuration("norm_forward", input, centered),
        {
            "input_pointer": input,
            "residual_pointer": residual,
            "weight_pointer": weight,
            "bias_pointer": bias,
            "output_pointer": output,
            "total_pointer": total,
            "statistics_pointer": statistics,
            "eps": eps,
            "CENTERED": centered,
        },
    )


def backward_of_odd_rows(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    grad_input: torch.Tensor,
    grad_residual: torch.Tensor | None,
    sums: torch.Tensor | None,
    centered: bool,
    sums_weight: bool,
    sums_bias: bool,
) -> Launch:
    """Describe the launch of the backward; `sums` is (number of wanted sums, `backward_programs`, columns)."""
    return _launch(
        _backward_of_odd_rows_kernel,
        x,
        _configuration("norm_backward", x, centered),
        {
            "grad_output_pointer": grad_output,
            "grad_sum_pointer": grad_sum,
            "x_pointer": x,
            "weight_pointer": weight,
            "statistics_pointer": statistics,
            "grad_input_pointer": grad_input,
            "grad_residual_pointer": grad_residual,
            "sums_pointer": sums,
            "CENTERED": centered,
            "WEIGHT_SUMS": sums_weight,
            "BIAS_SUMS": sums_bias,
        },
    )


def backward_programs(x: torch.Tensor, centered: bool) -> int:
    """The number of programs of the backward of the rows of `x`."""
    return _programs(_configuration("norm_backward", x, centered), x)


def _launch(kernel: Any, x: torch.Tensor, configuration: RowConfiguration, arguments: dict[str, Any]) -> Launch:
    """The launch of a kernel on the rows of `x`, with these arguments and those that both kernels share."""
    columns = x.shape[-1]
    block_columns = 1 << columns.bit_length()
    return Launch(
        kernel,
        (_programs(configuration, x),),
        {
            **arguments,
            "rows": x.numel() // columns,
            "columns": columns,
            "BLOCK_COLUMNS": block_columns,
            "num_warps": configuration.warps(block_columns, x),
            **configuration.register_limit(x),
            **COMPILER_OPTIONS,
        },
    )


def _programs(configuration: RowConfiguration, tensor: torch.Tensor) -> int:
    """As many programs as are resident, but no more than rows, as a multiple of ALIGNED_ELEMENTS."""
    rows, alike = tensor.numel() // tensor.shape[-1], ALIGNED_ELEMENTS.value
    return max(1, min(rows, configuration.programs * multiprocessors_of(tensor)) // alike) * alike


def _configuration(operation: str, tensor: torch.Tensor, centered: bool) -> RowConfiguration:
    """The configuration of `operation` for the rows of `tensor`."""
    columns = tensor.shape[-1]
    default = next(configuration for most, configuration in _CONFIGURATIONS.items() if columns <= most)

    def shape() -> tuple[str, ...]:
        return "layer" if centered else "rms", *row_class(columns, tensor.element_size()), "odd"

    return chosen(operation, tensor, default, shape)
