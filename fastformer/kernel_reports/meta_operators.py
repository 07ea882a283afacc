"""Fastformer's operators on tensors of device ``meta``: their kernels are launched, not their shape functions alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastformer.backends import backend

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@contextmanager
def kernels_of_meta_operators() -> Iterator[None]:
    """Within the block, an operator given tensors on ``meta`` launches its Triton kernels, forward and backward.

    Only a stand-in for a GPU can take such a launch. All else, PyTorch's own operators included, works on shapes as
    ever, so that a whole model runs without memory or arithmetic, and launches exactly the kernels it would on a GPU.

    >>> with stand_in("sm_90") as kernels, kernels_of_meta_operators():
    ...     fastformer.softmax(torch.empty(8, 1024, device="meta", requires_grad=True)).sum().backward()
    >>> [kernel.name for kernel in kernels]
    ['_softmax_forward_kernel', '_softmax_backward_kernel']
    """
    with backend("triton"), _Implementations():
        yield


class _Implementations(TorchDispatchMode):
    """Runs a Fastformer operator's implementation where PyTorch would choose the one for meta, which has no effect."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastformer":
            return func(*args, **(kwargs or {}))
        # The implementation serves every device; only meta has one of its own. It may call further operators.
        with self:
            return func.redispatch(_CPU, *args, **(kwargs or {}))
