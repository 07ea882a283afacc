"""The common part of kernels with a matrix product: the order of tiles, the product of a tile, and the launch.

A product's operands are seen as matrices (outer, depth). The outer dimension of one becomes the result's rows, that of
the other its columns. The sum runs over the depth, in float32 and in a fixed order. The kernels are persistent: the
number of programs is what the GPU runs at once, and each takes one tile after another. Tiles are visited in groups of
GROUP_ROWS rows of tiles, within a group column by column, so that tiles of both operands are read again from the L2
cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastformer_kernels.configurations import others_than
from fastformer_kernels.constants import constants
from fastformer_kernels.launch import COMPILER_OPTIONS, multiprocessors_of
from fastformer_kernels.precision import dot

GROUP_ROWS = 8
# The way to read an operand: by pointers, or by the copy engine of sm_90 and later. Neighbours in memory lie along the
# depth, or (transposed) along the outer dimension.
POINTERS, TRANSPOSED_POINTERS, DESCRIPTOR, TRANSPOSED_DESCRIPTOR = (tl.constexpr(access) for access in range(4))


class OperandStrides(NamedTuple):
    """Strides of a product's operands, seen as (outer, depth); 0 for an operand that is absent."""

    left: int
    left_depth: int
    right: int
    right_depth: int
    second_right: int
    second_right_depth: int


class Product(NamedTuple):
    """The constants of a kernel with a product.

    Attributes:
        INPUT_PRECISION: the precision of the product.
        LEFT_ACCESS, RIGHT_ACCESS: the way to read each operand: POINTERS, DESCRIPTOR, ...
        EVEN_DEPTH: whether the depth is a multiple of BLOCK_DEPTH.
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH: the size of a tile.
        GROUP_ROWS: rows of tiles that are visited together.
        PARTS: the epilogue handles a tile's columns in this many parts, one after the other.
    """

    INPUT_PRECISION: str
    LEFT_ACCESS: int
    RIGHT_ACCESS: int
    EVEN_DEPTH: bool
    BLOCK_ROWS: int
    BLOCK_COLUMNS: int
    BLOCK_DEPTH: int
    GROUP_ROWS: int
    PARTS: int


@triton.jit
def tile_origin(tile, rows, columns, product):
    """First row and first column of tile number `tile`, in the order of visits."""
    row_tiles = tl.cdiv(rows, product.BLOCK_ROWS)
    group_tiles = product.GROUP_ROWS * tl.cdiv(columns, product.BLOCK_COLUMNS)
    first_row_tile = tile // group_tiles * product.GROUP_ROWS
    group_rows = tl.minimum(row_tiles - first_row_tile, product.GROUP_ROWS)
    row_tile = first_row_tile + tile % group_tiles % group_rows
    return row_tile * product.BLOCK_ROWS, tile % group_tiles // group_rows * product.BLOCK_COLUMNS


@triton.jit
def element_offsets(row, column, stride_row, stride_column):
    """64-bit offsets of the elements [row, column] of a matrix."""
    return row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column


