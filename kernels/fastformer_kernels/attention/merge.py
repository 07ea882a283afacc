"""Merge attention over disjoint parts of the keys: O = sum_i exp(lse_i - lse) O_i, lse = log sum_i exp(lse_i).

Each O_i is normalised with its own log-sum-exp lse_i (Flash-Decoding's second step; Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867). Parts are added in their order, so that the result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.constants import LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of
from fastformer_kernels.precision import round_to

# Bytes that a thread loads of each part: one load of the greatest width.
THREAD_BYTES = 16
NUM_WARPS = 4
# Parts that are loaded ahead, plus one. NVIDIA's GPUs copy them to shared memory, AMD's load them to registers.
STAGES = 8
AMD_STAGES = 3


@triton.jit
def _merge_kernel(
    outputs_pointer,
    lses_pointer,
    output_pointer,
    lse_pointer,
    parts,
    rows,
    outputs_stride_part,
    outputs_stride_row,
    outputs_stride_dim,
    lses_stride_part,
    lses_stride_row,
    head_dim: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute O = sum_i exp(lse_i - lse) O_i and lse = log sum_i exp(lse_i) for BLOCK_ROWS rows.

    A row without keys becomes zero.

    Args:
        outputs_pointer, lses_pointer: (parts, rows, head_dim) and (parts, rows) float32, O_i and lse_i.
        output_pointer, lse_pointer: (rows, head_dim) and (rows,) float32, contiguous, written.
        STAGES: number of parts that are loaded ahead, plus one.
        BLOCK_ROWS, BLOCK_D: the size of a tile; BLOCK_D is at least head_dim.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    row_valid = row < rows
    tile_valid = row_valid[:, None] & (dim < head_dim)[None, :]
    lses_row = lses_pointer + row * lses_stride_row
    outputs_tile = outputs_pointer + row[:, None] * outputs_stride_row + dim[None, :] * outputs_stride_dim
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for index in tl.range(0, parts, num_stages=STAGES):
        part = tl.cast(index, tl.int64)
        part_lse = tl.load(lses_row + part * lses_stride_part, mask=row_valid, other=float("-inf"))
        # The output of a part without keys is not defined.
        present = (part_lse != float("-inf"))[:, None] & tile_valid
        part_output = tl.load(outputs_tile + part * outputs_stride_part, mask=present, other=0.0).to(tl.float32)
        new_maximum = tl.maximum(maximum, part_lse)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weight = tl.exp2((part_lse - shift) * LOG2_E)
        rescale = tl.exp2((maximum - shift) * LOG2_E)
        total = total * rescale + weight
        accumulator = accumulator * rescale[:, None] + weight[:, None] * part_output
        maximum = new_maximum
    empty = total == 0.0
    output = round_to(accumulator / tl.where(empty, 1.0, total)[:, None], output_pointer.dtype.element_ty)
    lse = tl.where(empty, float("-inf"), maximum + tl.log(tl.where(empty, 1.0, total)))
    tl.store(output_pointer + row[:, None] * head_dim + dim[None, :], output, mask=tile_valid)
    tl.store(lse_pointer + row, lse, mask=row_valid)


def merge_launch(outputs: torch.Tensor, lses: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> Launch:
    """The launch that merges `outputs` (parts, rows, head_dim) and `lses` (parts, rows), any strides.

    Args:
        output: written; any floating dtype and shape, in memory as (rows, head_dim).
        lse: written; float32, in memory as (rows,).
    """
    parts, rows, head_dim = outputs.shape
    block_d = triton.next_power_of_2(head_dim)
    warp_size = architecture_of(outputs).warp_size
    tile_elements = NUM_WARPS * warp_size * THREAD_BYTES // outputs.element_size()
    block_rows = min(max(1, tile_elements // block_d), triton.next_power_of_2(rows))
    return Launch(
        _merge_kernel,
        (triton.cdiv(rows, block_rows),),
        {
            "outputs_pointer": outputs,
            "lses_pointer": lses,
            "output_pointer": output,
            "lse_pointer": lse,
            "parts": parts,
            "rows": rows,
            "outputs_stride_part": outputs.stride(0),
            "outputs_stride_row": outputs.stride(1),
            "outputs_stride_dim": outputs.stride(2),
            "lses_stride_part": lses.stride(0),
            "lses_stride_row": lses.stride(1),
            "head_dim": head_dim,
            "STAGES": STAGES if warp_size == 32 else AMD_STAGES,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
            "num_warps": NUM_WARPS,
            **COMPILER_OPTIONS,
        },
    )


@kept_launch
def merge(outputs: torch.Tensor, lses: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> Launch | None:
    """Merge parts, with the arguments of `merge_launch`."""
    return merge_launch(outputs, lses, output, lse) if lse.numel() else None
