"""A Transformer's input: LayerNorm and dropout of the sum of word, position and token type embeddings; and gradients.

    x = word[id] + position[p] + token_type[t],  y = dropout(LayerNorm(x))

as in BERT (Devlin et al., 2019, section 3). The sum is never stored: the backward computes it again. A table's
gradient is gathered: the tokens, sorted by their row of the table, tell which rows of dx to add. So no addition is
atomic, every result is deterministic and each row is written once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.dropout import Dropout, dropout_arguments, dropout_keep
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of, multiprocessors_of
from fastformer_kernels.normalization import scale_and_shift
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import Matrix, aligned, alignment

MAX_COLUMNS = 4096
TILE_ELEMENTS = 4096
ELEMENTS_PER_THREAD = 8
# For the backward: enough programs to keep the memory busy, but so few that their partial sums stay small.
PROGRAMS_PER_MULTIPROCESSOR = 4
TABLE_BLOCK_TOKENS = 8
TABLE_BLOCK_COLUMNS = 256
# Tokens of one table row that one program adds up. Rows with more are split among at most MOST_SPLITS programs.
TOKENS_PER_SPLIT = 64
MOST_SPLITS = 64


class Lookups(NamedTuple):
    """The ids and tables from which a token's embeddings are read.

    Attributes:
        word_ids, position_ids, token_type_ids: (tokens,), int64 or int32. Without position_ids a token's position is
            its index in the sequence; without token_type_ids its type is row 0.
        word, position, token_type: tables, (rows, columns); all but word may be None.
        words, positions, token_types: number of rows of each table.
        sequence_length: number of tokens of a sequence.
    """

    word_ids: torch.Tensor
    position_ids: torch.Tensor | None
    token_type_ids: torch.Tensor | None
    word: torch.Tensor
    position: torch.Tensor | None
    token_type: torch.Tensor | None
    words: int
    positions: int
    token_types: int
    sequence_length: int


@triton.jit
def _load_row(table_pointer, id, rows, column, columns, valid):
    """The rows `id` of a table in float32; NaN for a row outside the table, since no error can be raised here."""
    known = (id >= 0) & (id < rows)
    x = tl.load(table_pointer + tl.where(known, id, 0) * columns + column, mask=valid, other=0.0).to(tl.float32)
    return tl.where(known, x, float("nan"))


@triton.jit
def _load_sum(lookups, row, row_valid, column, columns):
    """The sum of the embeddings of the tokens `row` in float32, from a `Lookups`; zero outside the rows and columns."""
    valid = row_valid & (column < columns)
    word = tl.load(lookups.word_ids + row, mask=row_valid, other=0).to(tl.int64)
    x = _load_row(lookups.word, word, lookups.words, column, columns, valid)
    if lookups.position is not None:
        position = row % lookups.sequence_length
        if lookups.position_ids is not None:
            position = tl.load(lookups.position_ids + row, mask=row_valid, other=0).to(tl.int64)
        x += _load_row(lookups.position, position, lookups.positions, column, columns, valid)
    if lookups.token_type is not None:
        token_type = row * 0
        if lookups.token_type_ids is not None:
            token_type = tl.load(lookups.token_type_ids + row, mask=row_valid, other=0).to(tl.int64)
        x += _load_row(lookups.token_type, token_type, lookups.token_types, column, columns, valid)
    return tl.where(valid, x, 0.0)


@triton.jit
def _forward_kernel(
    lookups,
    weight_pointer,
    bias_pointer,
    dropout,
    output_pointer,
    mean_pointer,
    rstd_pointer,
    rows,
    columns,
    eps,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute y = dropout(LayerNorm(x)), where x is the sum of a token's embeddings, for BLOCK_ROWS tokens.

    Args:
        lookups: a `Lookups`.
        weight_pointer, bias_pointer: those of LayerNorm, (columns,), or None.
        dropout: a `Dropout`.
        output_pointer: (rows, columns), y, written.
        mean_pointer, rstd_pointer: (rows,) float32, written.
        rows, columns, eps: number of tokens, the tables' columns, and the number added to the variance.
        ALIGNMENT: a number that divides the columns.
        BLOCK_ROWS, BLOCK_COLUMNS: the size of a tile, which holds whole rows.
    """
    columns = aligned(columns, ALIGNMENT)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    row_valid = row < rows
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    valid = row_valid & (column < columns)
    x = _load_sum(lookups, row, row_valid, column, columns)
    # The mean is subtracted in two parts, as in `normalization`: one float32 is not precise enough far from zero.
    shift = tl.sum(x, axis=1)[:, None] / columns
    x = tl.where(valid, x - shift, 0.0)
    remainder = tl.sum(x, axis=1)[:, None] / columns
    x = tl.where(valid, x - remainder, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / columns + eps)
    y = scale_and_shift(x * rstd, weight_pointer, bias_pointer, column, columns)
    if dropout.seed is not None:
        keep = dropout_keep(dropout, row, 0, BLOCK_ROWS, BLOCK_COLUMNS)
        y = tl.where(keep, y * dropout.scale, 0.0)
    tl.store(output_pointer + row * columns + column, round_to(y, output_pointer.dtype.element_ty), mask=valid)
    tl.store(mean_pointer + row, shift + remainder, mask=row_valid)
    tl.store(rstd_pointer + row, rstd, mask=row_valid)


