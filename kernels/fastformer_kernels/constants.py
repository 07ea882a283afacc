"""Numbers that kernels share, and a way to give a kernel several constants as one argument."""

from __future__ import annotations

from typing import Any, TypeVar

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

Bundle = TypeVar("Bundle", bound=Any)


def constants(bundle: Bundle) -> Bundle:
    """`bundle`, a named tuple, as an argument of a kernel: each field is a constant when the kernel is compiled."""
    return bundle._make(tl.constexpr(value) for value in bundle)
