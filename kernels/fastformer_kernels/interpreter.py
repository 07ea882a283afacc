"""Triton's interpreter with whichever numpy is installed."""

from __future__ import annotations

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """A scalar is an array of one element here. Triton 3.6 makes it an index by int(), which numpy 2.5 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def install() -> None:
    """Use it in this process."""
    interpreter._patch_lang_tensor = _patch_tensor
