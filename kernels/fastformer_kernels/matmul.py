"""The common part of kernels with a matrix product: the order of tiles, the product of a tile, and the launch.

A product's operands are seen as matrices (outer, depth). The outer dimension of one becomes the result's rows, that of
the other its columns. The sum runs over the depth, in float32 and in a fixed order. The kernels are persistent: the
number of programs is what the GPU runs at once, and each takes one tile after another. Tiles are visited in groups of
GROUP_ROWS rows of tiles, within a group column by column, so that tiles of both operands are read again from the L2
cache.

Three switches of a `Configuration` overlap a tile's epilogue with other work. The copy engine can store its results.
The loops over tiles and depth can be one loop, in which the next tile's operands are copied before the epilogue. Copies
and products can have separate warps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastformer_kernels.configurations import others_than
from fastformer_kernels.constants import constants
from fastformer_kernels.launch import COMPILER_OPTIONS, multiprocessors_of
from fastformer_kernels.precision import dot, round_to

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
        RESULT_ACCESS: the way to write each result: POINTERS or DESCRIPTOR.
        EVEN_DEPTH: whether the depth is a multiple of BLOCK_DEPTH.
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH: the size of a tile.
        GROUP_ROWS: rows of tiles that are visited together.
        PARTS: the epilogue handles a tile's columns in this many parts, one after the other.
        FLATTEN: whether the loops over tiles and depth are one loop.
        WARP_SPECIALIZE: whether copies and products have separate warps.
        MAKES_DESCRIPTORS: whether the operands' descriptors are made in the kernel, not by its launcher.
    """

    INPUT_PRECISION: str
    LEFT_ACCESS: int
    RIGHT_ACCESS: int
    RESULT_ACCESS: int
    EVEN_DEPTH: bool
    BLOCK_ROWS: int
    BLOCK_COLUMNS: int
    BLOCK_DEPTH: int
    GROUP_ROWS: int
    PARTS: int
    FLATTEN: bool
    WARP_SPECIALIZE: bool
    MAKES_DESCRIPTORS: bool


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
def _described(matrix, rows, columns, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """A descriptor, made in the kernel, of a matrix whose columns are contiguous."""
    return tl.make_tensor_descriptor(
        matrix, [rows, columns], [tl.cast(stride, tl.int64), 1], [BLOCK_ROWS, BLOCK_COLUMNS]
    )


@triton.jit
def source_of(operand, size, depth_size, stride, stride_depth, ACCESS: tl.constexpr, BLOCK: tl.constexpr, product):
    """The operand as `tile_products` reads it: unchanged, or as a descriptor that is made here."""
    if product.MAKES_DESCRIPTORS and ACCESS == DESCRIPTOR:
        return _described(operand, size, depth_size, stride, BLOCK, product.BLOCK_DEPTH)
    elif product.MAKES_DESCRIPTORS and ACCESS == TRANSPOSED_DESCRIPTOR:
        return _described(operand, depth_size, size, stride_depth, product.BLOCK_DEPTH, BLOCK)
    else:
        return operand


@triton.jit
def target_of(result, rows, columns, product):
    """A contiguous result (rows, columns) as `store_part` writes it: a pointer or a descriptor."""
    if product.RESULT_ACCESS == DESCRIPTOR:
        return _described(result, rows, columns, columns, product.BLOCK_ROWS, product.BLOCK_COLUMNS // product.PARTS)
    else:
        return result


@triton.jit
def store_part(target, x, first_row, first_column, rows, columns, product):
    """Round a part `x` of a tile to the dtype of a result (rows, columns), and store it there."""
    if product.RESULT_ACCESS == DESCRIPTOR:
        target.store([first_row, first_column], round_to(x, target.dtype))
    else:
        row = first_row + tl.arange(0, x.shape[0])
        column = first_column + tl.arange(0, x.shape[1])
        valid = (row < rows)[:, None] & (column < columns)[None, :]
        places = target + element_offsets(row, column, columns, 1)
        tl.store(places, round_to(x, target.dtype.element_ty), mask=valid)


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
        # Loaded before the first product, all tiles are copied at once and waited for at one barrier.
        if second_right is not None:
            z = _load_operand(
                second_right, first_column, depth, columns, depth_size, strides.second_right,
                strides.second_right_depth, RIGHT, EVEN, COLUMNS, DEPTH,
            )  # fmt: skip
        result = dot(x, y.T, result, product.INPUT_PRECISION)
        if second_right is not None:
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
        descriptor_stores: write results by the copy engine where their size allows it.
        flatten: make one loop of the loops over tiles and depth, so that the next tile's first operands are copied
            during the epilogue. On sm_90 ptxas then waits after each of two products in the loop: not for a gate.
        warp_specialize: give copies and products separate warps, so that copies run ahead into the next tiles. The
            compiler does so for descriptors, on sm_90 from Triton 3.9 on and with four warps. Else it has no effect or
            does not compile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False
    parts: int = 1
    descriptor_stores: bool = False
    flatten: bool = False
    warp_specialize: bool = False

    def constants(
        self, depth_size: int, precision: str, left_access: int, right_access: int, result_access: int
    ) -> Product:
        """The constants of a kernel with this configuration."""
        return constants(
            Product(
                INPUT_PRECISION=precision,
                LEFT_ACCESS=left_access,
                RIGHT_ACCESS=right_access,
                RESULT_ACCESS=result_access,
                EVEN_DEPTH=depth_size % self.depth == 0,
                BLOCK_ROWS=self.rows,
                BLOCK_COLUMNS=self.columns,
                BLOCK_DEPTH=self.depth,
                GROUP_ROWS=GROUP_ROWS,
                PARTS=self.parts,
                FLATTEN=self.flatten,
                WARP_SPECIALIZE=self.warp_specialize and min(left_access, right_access) >= DESCRIPTOR.value,
                MAKES_DESCRIPTORS=self.warp_specialize,
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
    found = [*_other_overlaps(default), *_other_tiles(default)]
    needed = [each.stages * (each.rows + each.columns) * each.depth * element_size for each in found]
    return others_than(default, [each for each, size in zip(found, needed, strict=True) if size <= shared_memory])


def _other_overlaps(default: Configuration) -> Iterator[Configuration]:
    """Yield other ways to copy operands and results, and to overlap a tile's epilogue with that."""
    pointers = replace(default, descriptors=False, descriptor_stores=False, warp_specialize=False)
    ways = [(stores, flatten) for stores in (False, True) for flatten in (False, True)]
    yield from (replace(pointers, flatten=flatten) for flatten in (False, True))
    if default.descriptors:
        yield from (replace(default, descriptor_stores=stores, flatten=flatten) for stores, flatten in ways)
        apart = replace(default, descriptor_stores=True, flatten=False, warp_specialize=True)
        # On sm_90 the four warps of the products become two groups with half of the rows each; sm_100 takes eight.
        yield replace(apart, warps=4)
        yield replace(apart, warps=4, columns=default.columns // 2, parts=max(1, default.parts // 2))
        yield replace(apart, warps=8)


def _other_tiles(default: Configuration) -> Iterator[Configuration]:
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
        yield replace(tile, parts=max(1, default.parts * tile.columns // default.columns))


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
            if configuration.warp_specialize:
                return list(matrices), access.value
            # The base is the matrix itself, not a view: a kept launch accepts only tensors that its launcher was given.
            return [
                None if view is None else TensorDescriptor(matrix, view.shape, view.stride(), tile)
                for matrix, view in zip(matrices, views, strict=True)
            ], access.value
    transposed = all(matrix is None or (matrix.stride(0) == 1 and matrix.stride(1) != 1) for matrix in matrices)
    return list(matrices), (TRANSPOSED_POINTERS if transposed else POINTERS).value


def result_access(matrices: tuple[torch.Tensor | None, ...], configuration: Configuration) -> int:
    """The way in which a kernel writes all these contiguous results (rows, columns)."""
    aligned = all(matrix is None or _is_copied_by_descriptor(matrix) for matrix in matrices)
    return (DESCRIPTOR if configuration.descriptor_stores and aligned else POINTERS).value


def _is_copied_by_descriptor(matrix: torch.Tensor) -> bool:
    stride, unit = matrix.stride()
    aligned = stride * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    return unit == 1 and stride >= matrix.shape[1] > 0 and aligned
