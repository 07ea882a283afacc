"""Cross-entropy of rows of logits and, in the same pass over memory, its gradient in their place.

loss = log sum_j exp(z_j) - z_t and d loss / dz_j = softmax(z)_j - [j = t], times the weight of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.launch import device_guard
from fastformer_kernels.precision import round_to

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_BLOCK = 4096


@triton.jit
def _cross_entropy_kernel(
    logits_pointer,
    target_pointer,
    row_weight_pointer,
    loss_pointer,
    classes,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * classes
    target = tl.load(target_pointer + row)
    column = tl.arange(0, BLOCK)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        z = tl.load(logits_pointer + start + column, mask=start + column < classes, other=float("-inf"))
        z = z.to(tl.float32) * LOG2_E
        new_maximum = tl.maximum(maximum, z)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - shift) + tl.exp2(z - shift)
        maximum = new_maximum
    row_maximum = tl.max(maximum, axis=0)
    lse = row_maximum + tl.log2(tl.sum(total * tl.exp2(maximum - row_maximum), axis=0))

    counts = target != ignore_index
    known = counts & (target >= 0) & (target < classes)
    at_target = tl.load(logits_pointer + tl.where(known, target, 0)).to(tl.float32)
    loss = tl.where(known, lse * LN_2 - at_target, float("nan"))
    tl.store(loss_pointer + row, tl.where(counts, loss, 0.0))

    if row_weight_pointer is not None:
        weight = tl.where(known, tl.load(row_weight_pointer + row), tl.where(counts, float("nan"), 0.0))
        for start in range(0, classes, BLOCK):
            inside = start + column < classes
            z = tl.load(logits_pointer + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp2(z * LOG2_E - lse)
            gradient = (gradient - tl.where(start + column == target, 1.0, 0.0)) * weight
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits_pointer + start + column, round_to(gradient, logits_pointer.dtype.element_ty), mask=inside)


def cross_entropy_in_place(
    logits: torch.Tensor, target: torch.Tensor, row_weight: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Loss of each row, (rows,) float32; with `row_weight` the logits become their gradients, times those weights.

    Args:
        logits: (rows, classes) contiguous.
        target: (rows,) int64 contiguous. Rows of `ignore_index` have loss and gradient zero; a target that is no class
            gives NaN.
        row_weight: (rows,) float32 contiguous, or None to leave the logits as they are.
    """
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(classes), MAX_BLOCK)
    with device_guard(logits):
        _cross_entropy_kernel[(rows,)](
            logits,
            target,
            row_weight,
            loss,
            classes,
            ignore_index,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return loss
