"""Launches that are kept: what a kernel is launched with is worked out once for each kind of call.

Between two calls that differ in nothing but where their tensors lie, a launch differs in its pointers alone. Choosing a
configuration, computing strides and sizes, and Triton's own search for the compiled kernel, which handles each of some
sixty arguments, take ten times as long as the launch. So a launcher says what to launch, and is asked once:

>>> @kept_launch
... def _launch_copy(source: torch.Tensor, target: torch.Tensor) -> Launch:
...     size = source.numel()
...     return Launch(_copy_kernel, (triton.cdiv(size, 1024),), (source, target, size), {"BLOCK": 1024})
>>> _launch_copy(x, y)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from fastformer_kernels.launch import device_guard, provide_scratch_memory

# Kinds of calls that are kept at a time; a process with more begins anew.
_MOST_KINDS = 4096
# Triton compiles for pointers that are multiples of this many bytes, or are not.
_ALIGNMENT = 16

# Replaced by another dictionary, never emptied: what a thread is about to keep may not hold afterwards.
_kept: dict[tuple[Any, ...], _Kept | None] = {}


class Launch(NamedTuple):
    """What to launch.

    Attributes:
        kernel: the Triton function.
        grid: programs in each dimension.
        arguments: of the kernel, in its order; tensors among them, or within a tuple among them, are the launcher's.
        options: the kernel's constants and the compiler's options by name.
        descriptors: whether the kernel makes tensor descriptors.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    descriptors: bool = False


Launcher = Callable[..., Launch | None]


def kept_launch(launcher: Launcher) -> Callable[..., None]:
    """Launch what `launcher` says, and without asking it again for a call of the same kind.

    Two calls are of the same kind if their tensors have the same dtypes, shapes, strides and alignment to 16 bytes, lie
    on the same device, and their other arguments are equal. Nothing else about a tensor may decide what is launched.

    Args:
        launcher: takes a tensor, and after it tensors, None and hashable values by position; returns None where there
            is nothing to launch.
    """

    def launch(*arguments: Any) -> None:
        first: torch.Tensor = arguments[0]
        device = first.get_device()
        if device < 0 and not first.is_meta:
            # On a CPU, a tool that executes kernels is asked each time.
            _launch(launcher, arguments)
            return
        driver = triton.runtime.driver.active
        current = driver.get_current_device()
        kind: list[Any] = [launcher, current, device]
        pointers: list[int] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                pointer = argument.data_ptr()
                pointers.append(pointer)
                kind.append((argument.dtype, argument.shape, argument.stride(), pointer % _ALIGNMENT))
            else:
                kind.append(argument)
        key = tuple(kind)
        known = _kept.get(key, _UNKNOWN)
        if known is _UNKNOWN:
            _keep(launcher, arguments, key)
        elif known is not None and device in (current, -1):
            known(pointers, driver.get_current_stream(current))
        elif known is not None:
            with torch.cuda.device(device):
                known(pointers, driver.get_current_stream(device))

    return launch


def forget_launches() -> None:
    """Ask every launcher again from now on, since other configurations hold."""
    global _kept
    _kept = {}


class _Kept:
    """A compiled kernel with all that it is launched with but its pointers."""

    def __init__(self, compiled: Any, launch: Launch, given: tuple[Any, ...]) -> None:
        names = launch.kernel.arg_names
        by_name = {**launch.options, **dict(zip(names, launch.arguments, strict=False))}
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.compiled = compiled
        self.grid = (*launch.grid, 1, 1)[:3]
        self.descriptors = launch.descriptors
        self.arguments = [by_name[name] for name in names]
        try:
            # Where pointers go, and whose: among the arguments, and within the tuples among them.
            self.pointers = _places(self.arguments, numbers)
            self.groups = [
                (place, list(group), _places(group, numbers))
                for place, group in enumerate(self.arguments)
                if isinstance(group, tuple)
            ]
        except KeyError:
            raise ValueError(f"{launch.kernel}: a tensor among its arguments was not given to its launcher") from None
        # No tensor is kept alive.
        for place, _ in self.pointers:
            self.arguments[place] = None
        for _, group, within in self.groups:
            for place, _ in within:
                group[place] = None
        for place, *_ in self.groups:
            self.arguments[place] = None

    def __call__(self, pointers: list[int], stream: int) -> None:
        provide_scratch_memory(self.descriptors)
        arguments = self.arguments.copy()
        for place, number in self.pointers:
            arguments[place] = pointers[number]
        for place, group, within in self.groups:
            parts = group.copy()
            for i, number in within:
                parts[i] = pointers[number]
            arguments[place] = tuple(parts)
        compiled, hooks = self.compiled, triton.knobs.runtime
        # What Triton's own `run` does once it has found the compiled kernel.
        compiled.run(
            *self.grid,
            stream,
            compiled.function,
            compiled.packed_metadata,
            compiled.launch_metadata(self.grid, stream, *arguments),
            hooks.launch_enter_hook,
            hooks.launch_exit_hook,
            *arguments,
        )


def _places(values: Sequence[Any], numbers: dict[int, int]) -> list[tuple[int, int]]:
    """Where tensors are among `values`, and their numbers."""
    return [(place, numbers[id(value)]) for place, value in enumerate(values) if isinstance(value, torch.Tensor)]


_UNKNOWN: Any = object()


def _keep(launcher: Launcher, arguments: tuple[Any, ...], key: tuple[Any, ...]) -> None:
    if len(_kept) >= _MOST_KINDS:
        forget_launches()
    kept = _kept
    # A tensor that is given twice is two tensors here: another call of this kind may give two.
    separate = tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments)
    launch, compiled = _launch(launcher, separate)
    kept[key] = None if launch is None else _Kept(compiled, launch, separate)


def _launch(launcher: Launcher, arguments: tuple[Any, ...]) -> tuple[Launch | None, Any]:
    """Ask the launcher and launch through Triton; returns what was launched and the compiled kernel."""
    launch = launcher(*arguments)
    if launch is None:
        return None, None
    with device_guard(arguments[0]):
        provide_scratch_memory(launch.descriptors)
        return launch, launch.kernel[launch.grid](*launch.arguments, **launch.options)
