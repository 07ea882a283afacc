"""Dropout of a matrix's elements, as a pure function of (seed, offset, row, column).

Philox-4x32-10 (Salmon et al., SC 2011) with the counter (column // 4, row, row's upper word, offset): its four words
serve four neighbouring columns, so that every tile size and the backward draw the same words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """The elements to drop, as a random generator's state and a threshold.

    Attributes:
        seed: (2,) int64 on the tensors' device, seed and offset. A kernel may be given None: it then drops nothing.
        threshold: an element is dropped if its random 32-bit word is below this.
        scale: multiplies the elements that are kept.
    """

    seed: torch.Tensor | None
    threshold: int
    scale: float


def dropout_arguments(dropout: Dropout | None) -> tuple[torch.Tensor | None, int, float]:
    """The fields of `dropout` one by one, as a kept launch takes them. Without dropout they drop nothing."""
    return (None, 0, 1.0) if dropout is None else dropout


@triton.jit
def dropout_keep(dropout, row, start, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """True for the elements that dropout keeps, (BLOCK_ROWS, BLOCK_COLUMNS).

    `row` is (BLOCK_ROWS, 1) int64. The columns begin at `start`; `start` and BLOCK_COLUMNS are multiples of 4.
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
    """Apply dropout, if there is a seed, to a tile `x` of the rows `row` (BLOCK_ROWS,) and the columns from `start`."""
    if dropout.seed is None:
        return x
    else:
        keep = dropout_keep(dropout, row.to(tl.int64)[:, None], start, BLOCK_ROWS, BLOCK_COLUMNS)
        return tl.where(keep, x * dropout.scale, 0.0)
