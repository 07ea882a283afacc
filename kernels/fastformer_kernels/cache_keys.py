"""Names of kernels in Triton's cache that do not depend on what a process launched before.

A name is computed from a kernel, the functions it calls and the module constants that these read. Triton 3.6 uses a
function's constants before it has searched for them, unless another kernel that calls the function was compiled before.
A cache that was filled in another order then lacks the kernel. Later versions search first, and so does this module.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import DependenciesFinder

_update_hash = DependenciesFinder._update_hash


def _find_constants_first(finder: DependenciesFinder, function: Any) -> None:
    _ = function.cache_key
    _update_hash(finder, function)


def make_independent_of_order() -> None:
    """Compute the names of all kernels of this process in this way."""
    DependenciesFinder._update_hash = _find_constants_first
