"""The operations between a feed-forward block's products where a library computes these: each one pass over memory.

    hidden = drop(act(up)), or drop(act(gate) * up)          from pre-activations that have their bias
    d up, d gate and hidden recomputed                       from d hidden and the pre-activations
    output = drop(product + bias) + residual
    d product = drop(d output)

The library adds the biases of the first products in its epilogue, so only the output's bias is added here. A result
overwrites an argument where possible. All matrices are (tokens, columns), contiguous except residual and d output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.activations import gradients_of, hidden_of
from fastformer_kernels.dropout import Dropout, drop, dropout_arguments
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import Matrix, Vector

TILE_ELEMENTS = 2048
TILE_COLUMNS = 512


@triton.jit
def _tile(tokens, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows and first column of this program's tile, the offsets of its elements, and a mask of those that exist."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    valid = (row < tokens)[:, None] & (column < columns)[None, :]
    return row, first_column, row.to(tl.int64)[:, None] * columns + column[None, :], valid


@triton.jit
def _load(pointer, offsets, valid):
    """Load elements as float32; None without a pointer."""
    x = None
    if pointer is not None:
        x = tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def _store(pointer, offsets, x, valid):
    """Store `x` in the dtype of what `pointer` points to."""
    tl.store(pointer + offsets, round_to(x, pointer.dtype.element_ty), mask=valid)


@triton.jit
def _strided(row, first_column, matrix, BLOCK_COLUMNS: tl.constexpr):
    """Offsets in a `Matrix` of a tile's elements."""
    column = (first_column + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    return row.to(tl.int64)[:, None] * matrix.stride_row + column[None, :] * matrix.stride_column


@triton.jit
def _activation_forward_kernel(
    up_pointer,
    gate_pointer,
    hidden_pointer,
    dropout,
    tokens,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute hidden = drop(act(up)), or drop(act(gate) * up) with a gate; all are (tokens, columns), contiguous."""
    row, first_column, offsets, valid = _tile(tokens, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    hidden = hidden_of(_load(up_pointer, offsets, valid), _load(gate_pointer, offsets, valid), ACTIVATION)
    hidden = drop(hidden, dropout, row, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    _store(hidden_pointer, offsets, hidden, valid)


@triton.jit
def _activation_backward_kernel(
    grad_hidden_pointer,
    up_pointer,
    gate_pointer,
    grad_up_pointer,
    grad_gate_pointer,
    hidden_pointer,
    dropout,
    tokens,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute d up, d gate and hidden from d hidden; all are (tokens, columns), contiguous.

    The pointers for d gate and hidden are None where they are not wanted.
    """
    row, first_column, offsets, valid = _tile(tokens, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    grad_hidden = _load(grad_hidden_pointer, offsets, valid)
    up = _load(up_pointer, offsets, valid)
    gate = _load(gate_pointer, offsets, valid)
    grad_hidden = drop(grad_hidden, dropout, row, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    grad_up, grad_gate = gradients_of(grad_hidden, up, gate, ACTIVATION)
    _store(grad_up_pointer, offsets, grad_up, valid)
    if grad_gate_pointer is not None:
        _store(grad_gate_pointer, offsets, grad_gate, valid)
    if hidden_pointer is not None:
        hidden = hidden_of(up, gate, ACTIVATION)
        hidden = drop(hidden, dropout, row, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
        _store(hidden_pointer, offsets, hidden, valid)


@triton.jit
def _bias_dropout_residual_kernel(
    product_pointer,
    output_pointer,
    bias,
    residual,
    dropout,
    tokens,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute output = drop(product + bias) + residual.

    Args:
        product_pointer, output_pointer: (tokens, columns), contiguous; they may be the same.
        bias, residual: a `Vector` and a `Matrix`, whose pointers may be None.
        dropout: a `Dropout`.
    """
    row, first_column, offsets, valid = _tile(tokens, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    output = _load(product_pointer, offsets, valid)
    if bias.pointer is not None:
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        output += _load(bias.pointer, column.to(tl.int64) * bias.stride, column < columns)[None, :]
    output = drop(output, dropout, row, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    if residual.pointer is not None:
        output += _load(residual.pointer, _strided(row, first_column, residual, BLOCK_COLUMNS), valid)
    _store(output_pointer, offsets, output, valid)


@triton.jit
def _dropout_kernel(
    input, output_pointer, dropout, tokens, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Compute output = drop(input): (tokens, columns), contiguous, from a `Matrix`."""
    row, first_column, offsets, valid = _tile(tokens, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    x = _load(input.pointer, _strided(row, first_column, input, BLOCK_COLUMNS), valid)
    x = drop(x, dropout, row, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    _store(output_pointer, offsets, x, valid)


def activation_forward(
    up: torch.Tensor, gate: torch.Tensor | None, activation: str, dropout: Dropout | None, hidden: torch.Tensor
) -> None:
    """Write the hidden layer to `hidden`, which may be `up` or `gate`."""
    _launch_activation_forward(up, gate, hidden, *dropout_arguments(dropout), activation)


@kept_launch
def _launch_activation_forward(
    up: torch.Tensor,
    gate: torch.Tensor | None,
    hidden: torch.Tensor,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
    activation: str,
) -> Launch:
    """Describe the launch that writes `hidden` from the pre-activations."""
    arguments = {
        "up_pointer": up,
        "gate_pointer": gate,
        "hidden_pointer": hidden,
        "dropout": Dropout(seed, threshold, scale),
        "ACTIVATION": activation,
        **_options(up),
    }
    return Launch(_activation_forward_kernel, _grid(up), arguments)


def activation_backward(
    grad_hidden: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    activation: str,
    dropout: Dropout | None,
    store_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `up` (overwrites `grad_hidden`) and `gate`, and the hidden layer if `store_hidden`, else None."""
    grad_gate = None if gate is None else torch.empty_like(gate)
    hidden = torch.empty_like(up) if store_hidden else None
    _launch_activation_backward(grad_hidden, up, gate, grad_gate, hidden, *dropout_arguments(dropout), activation)
    return grad_hidden, grad_gate, hidden


@kept_launch
def _launch_activation_backward(
    grad_hidden: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    grad_gate: torch.Tensor | None,
    hidden: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
    activation: str,
) -> Launch:
    """Describe the launch that overwrites `grad_hidden` with up's gradient, and writes `grad_gate` and `hidden`."""
    arguments = {
        "grad_hidden_pointer": grad_hidden,
        "up_pointer": up,
        "gate_pointer": gate,
        "grad_up_pointer": grad_hidden,
        "grad_gate_pointer": grad_gate,
        "hidden_pointer": hidden,
        "dropout": Dropout(seed, threshold, scale),
        "ACTIVATION": activation,
        **_options(up),
    }
    return Launch(_activation_backward_kernel, _grid(up), arguments)


def bias_dropout_residual(
    product: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, dropout: Dropout | None
) -> torch.Tensor:
    """The block's output from its last product. It overwrites the product unless `residual` has a wider dtype."""
    dtype = product.dtype if residual is None else torch.promote_types(product.dtype, residual.dtype)
    output = product if dtype == product.dtype else torch.empty_like(product, dtype=dtype)
    _launch_bias_dropout_residual(product, output, bias, residual, *dropout_arguments(dropout))
    return output


@kept_launch
def _launch_bias_dropout_residual(
    product: torch.Tensor,
    output: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
) -> Launch:
    """Describe the launch that writes the block's output, which may be `product` itself."""
    arguments = {
        "product_pointer": product,
        "output_pointer": output,
        "bias": Vector(bias, 0 if bias is None else bias.stride(0)),
        "residual": Matrix(residual, *((0, 0) if residual is None else residual.stride())),
        "dropout": Dropout(seed, threshold, scale),
        **_options(output),
    }
    return Launch(_bias_dropout_residual_kernel, _grid(output), arguments)


def apply_dropout(input: torch.Tensor, dropout: Dropout, dtype: torch.dtype) -> torch.Tensor:
    """Apply dropout to `input` (tokens, columns), any strides, or its backward to a gradient; returns `dtype`."""
    output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
    _launch_dropout(input, output, *dropout_arguments(dropout))
    return output


@kept_launch
def _launch_dropout(
    input: torch.Tensor, output: torch.Tensor, seed: torch.Tensor, threshold: int, scale: float
) -> Launch:
    """Describe the launch that applies dropout to `input`."""
    arguments = {
        "input": Matrix(input, *input.stride()),
        "output_pointer": output,
        "dropout": Dropout(seed, threshold, scale),
        **_options(output),
    }
    return Launch(_dropout_kernel, _grid(output), arguments)


def _grid(matrix: torch.Tensor) -> tuple[int, int]:
    """The number of programs along rows and columns, one for each tile of `matrix`."""
    block_rows, block_columns = _tile_size(matrix)
    return triton.cdiv(matrix.shape[0], block_rows), triton.cdiv(matrix.shape[1], block_columns)


def _options(matrix: torch.Tensor) -> dict[str, Any]:
    """The sizes of `matrix` and of its tiles, and the compiler's options."""
    tokens, columns = matrix.shape
    block_rows, block_columns = _tile_size(matrix)
    tile = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    return {"tokens": tokens, "columns": columns, **tile, "num_warps": 4, **COMPILER_OPTIONS}


def _tile_size(matrix: torch.Tensor) -> tuple[int, int]:
    tokens, columns = matrix.shape
    block_columns = max(4, min(TILE_COLUMNS, triton.next_power_of_2(columns)))
    return min(TILE_ELEMENTS // block_columns, triton.next_power_of_2(tokens)), block_columns