@triton.jit
def _backward_kernel(
    grad_output,
    lookups,
    weight_pointer,
    dropout,
    mean_pointer,
    rstd_pointer,
    grad_sum_pointer,
    weight_sums_pointer,
    bias_sums_pointer,
    rows,
    columns,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute the gradient of the sum of embeddings, and this program's sums for LayerNorm's weight and bias.

    Args:
        grad_output: a `Matrix`, dy.
        grad_sum_pointer: (rows, columns), dx, written.
        weight_sums_pointer, bias_sums_pointer: (programs, columns) float32, written; None if not wanted.

    The other arguments are those of `_forward_kernel`.
    """
    columns = aligned(columns, ALIGNMENT)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    program = tl.program_id(0).to(tl.int64)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS).to(tl.int64))[:, None]
        row_valid = row < rows
        valid = row_valid & (column < columns)
        dy_row = grad_output.pointer + aligned(row * grad_output.stride_row, ALIGNMENT)
        dy = tl.load(dy_row + column * grad_output.stride_column, mask=valid, other=0.0).to(tl.float32)
        if dropout.seed is not None:
            keep = dropout_keep(dropout, row, 0, BLOCK_ROWS, BLOCK_COLUMNS)
            dy = tl.where(keep, dy * dropout.scale, 0.0)
        x = _load_sum(lookups, row, row_valid, column, columns)
        mean = tl.load(mean_pointer + row, mask=row_valid, other=0.0)
        rstd = tl.load(rstd_pointer + row, mask=row_valid, other=0.0)
        normalised = tl.where(valid, (x - mean) * rstd, 0.0)
        if weight_sums_pointer is not None:
            weight_sum += dy * normalised
        if bias_sums_pointer is not None:
            bias_sum += dy
        g = scale_and_shift(dy, weight_pointer, None, column, columns)
        dx = g - normalised * (tl.sum(g * normalised, axis=1)[:, None] / columns)
        dx = rstd * (dx - tl.sum(g, axis=1)[:, None] / columns)
        dx = round_to(dx, grad_sum_pointer.dtype.element_ty)
        tl.store(grad_sum_pointer + row * columns + column, dx, mask=valid)
    sums = program * columns + column
    if weight_sums_pointer is not None:
        tl.store(weight_sums_pointer + sums, tl.sum(weight_sum, axis=0)[None, :], mask=column < columns)
    if bias_sums_pointer is not None:
        tl.store(bias_sums_pointer + sums, tl.sum(bias_sum, axis=0)[None, :], mask=column < columns)


@triton.jit
def _table_gradient_kernel(
    grad_sum_pointer,
    order_pointer,
    starts_pointer,
    grad_table_pointer,
    columns,
    padding_idx,
    ALIGNMENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute one row of a table's gradient, or one part of it: the sum of the gradients of the row's tokens.

    Args:
        grad_sum_pointer: (tokens, columns), dx.
        order_pointer, starts_pointer: (tokens,) and (rows + 1,) int64, as in `table_gradient`.
        grad_table_pointer: (parts, rows, columns), written.
        columns, padding_idx: the table's columns, and its row whose gradient stays zero.
        ALIGNMENT: a number that divides the columns.
        BLOCK_TOKENS, BLOCK_COLUMNS: the size of a tile.
    """
    columns = aligned(columns, ALIGNMENT)
    table_row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)[None, :]
    begin = tl.load(starts_pointer + table_row)
    end = tl.load(starts_pointer + table_row + 1)
    end = tl.where(table_row == padding_idx, begin, end)
    length = tl.cdiv(end - begin, tl.num_programs(2))
    begin += tl.program_id(2) * length
    end = tl.minimum(end, begin + length)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for start in range(begin, end, BLOCK_TOKENS):
        at = (start + tl.arange(0, BLOCK_TOKENS))[:, None]
        token = tl.load(order_pointer + at, mask=at < end, other=0)
        dx = tl.load(grad_sum_pointer + token * columns + column, mask=(at < end) & (column < columns), other=0.0)
        total += dx.to(tl.float32)
    target = (tl.program_id(2) * tl.num_programs(0).to(tl.int64) + table_row) * columns + column
    total = round_to(tl.sum(total, axis=0)[None, :], grad_table_pointer.dtype.element_ty)
    tl.store(grad_table_pointer + target, total, mask=column < columns)


