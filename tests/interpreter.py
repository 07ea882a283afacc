"""A patch that makes Triton's interpreter much faster."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


def _patch_what_is_not_patched(function: Any) -> interpreter._LangPatchScope:
    """Patch triton.language only if it is not patched yet: the interpreter does it at each device function."""
    modules = [module for module in function.__globals__.values() if inspect.ismodule(module)]
    if all(module.static_assert.__name__ == "_new_static_assert" for module in modules if module in (tl, tl.core)):
        return interpreter._LangPatchScope()
    return _patch_lang(function)


def install() -> None:
    """Install the patch in this process."""
    interpreter._patch_lang = _patch_what_is_not_patched
