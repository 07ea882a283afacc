"""Cross-entropy of rows of logits, and its gradient, which may overwrite the logits.

With classes c, target t, class weights w, label smoothing s (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567),
z-loss a (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section 5) and, for a softcap k (Gemma Team, 2024,
https://arxiv.org/abs/2408.00118, section 2), z = k tanh(logit / k):

    lse = log sum_c exp(z_c)
    loss = (1 - s) w_t (lse - z_t) + s / C sum_c w_c (lse - z_c) + a w_t lse^2
    d loss / d z_c = exp(z_c - lse) ((1 - s) w_t + s / C sum_c w_c + 2 a w_t lse) - [c = t] (1 - s) w_t - s / C w_c

and d z / d logit = 1 - (z / k)^2. lse is kept as two numbers, the maximum m of z and the sum of exp(z_c - m). A
probability is computed as exp(z_c - m) / sum. If lse were rounded to one number, the probability would have a relative
error of |lse| units in the last place.

A row is read once for these two numbers, online (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867), and
once for the gradient. A tile holds several rows where they are short. Whole tiles are loaded without a test of the
column, so that aligned rows are read in 128 bits. Rows that begin anywhere are too: their tiles begin at the first
multiple of 8 elements in memory, and the up to 7 elements before and after the tiles are a small tile of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.tiles import tanh
from fastformer_kernels.configurations import chosen
from fastformer_kernels.constants import LN_2, LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import (
    ALIGNED_ELEMENTS,
    RowConfiguration,
    RowTensor,
    addressable,
    alignment,
    cut_rows,
    edge_columns,
    row_class,
    row_layout,
    row_offset,
)

_CONFIGURATION = RowConfiguration(tile_elements=4096, thread_elements=8, most_threads=256)
# With smoothing or a softcap, each element needs more registers: a whole tile spills on sm_90 and later.
_LIVE_CONFIGURATION = RowConfiguration(tile_elements=2048, thread_elements=8, most_threads=256)
# The fewest classes whose rows are cut.
LEAST_CUT_CLASSES = 1024
# Columns of a tile where neighbouring rows, not neighbouring classes, are next to each other in memory.
TRANSPOSED_COLUMNS = 64


class CrossEntropyOptions(NamedTuple):
    """The options of the loss of a row.

    Attributes:
        ignore_index: a row with this target has loss and gradient zero.
        label_smoothing: the part s of the loss that is spread over all classes.
        z_loss: the factor a of lse^2.
        softcap: the bound k of the capped logits. 0 means no cap; a kernel takes None instead of 0.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = 0.0


class _RowTerms(NamedTuple):
    """The terms of the gradient of a row's logits, (rows, 1) each.

    Attributes:
        target: the target class.
        counts: whether the row is not ignored.
        maximum, log_sum: the two parts of lse: the maximum of z, and the logarithm of the sum of exp(z - maximum).
        of_exponential, of_target, of_class: the factors of exp(z - maximum), [c = t] and w_c.
    """

    target: Any
    counts: Any
    maximum: Any
    log_sum: Any
    of_exponential: Any
    of_target: Any
    of_class: Any


