"""Dropout of the elements of a matrix, drawn from a counter: nothing is stored, the backward draws the same again.

Philox-4x32-10 (Salmon et al., SC 2011) of (column // 4, row, stream, offset) under the key `seed`: its four words serve
four neighbouring columns. The mask depends on nothing else, neither on the tile nor on the architecture or backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Dropout:
    """Which elements are dropped.

    Attributes:
        probability: of an element being dropped, in (0, 1).
        seed: (2,) int64 on the tensors' device, the generator's seed and offset.
        stream: tells apart the dropouts of one operation, which share a seed.
    """

    probability: float
    seed: torch.Tensor
    stream: int


def dropout_arguments(dropout: Dropout | None) -> tuple[torch.Tensor | None, int, int, float]:
    """What a kernel takes: seed_pointer (None without dropout), stream, the threshold of kept words and their scale."""
    if dropout is None:
        return None, 0, 0, 1.0
    threshold = min(round(dropout.probability * 2**32), 2**32 - 1)
    # Triton takes 32 bits as signed.
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    return dropout.seed, dropout.stream, signed, 1.0 / (1.0 - dropout.probability)


@triton.jit
def drop(x, seed_pointer, stream, threshold, scale, row, first_column, COLUMNS: tl.constexpr):
    """The tile `x` of rows `row` (ROWS,) and COLUMNS columns from `first_column`, a multiple of 4, after dropout."""
    if seed_pointer is None:
        return x
    else:
        group = first_column // 4 + tl.arange(0, COLUMNS // 4)
        counter = group.to(tl.uint32)[None, :] + tl.zeros((row.shape[0], 1), tl.uint32)
        zero = counter * 0
        word_0, word_1, word_2, word_3 = tl.philox(
            tl.load(seed_pointer),
            counter,
            row.to(tl.uint32)[:, None] + zero,
            tl.full((), stream, tl.uint32) + zero,
            tl.load(seed_pointer + 1).to(tl.uint32) + zero,
        )
        words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape(row.shape[0], COLUMNS)
        keep = words.to(tl.uint32, bitcast=True) >= tl.full((), threshold, tl.int32).to(tl.uint32, bitcast=True)
        return tl.where(keep, x * scale, 0.0)
