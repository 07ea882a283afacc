"""What the kernels with a matrix product share: the order of tiles, the product of a tile, and how both are launched.

A product's operands are seen as matrices (outer, depth): the outer dimension of one becomes the result's rows, that of
the other its columns, and the depth is summed over, in float32 and in a fixed order. The kernels are persistent: as
many programs as the GPU runs at once walk all tiles, GROUP_ROWS rows of tiles at a time column by column, so that the
tiles of both operands are reread from the L2 cache.
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
# How an operand is read: by pointers, or by the copy engine of sm_90 and later; from memory where neighbours are along
# the depth, or (transposed) along the outer dimension.
POINTERS, TRANSPOSED_POINTERS, DESCRIPTOR, TRANSPOSED_DESCRIPTOR = (tl.constexpr(access) for access in range(4))


class OperandStrides(NamedTuple):
    """Strides of a product's operands, seen as (outer, depth); 0 for an operand that is not there."""

    left: int
    left_depth: int
    right: int
    right_depth: int
    second_right: int
    second_right_depth: int


class Product(NamedTuple):
    """The constants of a kernel with a product.

    Attributes:
        INPUT_PRECISION: of the product.
        LEFT_ACCESS, RIGHT_ACCESS: how an operand is read: POINTERS, DESCRIPTOR, ...
        EVEN_DEPTH: whether the depth is a multiple of the tile's.
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH: of a tile.
        GROUP_ROWS: rows of tiles that are visited together.
        PARTS: of a tile's columns, which the epilogue does one after the other.
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
    """First row and first column of the tile that is visited as number `tile`."""
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
    """A tile of left @ right^T and of left @ second_right^T (without that operand the first again), in float32.

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
    """Number PART of PARTS (a power of two) equal parts of a tile's columns."""
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
    """How a product is tiled and launched.

    Attributes:
        rows, columns, depth: of a tile.
        warps, stages: the compiler's knobs.
        descriptors: read operands by the copy engine where their strides allow it.
        parts: of a tile's columns, which the epilogue does one after the other: an epilogue of a whole tile at once
            spills as soon as it does more than add a bias.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    parts: int = 1

    def constants(self, depth_size: int, precision: str, left_access: int, right_access: int) -> Product:
        """What a kernel of this configuration is compiled for."""
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
        """The compiler's options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}

    def grid(self, rows: int, columns: int, tensor: torch.Tensor) -> tuple[int]:
        """A program for every tile, or as many as the GPU runs at once."""
        return (min(triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns), multiprocessors_of(tensor)),)


# Tiles to measure beside a shipped one: what its rows, columns, depth and warps are multiplied by, and stages added.
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
    """Configurations to measure beside the shipped one, within a CTA's bytes of shared memory."""
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
        # As wide a part in the epilogue as before.
        parts = max(1, default.parts * tile.columns // default.columns)
        if tile.stages * (tile.rows + tile.columns) * tile.depth * element_size <= shared_memory:
            found.append(replace(tile, parts=parts))
    return others_than(default, found)


def operands(
    block: int, matrices: tuple[torch.Tensor | None, ...], configuration: Configuration
) -> tuple[list[Any], int]:
    """Matrices (outer, depth) of like memory as a kernel takes them, and how it reads them all.

    The copy engine wants rows that start at multiples of 16 bytes, have no gaps within and do not overlap.
    """
    for access in (DESCRIPTOR, TRANSPOSED_DESCRIPTOR) if configuration.descriptors else ():
        views = [
            None if matrix is None else matrix.T if access == TRANSPOSED_DESCRIPTOR else matrix for matrix in matrices
        ]
        if all(view is None or _is_copied_by_descriptor(view) for view in views):
            tile = [block, configuration.depth]
            if access == TRANSPOSED_DESCRIPTOR:
                tile.reverse()
            # Of the matrix itself, not of a view, so that a launcher was given what it describes.
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