@triton.jit
def _load_operand(
    operand,
    first,
    first_depth,
    size,
    depth_size,
    stride,
    stride_depth,
    ACCESS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A (BLOCK, BLOCK_DEPTH) tile of an operand, zero outside the matrix."""
    outer = first + tl.arange(0, BLOCK)
    depth = first_depth + tl.arange(0, BLOCK_DEPTH)
    if ACCESS == DESCRIPTOR:
        return operand.load([first, first_depth])
    elif ACCESS == TRANSPOSED_DESCRIPTOR:
        return operand.load([first_depth, first]).T
    elif ACCESS == TRANSPOSED_POINTERS:
        valid = (outer < size)[None, :]
        if not EVEN_DEPTH:
            valid = valid & (depth < depth_size)[:, None]
        return tl.load(operand + element_offsets(depth, outer, stride_depth, stride), mask=valid, other=0.0).T
    else:
        valid = (outer < size)[:, None]
        if not EVEN_DEPTH:
            valid = valid & (depth < depth_size)[None, :]
        return tl.load(operand + element_offsets(outer, depth, stride, stride_depth), mask=valid, other=0.0)


@triton.jit
def tile_products(left, right, second_right, strides, first_row, first_column, rows, columns, depth_size, product):
    """A tile of left @ right^T and of left @ second_right^T, in float32. Without second_right, the first product twice.

    Args:
        left, right, second_right: as `operands` returns them; the last may be None.
        strides: an `OperandStrides`.
        product: a `Product`.
    """
    LEFT: tl.constexpr = product.LEFT_ACCESS
    RIGHT: tl.constexpr = product.RIGHT_ACCESS
    EVEN: tl.constexpr = product.EVEN_DEPTH
    ROWS: tl.constexpr = product.BLOCK_ROWS
    COLUMNS: tl.constexpr = product.BLOCK_COLUMNS
    DEPTH: tl.constexpr = product.BLOCK_DEPTH
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    second_result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, depth_size, DEPTH):
        x = _load_operand(
            left, first_row, depth, rows, depth_size, strides.left, strides.left_depth, LEFT, EVEN, ROWS, DEPTH
        )
        y = _load_operand(
            right, first_column, depth, columns, depth_size, strides.right, strides.right_depth,
            RIGHT, EVEN, COLUMNS, DEPTH,
        )  # fmt: skip
        result = dot(x, y.T, result, product.INPUT_PRECISION)
        if second_right is not None:
            z = _load_operand(
                second_right, first_column, depth, columns, depth_size, strides.second_right,
                strides.second_right_depth, RIGHT, EVEN, COLUMNS, DEPTH,
            )  # fmt: skip
            second_result = dot(x, z.T, second_result, product.INPUT_PRECISION)
    if second_right is None:
        second_result = result
    return result, second_result


@triton.jit
def column_part(x, PART: tl.constexpr, PARTS: tl.constexpr):
    """The part number PART when a tile's columns are cut into PARTS (a power of two) equal parts."""
    if PARTS == 1:
        return x
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        if PART < PARTS // 2:
            return column_part(left, PART, PARTS // 2)
        else:
            return column_part(right, PART - PARTS // 2, PARTS // 2)


@dataclass(frozen=True)
class Configuration:
    """The tile sizes and the launch configuration of a product.

    Attributes:
        rows, columns, depth: the size of a tile.
        warps, stages: the compiler's options.
        descriptors: read operands by the copy engine where their strides allow it.
        parts: the epilogue handles a tile's columns in this many parts, one after the other. An epilogue of a whole
            tile at once spills as soon as it does more than add a bias.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    parts: int = 1

    def constants(self, depth_size: int, precision: str, left_access: int, right_access: int) -> Product:
        """The constants of a kernel with this configuration."""
        return constants(
            Product(
                INPUT_PRECISION=precision,
                LEFT_ACCESS=left_access,
                RIGHT_ACCESS=right_access,
                EVEN_DEPTH=depth_size % self.depth == 0,
                BLOCK_ROWS=self.rows,
                BLOCK_COLUMNS=self.columns,
                BLOCK_DEPTH=self.depth,
                GROUP_ROWS=GROUP_ROWS,
                PARTS=self.parts,
            )
        )

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options for a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}

    def grid(self, rows: int, columns: int, tensor: torch.Tensor) -> tuple[int]:
        """The grid: one program for every tile, or as many as the GPU runs at once if that is fewer."""
        return (min(triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns), multiprocessors_of(tensor)),)


# Tiles to compare with a shipped one: factors for its rows, columns, depth and warps, and the stages to add.
_OTHER_TILES = (
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, -1),
    (1, 0.5, 1, 1, 0),
    (1, 0.5, 1, 1, 1),
    (1, 0.5, 1, 0.5, 0),
    (0.5, 1, 1, 1, 1),
    (0.5, 1, 1, 0.5, 0),
    (0.5, 0.5, 1, 0.5, 1),
    (2, 0.5, 1, 1, 0),
    (1, 2, 1, 1, 0),
    (1, 1, 0.5, 1, 1),
    (1, 1, 0.5, 1, 3),
)


def product_candidates(default: Configuration, element_size: int, shared_memory: int) -> list[Configuration]:
    """Configurations to compare with the shipped one, within the shared memory (bytes) of one CTA."""
    found = [replace(default, descriptors=False)]
    for rows, columns, depth, warps, stages in _OTHER_TILES:
        tile = replace(
            default,
            rows=max(16, round(default.rows * rows)),
            columns=max(16, round(default.columns * columns)),
            depth=max(16, round(default.depth * depth)),
            warps=max(1, round(default.warps * warps)),
            stages=max(1, default.stages + stages),
        )
        # Parts of the epilogue keep their width.
        parts = max(1, default.parts * tile.columns // default.columns)
        if tile.stages * (tile.rows + tile.columns) * tile.depth * element_size <= shared_memory:
            found.append(replace(tile, parts=parts))
    return others_than(default, found)


def operands(
    block: int, matrices: tuple[torch.Tensor | None, ...], configuration: Configuration
) -> tuple[list[Any], int]:
    """Return the matrices (outer, depth) as a kernel takes them, and the one way in which it reads them all.

    The copy engine needs rows that start at multiples of 16 bytes, are contiguous and do not overlap.
    """
    for access in (DESCRIPTOR, TRANSPOSED_DESCRIPTOR) if configuration.descriptors else ():
        views = [
            None if matrix is None else matrix.T if access == TRANSPOSED_DESCRIPTOR else matrix for matrix in matrices
        ]
        if all(view is None or _is_copied_by_descriptor(view) for view in views):
            tile = [block, configuration.depth]
            if access == TRANSPOSED_DESCRIPTOR:
                tile.reverse()
            # The base is the matrix itself, not a view: a kept launch accepts only tensors that its launcher was given.
            return [
                None if view is None else TensorDescriptor(matrix, view.shape, view.stride(), tile)
                for matrix, view in zip(matrices, views, strict=True)
            ], access.value
    transposed = all(matrix is None or (matrix.stride(0) == 1 and matrix.stride(1) != 1) for matrix in matrices)
    return list(matrices), (TRANSPOSED_POINTERS if transposed else POINTERS).value


def _is_copied_by_descriptor(matrix: torch.Tensor) -> bool:
    stride, unit = matrix.stride()
    aligned = stride * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    return unit == 1 and stride >= matrix.shape[1] > 0 and aligned
