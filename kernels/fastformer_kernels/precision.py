"""The two operations whose precision decides a kernel's accuracy: the matrix product and rounding to a storage dtype.

On a GPU both are Triton's own. Triton's interpreter keeps a bfloat16 as its bit pattern in a uint16. Its `tl.dot`
multiplies bit patterns as integers, and its conversion from float32 drops the low bits instead of rounding to nearest.
Only in the interpreter, the helpers compute the same values another way. A float32 holds every product of two bfloat16
exactly, so the product of widened operands equals what a GPU's tensor core computes. The rounding is done on the bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator, INPUT_PRECISION: tl.constexpr):
    """Compute accumulator + a @ b, accumulated in `accumulator`'s dtype (float32)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 `x` to `dtype`: to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, nearest_even, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


def input_precision(dtype: torch.dtype) -> str:
    """The precision of `tl.dot` for `dtype`: "tf32" where PyTorch's own switch allows it, else exact ("ieee")."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
