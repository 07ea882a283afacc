"""CUDA graphs without CUDA: operations are recorded once, then replayed on the same memory without any Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("tolist", "item", "cpu", "numpy", "pin_memory", "__bool__", "__int__", "__float__", "__index__")
_UPLOADS = ("tensor", "as_tensor", "from_numpy", "asarray")


@contextmanager
def nothing_on_the_host() -> Iterator[None]:
    """Raise an error where meta tensors' values or CPU tensors are used, or where sizes depend on values."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a value goes from or to the host")

    patches = [patch.object(Tensor, name, refuse) for name in _READS] + [
        patch.object(torch, n, refuse) for n in _UPLOADS
    ]
    for each in patches:
        each.start()
    try:
        with _OnMetaAlone():
            yield
    finally:
        for each in patches:
            each.stop()


class _OnMetaAlone(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, result)):
            # A number that PyTorch wraps in a tensor becomes an argument of the kernel.
            assert tensor.is_meta or tensor.dim() == 0, f"{func} uses a tensor of the host's, {tuple(tensor.shape)}"
        return result


class Seen(TorchDispatchMode):
    """Runs the operators as a recording sees them: without a mode, a CPU may run PyTorch's own operators instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FakeRecorder:
    """A stand-in for `CudaRecorder`, for tensors on a CPU.

    As with CUDA, recording has no effect, and a replay runs only the operations, on the memory of the recording. What
    another graph has left in its own memory is gone. Reads on the host are not noticed here, because implementations
    for a CPU may read: `nothing_on_the_host` finds those.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.recordings: list[_Recording] = []

    def warm_up(self, step: Callable[[], Any]) -> Any:
        with Seen():
            return step()

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recording, random = _Recording(), torch.get_rng_state()
        self.recordings.append(recording)
        with recording:
            result = step()
        recording.undo()
        torch.set_rng_state(random)

        def replay() -> None:
            for other in self.recordings:
                other.scramble()
            recording.replay()

        return replay, result


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, dict[str, Any], Any]] = []
        self.own: dict[int, Tensor] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_place(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors((args, kwargs)):
            if _place(tensor) not in self.own and _place(tensor) not in self.before:
                storage = tensor.untyped_storage()
                self.before[_place(tensor)] = (storage, storage.clone())
        result = func(*args, **kwargs)
        self.own |= {_place(tensor): tensor for tensor in _tensors(result) if _place(tensor) not in given}
        self.operations.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for storage, values in self.before.values():
            storage.copy_(values)
        self.before.clear()

    def scramble(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for tensor in self.own.values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self.operations:
                given = {_place(tensor) for tensor in _tensors((args, kwargs))}
                for kept, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                    assert kept.shape == new.shape, f"{func} makes a tensor whose size depends on values"
                    if _place(kept) not in given:
                        kept.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
