"""Optional checks on a GPU, where an operator cannot read lengths, ids and positions without waiting for the GPU."""

from __future__ import annotations

import os

import torch

_enabled = os.environ.get("FASTFORMER_DEBUG", "0") not in ("", "0")


def debug(enabled: bool = True) -> None:
    """Turn on checks of the numbers in tensors on a GPU: lengths, boundaries, pages, ids, positions and classes.

    On a CPU operators always check them and raise an error. On a GPU the check would have to wait for the GPU, so it is
    off by default: kernels never read or write outside their tensors, and a wrong number gives NaN or is ignored.
    With `debug` on, the GPU stops at the first wrong number with a message that names the argument. The error appears
    some operators later, because nothing waits for the GPU. ``FASTFORMER_DEBUG=1`` in the environment turns the checks
    on from the start.

    >>> fastformer.debug()
    """
    global _enabled
    _enabled = enabled


def debugging() -> bool:
    """Whether `debug` is on."""
    return _enabled


def assert_on_device(holds: torch.Tensor, message: str) -> None:
    """Stop the device with `message` unless all of `holds` is true. The host does not wait for the result."""
    torch._assert_async(holds.all(), message)