@triton.jit
def _load_logits(logits_row, column, stride, valid, softcap):
    """Logits of a tile in float32, capped; -inf where not valid."""
    z = tl.load(logits_row + column * stride, mask=valid, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        z = tl.where(valid, softcap * tanh(z / softcap), float("-inf"))
    return z


@triton.jit
def _accumulate(z, maximum, total):
    """Update each lane's maximum and sum of exp(z - maximum) with one more logit."""
    new_maximum = tl.maximum(maximum, z)
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    return new_maximum, total * tl.exp2((maximum - shift) * LOG2_E) + tl.exp2((z - shift) * LOG2_E)


@triton.jit
def _load_class_weight(class_weight_pointer, column, valid):
    """Weights of the classes `column`; 0 where not valid. Without class weights they are 1."""
    if class_weight_pointer is None:
        return tl.where(valid, 1.0, 0.0)
    else:
        return tl.load(class_weight_pointer + column, mask=valid, other=0.0)


@triton.jit
def _finish_tile(
    logits_row,
    gradient_row,
    logits_stride,
    gradient_stride,
    class_weight_pointer,
    column,
    first,
    valid,
    terms,
    smooth_sum,
    softcap,
    SMOOTHS: tl.constexpr,
):
    """Store the gradient of a tile, and add its w_c (lse - z_c) to the lanes' sums, which are returned.

    `column` counts from the class `first` of each row, to which `logits_row` and `gradient_row` point.
    """
    z = _load_logits(logits_row, column, logits_stride, valid, softcap)
    if SMOOTHS:
        class_weight = _load_class_weight(class_weight_pointer, first + column, valid)
        smooth_sum += tl.where(valid, class_weight * (terms.maximum - z + terms.log_sum), 0.0)
    if gradient_row is not None:
        at_target = tl.where(first + column == terms.target, terms.of_target, 0.0)
        gradient = tl.exp2((z - terms.maximum) * LOG2_E) * terms.of_exponential - at_target
        if SMOOTHS:
            gradient -= class_weight * terms.of_class
        if softcap is not None:
            capped = z / softcap
            gradient *= 1.0 - capped * capped
        gradient = round_to(tl.where(terms.counts, gradient, 0.0), gradient_row.dtype.element_ty)
        tl.store(gradient_row + column * gradient_stride, gradient, mask=valid)
    return smooth_sum


@triton.jit
def _cross_entropy_kernel(
    logits,
    gradient,
    target_pointer,
    class_weight_pointer,
    class_weight_sum_pointer,
    grad_loss_pointer,
    grad_loss_stride,
    loss_pointer,
    normalizer_pointer,
    rows,
    size_1,
    size_2,
    classes,
    loss_options,
    SMOOTHS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute the loss and the gradient of BLOCK_ROWS rows, each if it has a pointer.

    With a loss, the normalizer is written too; without one it is read. The formulas are at the head of this file.

    Args:
        logits, gradient: a `RowTensor` each. The pointer of gradient may be None; its memory may be that of logits.
        target_pointer, loss_pointer: (rows,), int64 and float32.
        class_weight_pointer, class_weight_sum_pointer: w, (classes,) float32, and its sum, which smoothing needs.
        grad_loss_pointer, grad_loss_stride: (rows,) float32, the gradient of each row's loss.
        normalizer_pointer: (2, rows) float32, the maximum m of z and the sum of exp(z - m).
        rows, size_1, size_2, classes: from the logits' `RowLayout`.
        loss_options: a `CrossEntropyOptions`, whose softcap is None for no cap.
        SMOOTHS: whether there is label smoothing.
        CUT: whether tiles begin at the first multiple of ALIGNED_ELEMENTS in each row. Then logits and gradient have
            the same strides.
    """
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    row_valid = row < rows
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    if CUT:
        # `first` elements, then tiles with all elements up to `end`, counted from the first tile, then the rest.
        first, start_of_tiles, end = cut_rows(row_offset(row, size_1, size_2, logits, 1), classes)
        whole = (classes - ALIGNED_ELEMENTS) // BLOCK_COLUMNS * BLOCK_COLUMNS
        edge, edge_valid = edge_columns(first, end, classes)
        edge_valid &= row_valid
    else:
        first = tl.zeros((BLOCK_ROWS, 1), tl.int64)
        start_of_tiles = row_offset(row, size_1, size_2, logits, ALIGNMENT)
        end = first + classes
        whole = classes // BLOCK_COLUMNS * BLOCK_COLUMNS
    logits_row = logits.pointer + start_of_tiles
    tail = whole + column
    tail_valid = row_valid & (tail < end)
    if loss_pointer is not None:
        lane_maximum = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
        lane_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, whole, BLOCK_COLUMNS):
            z = _load_logits(logits_row, start + column, logits.stride_column, row_valid, loss_options.softcap)
            lane_maximum, lane_sum = _accumulate(z, lane_maximum, lane_sum)
        if CUT or whole < classes:
            z = _load_logits(logits_row, tail, logits.stride_column, tail_valid, loss_options.softcap)
            lane_maximum, lane_sum = _accumulate(z, lane_maximum, lane_sum)
        maximum = tl.max(lane_maximum, axis=1)[:, None]
        if CUT:
            z = _load_logits(logits_row, edge, logits.stride_column, edge_valid, loss_options.softcap)
            maximum = tl.maximum(maximum, tl.max(z, axis=1)[:, None])
        exponential_sum = tl.sum(lane_sum * tl.exp2((lane_maximum - maximum) * LOG2_E), axis=1)[:, None]
        if CUT:
            exponential_sum += tl.sum(tl.exp2((z - maximum) * LOG2_E), axis=1)[:, None]
        tl.store(normalizer_pointer + row, maximum, mask=row_valid)
        tl.store(normalizer_pointer + rows + row, exponential_sum, mask=row_valid)
    else:
        maximum = tl.load(normalizer_pointer + row, mask=row_valid, other=0.0)
        exponential_sum = tl.load(normalizer_pointer + rows + row, mask=row_valid, other=1.0)
    log_sum = tl.log2(exponential_sum) * LN_2
    lse = maximum + log_sum

    target = tl.load(target_pointer + row, mask=row_valid, other=loss_options.ignore_index)
    counts = target != loss_options.ignore_index
    known = counts & (target >= 0) & (target < classes)
    target_weight = _load_class_weight(class_weight_pointer, target, known)
    of_target = target_weight * (1.0 - loss_options.label_smoothing)
    of_class = loss_options.label_smoothing / classes
    if class_weight_sum_pointer is not None:
        smooth_weight = of_class * tl.load(class_weight_sum_pointer)
    else:
        smooth_weight = loss_options.label_smoothing
    of_probability = of_target + smooth_weight + 2.0 * loss_options.z_loss * target_weight * lse
    loss = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    if loss_pointer is not None:
        at_target = _load_logits(logits_row, target - first, logits.stride_column, known, loss_options.softcap)
        loss = of_target * (maximum - at_target + log_sum) + loss_options.z_loss * target_weight * lse * lse

    if SMOOTHS or gradient.pointer is not None:
        gradient_row = gradient.pointer
        if gradient.pointer is not None:
            if CUT:
                gradient_row = gradient.pointer + start_of_tiles
            else:
                gradient_row = gradient.pointer + row_offset(row, size_1, size_2, gradient, ALIGNMENT)
            grad_loss = tl.load(grad_loss_pointer + row * grad_loss_stride, mask=row_valid, other=0.0)
            # A target that is not a class makes its row's gradient NaN.
            grad_loss = tl.where(known, grad_loss, float("nan"))
            of_exponential = of_probability * grad_loss / exponential_sum
            of_target *= grad_loss
            gradient_of_class = of_class * grad_loss
        else:
            of_exponential = of_probability
            gradient_of_class = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        terms = _RowTerms(target, counts, maximum, log_sum, of_exponential, of_target, gradient_of_class)
        smooth_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, whole, BLOCK_COLUMNS):
            smooth_sum = _finish_tile(
                logits_row, gradient_row, logits.stride_column, gradient.stride_column, class_weight_pointer,
                start + column, first, row_valid, terms, smooth_sum, loss_options.softcap, SMOOTHS,
            )  # fmt: skip
        if CUT or whole < classes:
            smooth_sum = _finish_tile(
                logits_row, gradient_row, logits.stride_column, gradient.stride_column, class_weight_pointer,
                tail, first, tail_valid, terms, smooth_sum, loss_options.softcap, SMOOTHS,
            )  # fmt: skip
        if SMOOTHS:
            loss += of_class * tl.sum(smooth_sum, axis=1)[:, None]
        if CUT:
            edge_sum = _finish_tile(
                logits_row, gradient_row, logits.stride_column, gradient.stride_column, class_weight_pointer,
                edge, first, edge_valid, terms, tl.zeros((BLOCK_ROWS, 2 * ALIGNED_ELEMENTS), tl.float32),
                loss_options.softcap, SMOOTHS,
            )  # fmt: skip
            if SMOOTHS:
                loss += of_class * tl.sum(edge_sum, axis=1)[:, None]
    if loss_pointer is not None:
        loss = tl.where(known, loss, float("nan"))
        tl.store(loss_pointer + row, tl.where(counts, loss, 0.0), mask=row_valid)


def cross_entropy_forward(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, options: CrossEntropyOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (rows,) and normalizer (2, rows), float32. The normalizer is the maximum m and the sum of exp(z - m).

    Args:
        logits: (N, classes, ...), any strides.
        target: int64, contiguous, one for each row of `logits` in the order of its other dimensions. A target that is
            not a class gives NaN.
        class_weight: (classes,) float32 contiguous.
    """
    loss = torch.empty(target.numel(), dtype=torch.float32, device=logits.device)
    normalizer = loss.new_empty(2, target.numel())
    _launch(logits, None, target, class_weight, None, loss, normalizer, options)
    return loss, normalizer


def cross_entropy_backward(
    logits: torch.Tensor,
    gradient: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    grad_loss: torch.Tensor,
    normalizer: torch.Tensor,
    options: CrossEntropyOptions,
) -> None:
    """Write the gradient of `logits` to `gradient`, which may be `logits`.

    Args:
        grad_loss: (rows,) float32, the gradient of each row's loss; with a stride of 0 all rows have the same.
        normalizer: the one that `cross_entropy_forward` returned.
    """
    _launch(logits, gradient, target, class_weight, grad_loss, None, normalizer, options)


def cross_entropy_in_place(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    grad_loss: torch.Tensor,
    options: CrossEntropyOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of `cross_entropy_forward`, and overwrite `logits` with their gradient in the same launch."""
    loss = torch.empty(target.numel(), dtype=torch.float32, device=logits.device)
    normalizer = loss.new_empty(2, target.numel())
    _launch(logits, logits, target, class_weight, grad_loss, loss, normalizer, options)
    return loss, normalizer


def _launch(
    logits: torch.Tensor,
    gradient: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    grad_loss: torch.Tensor | None,
    loss: torch.Tensor | None,
    normalizer: torch.Tensor,
    options: CrossEntropyOptions,
) -> None:
    """Launch the kernel on tensors that it can address: copies of `logits` and `gradient` where that is needed."""
    logits_rows, gradient_rows = addressable(1, logits, gradient)
    # Smoothing spreads a target over the classes in proportion to their weights.
    weight_sum = class_weight.sum() if class_weight is not None and options.label_smoothing > 0.0 else None
    _launch_rows(logits_rows, gradient_rows, target, class_weight, weight_sum, grad_loss, loss, normalizer, options)
    if gradient is not None and gradient_rows is not gradient:
        gradient.copy_(gradient_rows)


@kept_launch
def _launch_rows(
    logits: torch.Tensor,
    gradient: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    grad_loss: torch.Tensor | None,
    loss: torch.Tensor | None,
    normalizer: torch.Tensor,
    options: CrossEntropyOptions,
) -> Launch:
    """Describe the launch. It computes the loss where that is a tensor, and the gradient where that is one."""
    layout = row_layout(1, [logits, logits if gradient is None else gradient])
    *row_strides, class_stride = layout.strides[0]
    transposed = class_stride != 1 and row_strides[-1] == 1
    smooths = options.label_smoothing > 0.0
    live = smooths or options.softcap != 0.0
    operation = "cross_entropy_forward" if gradient is None else "cross_entropy_backward"

    def shape() -> tuple[str, ...]:
        rows = row_class(layout.columns, logits.element_size())
        return (
            *rows,
            "across" if transposed else "along",
            "live" if live else "plain",
            "given" if loss is None else "found",
        )

    row_alignment = alignment(*(stride for strides in layout.strides for stride in strides[:-1]))
    cut = (
        class_stride == 1
        and layout.strides[0] == layout.strides[1]
        and layout.columns >= LEAST_CUT_CLASSES
        and row_alignment < ALIGNED_ELEMENTS.value
    )
    configuration = chosen(operation, logits, _LIVE_CONFIGURATION if live else _CONFIGURATION, shape)
    elements = configuration.tile_elements
    block_columns = min(triton.next_power_of_2(layout.columns), TRANSPOSED_COLUMNS if transposed else elements)
    block_rows = min(elements // block_columns, triton.next_power_of_2(layout.rows))
    return Launch(
        _cross_entropy_kernel,
        (triton.cdiv(layout.rows, block_rows),),
        {
            "logits": RowTensor(logits, *layout.strides[0]),
            "gradient": RowTensor(gradient, *layout.strides[1]),
            "target_pointer": target,
            "class_weight_pointer": class_weight,
            "class_weight_sum_pointer": weight_sum,
            "grad_loss_pointer": grad_loss,
            "grad_loss_stride": 1 if grad_loss is None else grad_loss.stride(0),
            "loss_pointer": loss,
            "normalizer_pointer": normalizer,
            "rows": layout.rows,
            "size_1": layout.sizes[1],
            "size_2": layout.sizes[2],
            "classes": layout.columns,
            "loss_options": options._replace(softcap=options.softcap or None),
            "SMOOTHS": smooths,
            "ALIGNMENT": row_alignment,
            "CUT": cut,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
            "num_warps": configuration.warps(block_rows * block_columns, logits),
            **COMPILER_OPTIONS,
        },
    )
