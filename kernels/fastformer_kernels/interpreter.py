"""Make Triton's interpreter work with the installed numpy, and with named tuples of constants."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_implicit_cvt = interpreter._implicit_cvt


def _patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """Let a scalar (an array of one element) be an index. Triton 3.6 calls int() on it, which numpy 2.5 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert(argument: Any) -> Any:
    """Convert an argument to what a kernel sees. A constant becomes its value, also within a tuple."""
    return argument.value if isinstance(argument, tl.constexpr) else _implicit_cvt(argument)


def install() -> None:
    """Replace the interpreter's own functions by these in this process."""
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._implicit_cvt = _convert
