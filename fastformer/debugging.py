"""Checks on a GPU, where an operator cannot look at lengths, ids and positions without waiting for them."""

from __future__ import annotations

import os

import torch

_enabled = os.environ.get("FASTFORMER_DEBUG", "0") not in ("", "0")


def debug(enabled: bool = True) -> None:
    """Check on a GPU, too, what operators are told by tensors: lengths, boundaries, pages, ids, positions and classes.

    On a CPU they always look, and raise an error. A GPU would have to be waited for; without this, its kernels touch
    nothing outside the tensors that they were given, and what is wrong becomes NaN or is left out. With it the GPU
    stops at the first wrong number with a message that names the argument, some operators later and without a
    synchronisation. ``FASTFORMER_DEBUG=1`` in the environment does the same from the start.

    >>> fastformer.debug()
    """
    global _enabled
    _enabled = enabled


def debugging() -> bool:
    """Whether `debug` is on."""
    return _enabled


def assert_on_device(holds: torch.Tensor, message: str) -> None:
    """Let the device stop with `message` unless all of `holds` is true, without waiting for it."""
    torch._assert_async(holds.all(), message)
