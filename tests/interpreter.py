"""Triton's interpreter without its costliest habit, and with whichever numpy is installed."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_what_is_not_patched(function: Any) -> interpreter._LangPatchScope:
    """The costly habit: to patch triton.language anew at each call of a device function."""
    modules = [module for module in function.__globals__.values() if inspect.ismodule(module)]
    if all(module.static_assert.__name__ == "_new_static_assert" for module in modules if module in (tl, tl.core)):
        return interpreter._LangPatchScope()
    return _patch_lang(function)


def _patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """A scalar is an array of one element here. Triton 3.6 makes it an index by int(), which numpy 2.5 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def install() -> None:
    """Use it in this process."""
    interpreter._patch_lang = _patch_what_is_not_patched
    interpreter._patch_lang_tensor = _patch_tensor
