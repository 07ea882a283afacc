"""Which implementation an operator runs: the Triton kernels or PyTorch.

``auto`` (default) runs the kernels for tensors on a GPU and PyTorch elsewhere; ``triton`` forces the kernels (with
``TRITON_INTERPRET=1`` in the environment they also run on CPU tensors); ``torch`` forces PyTorch. The default is read
from ``FASTFORMER_BACKEND`` once, at import.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


# Process-wide, not thread-local: autograd runs a GPU's backward on a thread of its own.
_selected = _checked(os.environ.get("FASTFORMER_BACKEND", "auto"), "FASTFORMER_BACKEND")


def selected_backend() -> str:
    """The selected backend: ``auto``, ``triton`` or ``torch``."""
    return _selected


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Select the backend of every Fastformer operator within a ``with`` block.

    Args:
        name: ``auto``, ``triton`` or ``torch``.

    Raises:
        ValueError: ``name`` is none of these.

    >>> with fastformer.backend("torch"):
    ...     y = fastformer.softmax(x)
    """
    global _selected
    previous, _selected = _selected, _checked(name, "backend")
    try:
        yield
    finally:
        _selected = previous


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an operator whose first argument is `tensor` runs its Triton kernel."""
    if _selected == "auto":
        return tensor.is_cuda and HAS_TRITON
    if _selected == "torch":
        return False
    if not HAS_TRITON:
        raise RuntimeError("backend 'triton' was asked for, but triton is not installed; pip install triton")
    # A tensor on meta gets here only while its kernels are compiled for a GPU that is not there.
    if not tensor.is_cuda and not tensor.is_meta and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' was asked for with a tensor on {tensor.device}: Triton kernels run on a GPU, or on "
            "a CPU in Triton's interpreter when TRITON_INTERPRET=1 is set before Python starts"
        )
    return True
