"""Addresses of rows, shared by the kernels that reduce over one dimension of a tensor with any strides."""

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
# Elements of the widest access to 16-bit numbers, at whose multiples in memory the tiles of a cut row begin.
ALIGNED_ELEMENTS = tl.constexpr(8)


class RowTensor(NamedTuple):
    """A tensor as a kernel sees it, with the strides of the rows that a `RowLayout` describes."""

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


# Upper bounds of the classes of row lengths whose launches are measured.
COLUMN_CLASSES = (256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Vector(NamedTuple):
    """A vector as a kernel sees it."""

    pointer: torch.Tensor | None
    stride: int


@dataclass(frozen=True)
class RowConfiguration:
    """The launch configuration of a kernel that works on rows.

    Attributes:
        tile_elements: elements of a tile, which holds several short rows or a part of a long one.
        thread_elements: elements of a tile for each thread.
        most_threads: the largest number of threads of a program.
        programs: programs for each multiprocessor, where a program takes several tiles one after another; 0 where each
            tile has its own program.
        stages: number of tiles that such a program loads ahead into shared memory; 0 loads nothing ahead.
        registers: the most registers of a thread on NVIDIA's GPUs; 0 leaves them to the compiler.
        split: programs for each multiprocessor that few long rows are split over; 0 never splits a row.
    """

    tile_elements: int
    thread_elements: int
    most_threads: int = 1024
    programs: int = 0
    stages: int = 0
    registers: int = 0
    split: int = 0

    def warps(self, elements: int, tensor: torch.Tensor) -> int:
        """Number of warps for a tile of `elements` elements on `tensor`'s device."""
        threads = min(self.most_threads, elements // self.thread_elements)
        return max(1, threads // architecture_of(tensor).warp_size)

    def register_limit(self, tensor: torch.Tensor) -> dict[str, int]:
        """The compiler's option for `registers` on `tensor`'s device."""
        nvidia = architecture_of(tensor).warp_size == 32
        return {"maxnreg": self.registers} if self.registers and nvidia else {}


# Least and most elements of a tile for each thread: wide loads need four, and registers hold at most 64.
_THREAD_ELEMENTS = (4, 64)


def row_candidates(default: RowConfiguration) -> list[RowConfiguration]:
    """Configurations to compare with the shipped one: tiles, threads, and all that the shipped one has besides."""
    fewest, most = _THREAD_ELEMENTS
    found = [
        RowConfiguration(elements, elements // threads, threads, programs, split=default.split)
        for elements in (default.tile_elements * scale // 2 for scale in ((2,) if default.programs else (1, 2, 4, 8)))
        for threads in (128, 256, 512, 1024)
        for programs in ((1, 2, 4, 8) if default.programs else (0,))
        if fewest <= elements // threads <= most
    ]
    if default.programs:
        found += [replace(default, programs=programs, stages=stages) for programs in (1, 2, 4) for stages in (2, 3)]
        found += [replace(default, registers=registers) for registers in (0, 64, 80, 96)]
    if default.split:
        found += [replace(default, split=split) for split in (0, 1, 2, 4, 8)]
    return others_than(default, found)


@lru_cache
def row_class(columns: int, element_size: int) -> tuple[str, ...]:
    """The class of rows of `columns` elements."""
    return f"{8 * element_size}-bit", f"columns{size_class(columns, COLUMN_CLASSES)}"


@dataclass(frozen=True)
class RowLayout:
    """Tensors of one shape seen as rows of a (size_0, size_1, size_2, columns) array, each with its own strides.

    Attributes:
        sizes: the three row dimensions, outermost first; their product is the number of rows.
        columns: the length of a row.
        strides: for each tensor, its three row strides and its column stride, in elements.
        alignment: the greatest power of two, at most 16, that divides the columns and every row stride.
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
    """Return `tensors` (equal shapes, any strides) if `row_layout` can describe them, else contiguous copies."""
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

    Triton looks only for multiples of 16. A kernel that knows this number can use wide loads in other cases too.
    """
    return math.gcd(16, *numbers)


def _row_dims(dim: int, tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Group neighbouring dimensions other than `dim` that one stride can step through in every tensor.

    Dimensions of size one are left out.
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
    """`number`, or a tensor of numbers, in a form that shows the compiler that it is a multiple of ALIGNMENT."""
    # A hint (tl.multiple_of) is lost when the compiler folds the operation that carries it.
    return number // ALIGNMENT * ALIGNMENT if ALIGNMENT > 1 else number


@triton.jit
def row_offset(row, size_1, size_2, tensor, ALIGNMENT: tl.constexpr):
    """The 64-bit offset, in elements, of the first element of each row in `row` of a `RowTensor`.

    It is a multiple of ALIGNMENT."""
    outer = row // size_2
    inner = (row % size_2).to(tl.int64)
    middle = (outer % size_1).to(tl.int64)
    outermost = (outer // size_1).to(tl.int64)
    return aligned(outermost * tensor.stride_0 + middle * tensor.stride_1 + inner * tensor.stride_2, ALIGNMENT)


@triton.jit
def cut_rows(start_of_row, columns):
    """Cut rows that begin anywhere at the first multiple of ALIGNED_ELEMENTS in memory, where their tiles begin.

    Args:
        start_of_row: offset of each row's first element, int64.
        columns: length of a row, at least ALIGNED_ELEMENTS.

    Returns:
        The number of elements before the tiles, the offset of the tiles, and the number of elements in them, which the
        compiler sees to be a multiple of ALIGNED_ELEMENTS. `edge_columns` are the other elements.
    """
    first = (ALIGNED_ELEMENTS - start_of_row % ALIGNED_ELEMENTS) % ALIGNED_ELEMENTS
    return first, aligned(start_of_row + first, ALIGNED_ELEMENTS), aligned(columns - first, ALIGNED_ELEMENTS)


@triton.jit
def edge_columns(first, end, columns):
    """Columns before and after the tiles of `cut_rows`, counted from the first tile, and whether each is in the row."""
    edge = tl.arange(0, 2 * ALIGNED_ELEMENTS).to(tl.int64)[None, :] - ALIGNED_ELEMENTS
    edge = tl.where(edge < 0, edge, end + edge)
    return edge, (first + edge >= 0) & (first + edge < columns)
