"""The choice of an operator's implementation: the Triton kernels or PyTorch.

``auto`` (default) runs the kernels for tensors on a GPU and PyTorch elsewhere. ``triton`` forces the kernels; with
``TRITON_INTERPRET=1`` in the environment they also run on CPU tensors. ``torch`` forces PyTorch. With ``auto``,
torch.compile sees what it can fuse as plain PyTorch; with the other two, it sees every operator. The default is read
from ``FASTFORMER_BACKEND`` once, at import. A ``with fastformer.backend(...)`` block holds for its own thread or task,
and for the gradients that autograd's threads compute for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_default = _checked(os.environ.get("FASTFORMER_BACKEND", "auto"), "FASTFORMER_BACKEND")
_chosen: ContextVar[str | None] = ContextVar("fastformer.backend", default=None)
# The backend after the last `with` block was entered or left; None if no block is open. torch.compile reads this
# global, because it can guard on globals but not on context variables. Without any block, nothing else is looked up.
_latest: str | None = None
_open = 0
_lock = threading.Lock()
# PyTorch copies the object stored under this key to the autograd threads that work for a thread.
_FOR_AUTOGRAD = "fastformer.backend"
Choice = tuple[str | None, int]
"""A backend, and the thread that chose it."""


def selected_backend() -> str:
    """The selected backend: ``auto``, ``triton`` or ``torch``."""
    if _latest is None:
        return _default
    if torch.compiler.is_compiling():
        return _latest
    return _chosen.get() or _of_autograd() or _default


def _of_autograd() -> str | None:
    """The backend chosen by the thread for which this autograd thread computes gradients; None in other threads."""
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls(_FOR_AUTOGRAD):
        return None
    name, thread = torch._C._get_obj_in_tls(_FOR_AUTOGRAD)
    return None if thread == threading.get_ident() else name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Select the backend of every Fastformer operator within a ``with`` block.

    The choice is a context variable: other threads and tasks keep theirs, and new threads start with the default.

    Args:
        name: ``auto``, ``triton`` or ``torch``.

    Raises:
        ValueError: ``name`` is another.

    >>> with fastformer.backend("torch"):
    ...     y = fastformer.softmax(x)
    """
    previous = _chosen.get()
    _select(_checked(name, "backend"), opened=1)
    try:
        yield
    finally:
        _select(previous, opened=-1)


def _select(name: str | None, opened: int) -> None:
    global _latest, _open
    _chosen.set(name)
    _hand_to_autograd(_choice(name, threading.get_ident()))
    with _lock:
        _open += opened
        _latest = (name or _default) if _open else None


@cache
def _choice(name: str | None, thread: int) -> Choice:
    return name, thread


def _hand_to_autograd(choice: Choice) -> None:
    # torch 2.11 releases a reference that it has not taken. The extra one only keeps alive what is cached anyway.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(choice))
    torch._C._stash_obj_in_tls(_FOR_AUTOGRAD, choice)


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an operator whose first argument is `tensor` runs its Triton kernel."""
    selected = selected_backend()
    if selected == "auto":
        return tensor.is_cuda and HAS_TRITON
    if selected == "torch":
        return False
    if not HAS_TRITON:
        raise RuntimeError("backend 'triton' was selected, but triton is not installed; pip install triton")
    # Meta tensors come here only while kernels are compiled ahead of time for a GPU that is not in this machine.
    if not tensor.is_cuda and not tensor.is_meta and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' was selected for a tensor on {tensor.device}: Triton kernels run on a GPU, or on "
            "a CPU in Triton's interpreter when TRITON_INTERPRET=1 is set before Python starts"
        )
    return True
