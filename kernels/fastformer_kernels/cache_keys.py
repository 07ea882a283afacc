"""Names of kernels in Triton's cache that do not depend on what a process launched before.

A name is made of a kernel, the functions it calls and the constants of modules that these read. Triton 3.6 looks at a
function's constants before it has found them, unless another kernel that calls it came first: a cache that was made
ahead of time, in another order, then lacks the kernel. Later versions find them first, and so does this.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import DependenciesFinder

_update_hash = DependenciesFinder._update_hash


def _find_constants_first(finder: DependenciesFinder, function: Any) -> None:
    _ = function.cache_key
    _update_hash(finder, function)


def make_independent_of_order() -> None:
    """For all kernels of this process."""
    DependenciesFinder._update_hash = _find_constants_first
