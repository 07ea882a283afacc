"""Keep launches: the arguments of a kernel are computed once for each kind of call.

If two calls differ only in the addresses of their tensors, their launches differ only in pointers. Choosing a
configuration, computing strides and sizes, and Triton's own search for the compiled kernel, which handles each of about
sixty arguments, take ten times as long as the launch. Therefore a launcher returns a launch, and is called once:

>>> @kept_launch
... def _launch_copy(source: torch.Tensor, outputs: tuple[torch.Tensor]) -> Launch:
...     (target,), size = outputs, source.numel()
...     arguments = {"source": source, "target": target, "size": size, "BLOCK": 1024}
...     return Launch(_copy_kernel, (triton.cdiv(size, 1024),), arguments)
>>> _launch_copy(x, (torch.empty_like(x),))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastformer_kernels.launch import device_guard, provide_scratch_memory

# The number of kinds of calls that are kept at a time. A process that needs more forgets all and starts again.
_MOST_KINDS = 4096
# Triton compiles one kernel for pointers that are multiples of this many bytes, and another for those that are not.
_ALIGNMENT = 16

# Replaced by another dictionary, never emptied: a thread may be about to add an entry that is no longer valid.
_kept: dict[tuple[Any, ...], list[_Kept]] = {}
_choices: dict[tuple[Any, ...], Any] = {}

Choice = TypeVar("Choice")


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: the Triton function.
        grid: number of programs in each dimension.
        arguments: by name, the kernel's arguments with its constants, and the compiler's options. Every tensor in them
            (directly, in a tuple, or as the base of a descriptor) must be one that the launcher was given.
        descriptors: whether the kernel makes tensor descriptors.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    descriptors: bool = False


Launcher = Callable[..., Launch | list[Launch] | None]


def kept_launch(launcher: Launcher) -> Callable[..., None]:
    """Launch what `launcher` returns, without calling it again for a call of the same kind.

    Two calls are of the same kind if their tensors have the same dtypes, shapes, strides and alignment to 16 bytes, lie
    on the same device, and their other arguments are equal. Nothing else about a tensor may decide what is launched.

    Args:
        launcher: takes positional arguments: first a tensor, then tensors, None, hashable values, and tuples of
            tensors. A tuple holds tensors that were allocated for this launch: their dtypes, shapes and strides must
            follow from the other arguments, since they are not compared. Returns a launch, a list of launches in
            their order, or None where there is nothing to launch.
    """

    def launch(*arguments: Any) -> None:
        first: torch.Tensor = arguments[0]
        device = first.get_device()
        if device < 0 and not first.is_meta:
            # On a CPU a tool executes the kernels: its launches are not kept.
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
                kind += argument.dtype, argument.shape, argument.stride(), pointer % _ALIGNMENT
            elif type(argument) is tuple:
                kind.append(len(argument))
                pointers += [tensor.data_ptr() for tensor in argument]
            else:
                kind.append(argument)
        key = tuple(kind)
        known = _kept.get(key)
        if known is None:
            _keep(launcher, arguments, key)
        elif device == current or device < 0:
            stream = driver.get_current_stream(current)
            for each in known:
                each(pointers, stream)
        else:
            with torch.cuda.device(device):
                stream = driver.get_current_stream(device)
                for each in known:
                    each(pointers, stream)

    return launch


def kept_choice(choose: Callable[..., Choice]) -> Callable[..., Choice]:
    """Call `choose` once for each kind of call, and keep its result as long as launches are kept.

    Args:
        choose: takes positional arguments: first a tensor, then tensors, None and hashable values. Its result may
            depend only on the device, the dtype and the shape of a tensor.
    """

    def choice(*arguments: Any) -> Choice:
        first: torch.Tensor = arguments[0]
        device = first.get_device()
        if device < 0 and not first.is_meta:
            return choose(*arguments)
        kind: list[Any] = [choose, triton.runtime.driver.active.get_current_device(), device]
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                kind += argument.dtype, argument.shape
            else:
                kind.append(argument)
        key = tuple(kind)
        choices = _choices
        if key not in choices:
            if len(choices) >= _MOST_KINDS:
                forget_launches()
            choices[key] = choose(*arguments)
        return choices[key]

    return choice


def forget_launches() -> None:
    """Forget every kept launch. Call this when configurations change."""
    global _kept, _choices
    _kept, _choices = {}, {}


class _Kept:
    """A compiled kernel with all the arguments of its launch except the pointers."""

    def __init__(self, compiled: Any, launch: Launch, tensors: list[torch.Tensor]) -> None:
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.compiled = compiled
        self.grid = (*launch.grid, 1, 1)[:3]
        self.descriptors = launch.descriptors
        self.arguments: list[Any] = [launch.arguments[name] for name in launch.kernel.arg_names]
        # Where each pointer goes, and the number of its tensor: in an argument, first in a tuple, anywhere in a tuple,
        # or in a descriptor.
        self.pointers: list[tuple[int, int]] = []
        self.leading: list[tuple[int, int, tuple[Any, ...]]] = []
        self.groups: list[tuple[int, list[Any], list[tuple[int, int]]]] = []
        self.described: list[tuple[int, int, dict[str, Any]]] = []
        try:
            for place, argument in enumerate(self.arguments):
                if _is_tensor(argument):
                    self.arguments[place] = None
                    self.pointers.append((place, numbers[id(argument)]))
                elif isinstance(argument, TensorDescriptor):
                    self.arguments[place] = None
                    self.described.append((place, numbers[id(argument.base)], {**vars(argument), "base": None}))
                elif isinstance(argument, tuple):
                    within = [(i, numbers[id(part)]) for i, part in enumerate(argument) if _is_tensor(part)]
                    group = [None if _is_tensor(part) else part for part in argument]
                    self.arguments[place] = tuple(group)
                    if len(within) == 1 and within[0][0] == 0:
                        self.leading.append((place, within[0][1], tuple(group[1:])))
                    elif within:
                        self.groups.append((place, group, within))
        except KeyError:
            raise ValueError(f"{launch.kernel}: a tensor among its arguments was not given to its launcher") from None

    def __call__(self, pointers: list[int], stream: int) -> None:
        """Launch the kernel with the addresses of the launcher's tensors, in their order."""
        if self.descriptors:
            provide_scratch_memory()
        arguments = self.arguments.copy()
        for place, number in self.pointers:
            arguments[place] = pointers[number]
        for place, number, rest in self.leading:
            # This takes half the time of unpacking.
            arguments[place] = (pointers[number],) + rest  # noqa: RUF005
        for place, group, within in self.groups:
            parts = group.copy()
            for i, number in within:
                parts[i] = pointers[number]
            arguments[place] = tuple(parts)
        for place, number, fields in self.described:
            arguments[place] = _descriptor(pointers[number], fields)
        compiled, hooks = self.compiled, triton.knobs.runtime
        enter, leave, metadata = hooks.launch_enter_hook, hooks.launch_exit_hook, None
        if enter.calls or leave.calls:
            metadata = compiled.launch_metadata(self.grid, stream, *arguments)
        else:
            enter = leave = None
        # The same as Triton's own `run` does after it has found the compiled kernel.
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *arguments
        )


