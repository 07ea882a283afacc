"""The ceilings of a device, measured on it: the speed of a large matrix product and of a large copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from fastformer.gpu_timing import Timing, timed

MATRIX, COPY = "TFLOP/s", "GB/s"
"""The units of the two ceilings."""

_SECONDS = 0.15


@dataclass(frozen=True)
class Ceiling:
    """The most work per second that was measured.

    Attributes:
        value: the value in `unit`.
        unit: `MATRIX` or `COPY`.
        timing: the time of the run.
    """

    value: float
    unit: str
    timing: Timing


def matrix_ceiling(device: torch.device, dry: bool = False) -> Ceiling:
    """Measure TFLOP/s of a square bfloat16 product of random numbers: zeros would draw less power and run faster.

    Args:
        device: the device to measure.
        dry: whether the product is tiny.
    """
    return _matrix_ceiling(device, 64 if dry else 8192)


def copy_ceiling(device: torch.device, dry: bool = False) -> Ceiling:
    """Measure GB/s of a copy. Bytes read and bytes written both count.

    Args:
        device: the device to measure.
        dry: whether the copy is tiny.
    """
    return _copy_ceiling(device, 2**12 if dry else 2**30)


@lru_cache
def _matrix_ceiling(device: torch.device, size: int) -> Ceiling:
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(first)
    timing = timed([partial(torch.mm, first, second, out=product)], device, _SECONDS)
    return Ceiling(2.0 * size**3 / timing.median / 1e12, MATRIX, timing)


@lru_cache
def _copy_ceiling(device: torch.device, size: int) -> Ceiling:
    source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    timing = timed([partial(torch.empty_like(source).copy_, source)], device, _SECONDS)
    return Ceiling(2.0 * size / timing.median / 1e9, COPY, timing)
