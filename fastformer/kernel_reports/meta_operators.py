"""Make Fastformer's operators launch their kernels for tensors on ``meta``, instead of running shape functions only."""

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
    """Let operators with tensors on ``meta`` launch their Triton kernels within the block, forward and backward.

    Only a stand-in for a GPU can accept such a launch. Everything else, PyTorch's own operators included, computes only
    shapes as usual. So a whole model runs without memory or arithmetic, and launches the same kernels as on a GPU.

    >>> with stand_in("sm_90") as kernels, kernels_of_meta_operators():
    ...     fastformer.softmax(torch.empty(8, 1024, device="meta", requires_grad=True)).sum().backward()
    >>> [kernel.name for kernel in kernels]
    ['_softmax_forward_kernel', '_softmax_backward_kernel']
    """
    with backend("triton"), _Implementations():
        yield


class _Implementations(TorchDispatchMode):
    """Runs the real implementation of Fastformer's operators, where PyTorch would choose the one for meta."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastformer":
            return func(*args, **(kwargs or {}))
        # One implementation serves every device except meta. It may call further operators.
        with self:
            return func.redispatch(_CPU, *args, **(kwargs or {}))
