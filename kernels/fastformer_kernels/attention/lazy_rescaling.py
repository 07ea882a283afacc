"""An online softmax that seldom rescales its sums: FlashAttention-4's, and a skip of the multiplications for each warp.

Weights are exp2(score - maximum). The sums so far are multiplied when the maximum grows. Any number that is near the
greatest score serves as the maximum: it cancels in the output, and the log-sum-exp adds it again. So it may stay where
the greatest score is above it by at most `MARGIN`, and the sums' factor is then exactly 1. After the first tiles that
is almost always so (Zadouri et al. 2026, "FlashAttention-4: Algorithm and Kernel Pipelining Co-Design for Asymmetric
Hardware Scaling").
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from fastformer_kernels.precision import INTERPRETED

# In units of log2. Weights are at most 2^8 then, where float16 ends at 65504. The sums of weights times values, in
# float32, have as much less room: values above 1e33 could overflow.
MARGIN = tl.constexpr(8.0)


@triton.jit
def lazy_maximum(greatest, maximum):
    """The maximum to subtract after a tile: `maximum` as long as `greatest`, of all scores so far, is near it."""
    return tl.where(greatest > maximum + MARGIN, greatest, maximum)


@triton.jit
def lazily_rescaled(accumulator, factor, COLUMNS: tl.constexpr):
    """Compute accumulator * factor; on a GPU of NVIDIA's, a warp skips this if all its factors are 1.

    Args:
        accumulator: (rows, COLUMNS) float32.
        factor: (rows, 1) float32.
    """
    if INTERPRETED or not is_cuda():
        return accumulator * factor
    # Of 16 rows, which a warp has of a product, each of its 32 threads holds so many elements: one decision for all.
    EACH: tl.constexpr = COLUMNS // 2
    return tl.inline_asm_elementwise(
        _multiply_unless_one(EACH), _operands(EACH), [accumulator, factor], tl.float32, is_pure=True, pack=EACH
    )


@triton.constexpr_function
def _multiply_unless_one(count: int) -> str:
    """PTX that multiplies `count` elements in place, unless all factors in the warp are 1.

    Operands are the results, the elements (in the same registers) and the factors. Factors differ from 1 if some bit
    does. The bits are joined in pairs, pairs of pairs and so on: neighbours are factors of the same row, so the
    assembler removes nearly all of it.
    """
    lines = []
    for i in range(count):
        lines += [f"mov.b32 bits{i}, ${2 * count + i};", f"xor.b32 bits{i}, bits{i}, 0x3F800000;"]
    distance = 1
    while distance < count:
        lines += [f"or.b32 bits{i}, bits{i}, bits{i + distance};" for i in range(0, count - distance, 2 * distance)]
        distance *= 2
    lines += ["setp.ne.b32 changed, bits0, 0;", "vote.sync.any.pred changed, changed, 0xffffffff;"]
    lines += ["@!changed bra.uni unchanged;"]
    lines += [f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)]
    return f"{{ .reg .pred changed; .reg .b32 bits<{count}>; {' '.join(lines)} unchanged: }}"


@triton.constexpr_function
def _operands(count: int) -> str:
    """The constraints of the operands of `_multiply_unless_one`."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)
