"""Triton's interpreter with whichever numpy is installed, and with bundles of constants."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_implicit_cvt = interpreter._implicit_cvt


def _patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """A scalar is an array of one element here. Triton 3.6 makes it an index by int(), which numpy 2.5 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert(argument: Any) -> Any:
    """An argument as a kernel sees it: a constant within a tuple as its value, as a constant by itself is."""
    return argument.value if isinstance(argument, tl.constexpr) else _implicit_cvt(argument)


def install() -> None:
    """Use it in this process."""
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._implicit_cvt = _convert
