"""The execution finds the fault planted in each kernel here, and finds none in the same kernel without it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from executed.conftest import EXECUTED

pytestmark = pytest.mark.skipif(not EXECUTED, reason="a GPU hides these faults; run under ttsem.sanitize")
DEVICE = "cuda"


@triton.jit
def _scale_kernel(x_pointer, y_pointer, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_pointer + at, mask=at < size)
    if MASKED:
        tl.store(y_pointer + at, x * 2.0, mask=at < size)
    else:
        tl.store(y_pointer + at, x * 2.0)


@triton.jit
def _sum_kernel(x_pointer, total_pointer, size, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x_pointer + at, mask=at < size, other=0.0))
    if ATOMIC:
        tl.atomic_add(total_pointer, part)
    else:
        tl.store(total_pointer, tl.load(total_pointer) + part)


@triton.jit
def _resample_kernel(x_pointer, y_pointer, size, new_size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Resample to the nearest neighbour: y[i] = x[i * size // new_size]. The product can need more than 32 bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = at.to(tl.int64) if WIDE else at
    source = position * size // new_size
    tl.store(y_pointer + at, tl.load(x_pointer + source, mask=at < new_size), mask=at < new_size)


def scale(masked: bool) -> None:
    x = torch.randn(1000, device=DEVICE)
    y = torch.empty_like(x)
    _scale_kernel[(triton.cdiv(1000, 128),)](x, y, 1000, MASKED=masked, BLOCK=128)
    assert torch.equal(y, x * 2)


def add_up(atomic: bool) -> None:
    x, total = torch.ones(1000, device=DEVICE), torch.zeros(1, device=DEVICE)
    _sum_kernel[(triton.cdiv(1000, 128),)](x, total, 1000, ATOMIC=atomic, BLOCK=128)
    assert total.item() == 1000


def resample(wide: bool) -> None:
    size, new_size = 1 << 20, 4096
    x, y = torch.arange(size, dtype=torch.float32, device=DEVICE), torch.empty(new_size, device=DEVICE)
    _resample_kernel[(new_size // 1024,)](x, y, size, new_size, WIDE=wide, BLOCK=1024)
    assert torch.equal(y, x[:: size // new_size])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (scale, r"writes 24 element\(s\) past the end of the tensor passed as `y_pointer`"),
        (add_up, r"program instances .* both touch element 0 of `total_pointer`"),
        (resample, r"reads \d+ element\(s\) before the start of the tensor"),
    ],
)
def test_a_fault_is_found(kernel, message: str) -> None:
    with pytest.raises(Exception, match=message):
        kernel(False)
    kernel(True)


def test_bfloat16_products_round_as_hardware_does() -> None:
    """Products of bfloat16 are in float32 and round to nearest, ties to even, unlike in the interpreter."""

    x = torch.randn(32, 32, device=DEVICE).bfloat16()
    y = torch.empty_like(x)
    _square_kernel[(1,)](x, y, SIZE=32)
    expected = (x.double() @ x.double()).bfloat16()
    # A float32 sum of 32 products is within 32 float32 roundings of the exact one: at most one bfloat16 apart.
    assert (y == expected).float().mean() > 0.99
    torch.testing.assert_close(y, expected, atol=0.0, rtol=2**-7)


@triton.jit
def _square_kernel(x_pointer, y_pointer, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_pointer + at)
    tl.store(y_pointer + at, tl.dot(x, x).to(tl.bfloat16))