def embedding_forward(
    word_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    token_type: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum each token's embeddings, and apply LayerNorm and dropout.

    Args:
        word_ids, position_ids, token_type_ids: all of the same shape, int64 or int32, contiguous. Without position_ids
            a position is the index along the last dimension; without token_type_ids every type is row 0.
        word, position, token_type: tables, each (rows, columns), contiguous, all of the same floating dtype.
        weight, bias: those of LayerNorm, (columns,), contiguous, any floating dtype.

    Returns:
        The output, (*word_ids.shape, columns) in the tables' dtype; the rows' mean and rstd, (*word_ids.shape, 1)
        float32.
    """
    shape = word_ids.shape
    output = word.new_empty((*shape, word.shape[1]))
    mean = word.new_empty((*shape, 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _launch_forward(
        word_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        (output, mean, rstd),
        *dropout_arguments(dropout),
        eps,
    )
    return output, mean, rstd


@kept_launch
def _launch_forward(
    word_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    token_type: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
    eps: float,
) -> Launch:
    """Describe the launch. `results` are output, mean and rstd."""
    output, mean, rstd = results
    rows, columns = word_ids.numel(), word.shape[1]
    lookups = _lookups(word_ids, position_ids, token_type_ids, word, position, token_type)
    blocks = _blocks(rows, columns)
    return Launch(
        _forward_kernel,
        (triton.cdiv(rows, blocks["BLOCK_ROWS"]),),
        {
            "lookups": lookups,
            "weight_pointer": weight,
            "bias_pointer": bias,
            "dropout": Dropout(seed, threshold, scale),
            "output_pointer": output,
            "mean_pointer": mean,
            "rstd_pointer": rstd,
            "rows": rows,
            "columns": columns,
            "eps": eps,
            "ALIGNMENT": alignment(columns),
            **blocks,
            "num_warps": _warps(blocks, word),
            **COMPILER_OPTIONS,
        },
    )


def embedding_backward(
    grad_output: torch.Tensor,
    word_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    token_type: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout: Dropout | None,
    *,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the sum of embeddings, in the tables' dtype, and of LayerNorm's weight and bias.

    Those of weight and bias are float32, and None if not needed. `grad_output` is (*word_ids.shape, columns), any
    strides. The other arguments are the arguments and the results of `embedding_forward`.
    """
    rows, columns = word_ids.numel(), word.shape[1]
    grad_sum = word.new_empty(grad_output.shape)
    sums = (_programs(rows, columns, word), columns)
    weight_sums = rstd.new_empty(sums) if weight_needs_grad else None
    bias_sums = rstd.new_empty(sums) if bias_needs_grad else None
    _launch_backward(
        grad_output.flatten(0, -2),
        word_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        mean,
        rstd,
        grad_sum,
        weight_sums,
        bias_sums,
        *dropout_arguments(dropout),
    )
    return (
        grad_sum,
        None if weight_sums is None else weight_sums.sum(0),
        None if bias_sums is None else bias_sums.sum(0),
    )


@kept_launch
def _launch_backward(
    grad_output: torch.Tensor,
    word_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    token_type: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_sum: torch.Tensor,
    weight_sums: torch.Tensor | None,
    bias_sums: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
) -> Launch:
    """Describe the launch. `grad_output` is (tokens, columns)."""
    rows, columns = grad_output.shape
    blocks = _blocks(rows, columns)
    return Launch(
        _backward_kernel,
        (_programs(rows, columns, word),),
        {
            "grad_output": Matrix(grad_output, *grad_output.stride()),
            "lookups": _lookups(word_ids, position_ids, token_type_ids, word, position, token_type),
            "weight_pointer": weight,
            "dropout": Dropout(seed, threshold, scale),
            "mean_pointer": mean,
            "rstd_pointer": rstd,
            "grad_sum_pointer": grad_sum,
            "weight_sums_pointer": weight_sums,
            "bias_sums_pointer": bias_sums,
            "rows": rows,
            "columns": columns,
            "ALIGNMENT": alignment(columns, grad_output.stride(0)),
            **blocks,
            "num_warps": _warps(blocks, word),
            **COMPILER_OPTIONS,
        },
    )


def table_gradient(grad_sum: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """The gradient of a table, (rows, columns) in `grad_sum`'s dtype.

    Args:
        grad_sum: (..., columns), contiguous, the gradient of the sum of embeddings.
        order: (tokens,) int64, the tokens sorted by their row of the table.
        starts: (rows + 1,) int64, where each row's tokens begin in `order`.
        padding_idx: a row whose gradient stays zero; -1 for none.
    """
    rows, columns = starts.shape[0] - 1, grad_sum.shape[-1]
    splits = max(1, min(MOST_SPLITS, order.shape[0] // (rows * TOKENS_PER_SPLIT)))
    if splits == 1:
        gradient = grad_sum.new_empty(rows, columns)
        _launch_table_gradient(grad_sum, order, starts, gradient, splits, padding_idx)
        return gradient
    parts = grad_sum.new_empty(splits, rows, columns, dtype=torch.float32)
    _launch_table_gradient(grad_sum, order, starts, parts, splits, padding_idx)
    return parts.sum(0).to(grad_sum.dtype)


@kept_launch
def _launch_table_gradient(
    grad_sum: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    parts: torch.Tensor,
    splits: int,
    padding_idx: int,
) -> Launch:
    """Describe the launch that writes the gradient of a table, one part for each of `splits` parts of the tokens."""
    rows, columns = parts.shape[-2:]
    block_columns = min(TABLE_BLOCK_COLUMNS, triton.next_power_of_2(columns))
    return Launch(
        _table_gradient_kernel,
        (rows, triton.cdiv(columns, block_columns), splits),
        {
            "grad_sum_pointer": grad_sum,
            "order_pointer": order,
            "starts_pointer": starts,
            "grad_table_pointer": parts,
            "columns": columns,
            "padding_idx": padding_idx,
            "ALIGNMENT": alignment(columns),
            "BLOCK_TOKENS": TABLE_BLOCK_TOKENS,
            "BLOCK_COLUMNS": block_columns,
            "num_warps": max(1, 128 // architecture_of(grad_sum).warp_size),
            **COMPILER_OPTIONS,
        },
    )


def _lookups(
    word_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor | None,
    token_type: torch.Tensor | None,
) -> Lookups:
    """Ids and tables with their sizes, as kernels take them."""
    words, positions, token_types = (0 if table is None else len(table) for table in (word, position, token_type))
    return Lookups(
        word_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        words,
        positions,
        token_types,
        sequence_length=word_ids.shape[-1],
    )


def _programs(rows: int, columns: int, tensor: torch.Tensor) -> int:
    """The number of programs of the backward. Each has its own partial sums."""
    tiles = -(-rows // _blocks(rows, columns)["BLOCK_ROWS"])
    return min(tiles, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors_of(tensor))


@lru_cache
def _blocks(rows: int, columns: int) -> dict[str, int]:
    """The size of a tile, which holds whole rows. It has at least four columns: dropout draws random words for four."""
    block_columns = max(4, triton.next_power_of_2(columns))
    block_rows = max(1, min(TILE_ELEMENTS // block_columns, triton.next_power_of_2(rows)))
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}


def _warps(blocks: dict[str, int], tensor: torch.Tensor) -> int:
    threads = blocks["BLOCK_ROWS"] * blocks["BLOCK_COLUMNS"] // ELEMENTS_PER_THREAD
    return max(1, threads // architecture_of(tensor).warp_size)
