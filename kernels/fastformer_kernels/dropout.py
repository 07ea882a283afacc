"""Dropout of a matrix's elements, as a pure function of (seed, offset, row, column).

Philox-4x32-10 (Salmon et al., SC 2011) with the counter (column // 4, row, row's upper word, offset): its four words
serve four neighbouring columns, so that every tile size and the backward draw the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """Which elements to drop.

    Attributes:
        seed: (2,) int64 on the tensors' device, seed and offset; None, for a kernel, drops nothing.
        threshold: the 32-bit word below which an element is dropped.
        scale: of those kept.
    """

    seed: torch.Tensor | None
    threshold: int
    scale: float


def dropout_arguments(dropout: Dropout | None) -> tuple[torch.Tensor | None, int, float]:
    """The fields of what a kernel takes, as a kept launch wants them: by themselves."""
    return (None, 0, 1.0) if dropout is None else dropout


@triton.jit
def dropout_keep(dropout, row, start, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Which elements dropout keeps, (BLOCK_ROWS, BLOCK_COLUMNS) boolean.

    `row` is (BLOCK_ROWS, 1) int64, the columns begin at `start`, a multiple of 4 as BLOCK_COLUMNS is; a word below
    the threshold drops its element.
    """
    counter = (start // 4 + tl.arange(0, BLOCK_COLUMNS // 4)).to(tl.uint32)[None, :]
    zero = (row * 0).to(tl.uint32) + counter * 0
    word_0, word_1, word_2, word_3 = tl.philox(
        tl.load(dropout.seed),
        counter + zero,
        row.to(tl.uint32) + zero,
        (row >> 32).to(tl.uint32) + zero,
        tl.load(dropout.seed + 1).to(tl.uint32) + zero,
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    words = tl.reshape(words, (BLOCK_ROWS, BLOCK_COLUMNS))
    return words.to(tl.uint32, bitcast=True) >= tl.full((1, 1), dropout.threshold, tl.uint32)


@triton.jit
def drop(x, dropout, row, start, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """A tile `x` of rows `row` (BLOCK_ROWS,), columns from `start`, after dropout if there is a seed."""
    if dropout.seed is None:
        return x
    else:
        keep = dropout_keep(dropout, row.to(tl.int64)[:, None], start, BLOCK_ROWS, BLOCK_COLUMNS)
        return tl.where(keep, x * dropout.scale, 0.0)
