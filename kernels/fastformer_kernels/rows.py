"""Addressing of rows, shared by the kernels that reduce over one dimension of a tensor of any strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.configurations import others_than, size_class
from fastformer_kernels.launch import architecture_of

ROW_DIMENSIONS = 3


class RowTensor(NamedTuple):
    """A tensor as a kernel sees rows of it that a `RowLayout` describes: where it lies and its strides."""

    pointer: torch.Tensor | None
    stride_0: int
    stride_1: int
    stride_2: int
    stride_column: int


class Matrix(NamedTuple):
    """A (rows, columns) matrix as a kernel sees it."""

    pointer: torch.Tensor | None
    stride_row: int
    stride_column: int


# Upper ends of the classes of rows whose launches are measured.
COLUMN_CLASSES = (256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Vector(NamedTuple):
    """A vector as a kernel sees it."""

    pointer: torch.Tensor | None
    stride: int


@dataclass(frozen=True)
class RowConfiguration:
    """How a kernel that works on rows is launched.

    Attributes:
        tile_elements: of a tile that holds several short rows, or a part of a long one.
        thread_elements: of a tile for each thread.
        most_threads: of a program.
        programs: for each multiprocessor, where programs visit tiles in turns; 0 where each tile has one.
        stages: of tiles that such a program loads ahead into shared memory; 0 loads nothing ahead.
    """

    tile_elements: int
    thread_elements: int
    most_threads: int = 1024
    programs: int = 0
    stages: int = 0

    def warps(self, elements: int, tensor: torch.Tensor) -> int:
        """Warps for a tile of so many elements on `tensor`'s device."""
        threads = min(self.most_threads, elements // self.thread_elements)
        return max(1, threads // architecture_of(tensor).warp_size)


# Elements of a tile for each thread: a load is worth four at least, and registers hold no more.
_THREAD_ELEMENTS = (4, 64)


def row_candidates(default: RowConfiguration) -> list[RowConfiguration]:
    """Configurations to measure beside the shipped one: tiles, threads, programs where these visit tiles in turns."""
    fewest, most = _THREAD_ELEMENTS
    found = [
        RowConfiguration(elements, elements // threads, threads, programs)
        for elements in (default.tile_elements * scale // 2 for scale in ((2,) if default.programs else (1, 2, 4, 8)))
        for threads in (128, 256, 512, 1024)
        for programs in ((1, 2, 4, 8) if default.programs else (0,))
        if fewest <= elements // threads <= most
    ]
    if default.programs:
        found += [replace(default, programs=programs, stages=stages) for programs in (1, 2, 4) for stages in (2, 3)]
    return others_than(default, found)


@lru_cache
def row_class(columns: int, element_size: int) -> tuple[str, ...]:
    """The class of rows of `columns` elements."""
    return f"{8 * element_size}-bit", f"columns{size_class(columns, COLUMN_CLASSES)}"


@dataclass(frozen=True)
class RowLayout:
    """Tensors of one shape seen as rows of a (size_0, size_1, size_2, columns) array, each with strides of its own.

    Attributes:
        sizes: the three row dimensions, outermost first; their product is the number of rows.
        columns: the length of a row.
        strides: for each tensor, its three row strides and its column stride, in elements.
        alignment: a power of two, at most 16, that divides the columns and every row stride.
    """

    sizes: tuple[int, ...]
    columns: int
    strides: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]

    @property
    def alignment(self) -> int:
        return alignment(self.columns, *(stride for strides in self.strides for stride in strides[:-1]))


def addressable(dim: int, *tensors: torch.Tensor | None) -> Sequence[Any]:
    """`tensors` (equal shapes, any strides) as they are where `row_layout` describes them, else contiguous copies."""
    present = [tensor for tensor in tensors if tensor is not None]
    dimensions = present[0].dim()
    if dimensions <= ROW_DIMENSIONS + 1 or len(_row_dims(dim % dimensions, present)) <= ROW_DIMENSIONS:
        return tensors
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def row_layout(dim: int, tensors: Sequence[torch.Tensor]) -> RowLayout:
    """Lay `addressable` tensors out as rows along dimension `dim`, merging the other dimensions."""
    dim %= tensors[0].dim()
    dims = _row_dims(dim, tensors)
    padding = ROW_DIMENSIONS - len(dims)
    shape = tensors[0].shape
    sizes = (1,) * padding + tuple(_product([shape[d] for d in group]) for group in dims)
    strides = tuple(
        (0,) * padding + tuple(tensor.stride(group[-1]) for group in dims) + (tensor.stride(dim),) for tensor in tensors
    )
    return RowLayout(sizes, shape[dim], strides)


def alignment(*numbers: int) -> int:
    """The greatest power of two, at most 16, that divides all `numbers`.

    A kernel that is told so uses wide loads where Triton, which looks for multiples of 16 only, would not.
    """
    return math.gcd(16, *numbers)


def _row_dims(dim: int, tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Group neighbouring dimensions but `dim` that one stride steps through in every tensor.

    Dimensions of size one vanish.
    """
    groups: list[list[int]] = []
    shape = tensors[0].shape
    for d in (d for d in range(len(shape)) if d != dim and shape[d] != 1):
        if groups and all(tensor.stride(groups[-1][-1]) == shape[d] * tensor.stride(d) for tensor in tensors):
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


@triton.jit
def aligned(number, ALIGNMENT: tl.constexpr):
    """`number`, or each in a tensor of numbers, which is a multiple of ALIGNMENT, in a form that says so."""
    # A hint (tl.multiple_of) is lost where the compiler folds the operation that carries it.
    return number // ALIGNMENT * ALIGNMENT if ALIGNMENT > 1 else number


@triton.jit
def row_offset(row, size_1, size_2, tensor, ALIGNMENT: tl.constexpr):
    """Offset in elements, 64-bit, of the first element of each row in `row` of a `RowTensor`; a multiple of
    ALIGNMENT."""
    outer = row // size_2
    inner = (row % size_2).to(tl.int64)
    middle = (outer % size_1).to(tl.int64)
    outermost = (outer // size_1).to(tl.int64)
    return aligned(outermost * tensor.stride_0 + middle * tensor.stride_1 + inner * tensor.stride_2, ALIGNMENT)