class _Pointer(int):
    """An address that passes for a described tensor: Triton's launchers take an int, or call `data_ptr`."""

    def data_ptr(self) -> int:
        return self


def _descriptor(pointer: int, fields: dict[str, Any]) -> TensorDescriptor:
    """A descriptor with these fields for the memory at `pointer`, without the checks of the class's constructor."""
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=_Pointer(pointer))
    return descriptor


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _keep(launcher: Launcher, arguments: tuple[Any, ...], key: tuple[Any, ...]) -> None:
    if len(_kept) >= _MOST_KINDS:
        forget_launches()
    kept = _kept
    tensors: list[torch.Tensor] = []
    launched = _launch(launcher, _separate(arguments, tensors))
    # A hook of Triton may stop a launch.
    if all(compiled is not None for _, compiled in launched):
        kept[key] = [_Kept(compiled, launch, tensors) for launch, compiled in launched]


def _separate(values: tuple[Any, ...], tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """`values` with a separate tensor object in each place, each appended to `tensors`.

    Where this call has the same tensor twice, another call of its kind may have two tensors."""
    separate: list[Any] = []
    for value in values:
        if _is_tensor(value):
            tensors.append(value.detach())
            separate.append(tensors[-1])
        else:
            separate.append(_separate(value, tensors) if type(value) is tuple else value)
    return tuple(separate)


def _launch(launcher: Launcher, arguments: tuple[Any, ...]) -> list[tuple[Launch, Any]]:
    """Call the launcher and launch through Triton. Returns each launch with its compiled kernel."""
    asked = launcher(*arguments)
    launches = [] if asked is None else asked if isinstance(asked, list) else [asked]
    launched = []
    with device_guard(arguments[0]):
        for launch in launches:
            if launch.descriptors:
                provide_scratch_memory()
            launched.append((launch, launch.kernel[launch.grid](**launch.arguments)))
    return launched
