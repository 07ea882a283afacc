"""Launches are worked out once for each kind of call, and again where anything but the pointers may differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastformer_kernels import kept_launches
from fastformer_kernels import launch as launching
from fastformer_kernels.configurations import forced, shipped_defaults
from fastformer_kernels.kept_launches import Launch, kept_choice, kept_launch
from fastformer_kernels.launch import target_architecture
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.cpu


class Driver:
    """A stand-in for Triton's driver, with the methods that a launch calls."""

    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 10 + device


class Compiled:
    """A compiled kernel that notes the arguments of its launches."""

    function, packed_metadata = "function", "packed"

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.launched = launched

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        self.launched.append(((x, y, z), stream, *rest[5:]))


class Kernel:
    """A Triton function of a pointer, a tuple of a pointer and a number, a number, and a constant."""

    arg_names = ("first", "group", "size", "BLOCK")

    def __init__(self) -> None:
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.compiled += 1
            return Compiled(self.launched)

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(kept_launches, "_kept", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return Kernel()


def launcher(kernel: Kernel, asked: list[Any]) -> Any:
    @kept_launch
    def launch(first: torch.Tensor, second: torch.Tensor | None, size: int | None) -> Launch | None:
        asked.append(size)
        if size is None:
            return None
        return Launch(
            kernel, (size,), {"first": first, "group": (second, 7), "size": size, "BLOCK": 16, "num_warps": 4}
        )

    return launch


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_second_call_of_a_kind_launches_without_asking(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    pointers = {}
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: pointers.get(id(tensor), 0))
    asked: list[Any] = []
    launch = launcher(kernel, asked)
    launch(on_meta(4), on_meta(4), 3)
    assert (asked, kernel.compiled, kernel.launched) == ([3], 1, [])
    a, b = on_meta(4), on_meta(4)
    pointers.update({id(a): 32, id(b): 64})
    launch(a, b, 3)
    launch(b, a, 3)
    assert (asked, kernel.compiled) == ([3], 1)
    assert kernel.launched == [((3, 1, 1), 10, 32, (64, 7), 3, 16), ((3, 1, 1), 10, 64, (32, 7), 3, 16)]


def test_one_tensor_given_twice_is_no_kind_of_its_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launcher(kernel, [])
    a, b = on_meta(4), on_meta(4)
    launch(a, a, 3)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 32 if tensor is a else 64)
    launch(a, b, 3)
    assert kernel.launched == [((3, 1, 1), 10, 32, (64, 7), 3, 16)]


def test_a_descriptor_follows_its_tensor(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept descriptor keeps its shape and takes the next tensor's address, as a pointer and as `data_ptr`."""

    @kept_launch
    def launch(matrix: torch.Tensor) -> Launch:
        described = TensorDescriptor(matrix, [4, 16], [16, 1], [2, 8])
        return Launch(kernel, (1,), {"first": described, "group": (), "size": 3, "BLOCK": 16})

    launch(on_meta(16, 4).T)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 64)
    launch(on_meta(16, 4).T)
    ((_, _, descriptor, *rest),) = kernel.launched
    assert rest == [(), 3, 16] and isinstance(descriptor, TensorDescriptor)
    assert (descriptor.shape, descriptor.strides, descriptor.block_shape) == ([4, 16], [16, 1], [2, 8])
    assert descriptor.base == descriptor.base.data_ptr() == 64


@pytest.mark.parametrize(
    "other",
    [
        (on_meta(5), on_meta(4), 3),
        (on_meta(8)[::2], on_meta(4), 3),
        (on_meta(4, dtype=torch.bfloat16), on_meta(4), 3),
        (on_meta(4), None, 3),
        (on_meta(4), on_meta(4), 4),
        (on_meta(4), on_meta(4), None),
    ],
)
def test_another_kind_is_asked_for(kernel: Kernel, other: tuple[Any, ...]) -> None:
    asked: list[Any] = []
    launch = launcher(kernel, asked)
    for arguments in ((on_meta(4), on_meta(4), 3), other, (on_meta(4), on_meta(4), 3), other):
        launch(*arguments)
    assert asked == [3, other[2]]


def test_another_alignment_or_device_is_another_kind(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    launch = launcher(kernel, asked)
    launch(on_meta(4), None, 3)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 8)
    launch(on_meta(4), None, 3)
    monkeypatch.setattr(Driver, "device", 1)
    launch(on_meta(4), None, 3)
    assert asked == [3, 3, 3]


class Devices:
    """Two GPUs that note each launch with its stream and the number of the current device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver, self.launched, devices = Driver(), [], self

        class Guard:
            """A stand-in for `torch.cuda.device`, in which -1 does nothing."""

            def __init__(self, device: int) -> None:
                self.device = device

            def __enter__(self) -> None:
                self.previous = devices.driver.device
                if self.device >= 0:
                    devices.driver.device = self.device

            def __exit__(self, *_: Any) -> None:
                devices.driver.device = self.previous

        monkeypatch.setattr(torch.cuda, "device", Guard)
        monkeypatch.setattr(triton.runtime.driver, "_active", self.driver)
        monkeypatch.setattr(kept_launches, "_kept", {})
        monkeypatch.setattr(kept_launches, "provide_scratch_memory", lambda: self.note("memory"))

    def note(self, *what: Any) -> None:
        self.launched.append((*what, self.driver.device))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Devices:
            # Triton asks for the stream of the current device.
            self.note("first", self.driver.get_current_stream(self.driver.device))
            return self

        return launch

    # The attributes of a kernel and of its compiled form.
    arg_names, function, packed_metadata = ("pointer",), "function", "packed"

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        self.note("kept", stream)


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("holds", [0, 1])
def test_a_launch_is_on_the_device_that_holds_its_tensor(
    current: int, holds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and kept launches use the stream and the memory of their tensor's device, whichever device is current."""
    devices = Devices(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: holds)
    monkeypatch.setattr(launching, "_gpu_of", lambda tensor: holds)
    devices.driver.device = current

    @kept_launch
    def launch(first: torch.Tensor) -> list[Launch]:
        return [Launch(devices, (1,), {"pointer": first}, descriptors=True)] * 2

    for _ in range(3):
        launch(on_meta(4))
    memory, stream = ("memory", holds), 10 + holds
    assert devices.launched == [memory, ("first", stream, holds)] * 2 + [memory, ("kept", stream, holds)] * 4
    assert devices.driver.device == current


def test_other_configurations_are_asked_for(kernel: Kernel) -> None:
    asked: list[Any] = []
    launch = launcher(kernel, asked)
    for block in (forced({"some": 1}), shipped_defaults(), target_architecture("sm_90")):
        launch(on_meta(4), None, 3)
        with block:
            launch(on_meta(4), None, 3)
        launch(on_meta(4), None, 3)
    assert len(asked) >= 5


def test_a_tensor_of_the_launchers_own_is_refused(kernel: Kernel) -> None:
    @kept_launch
    def launch(first: torch.Tensor) -> Launch:
        return Launch(kernel, (1,), {"first": first, "group": (first.clone(), 7), "size": 1, "BLOCK": 16})

    with pytest.raises(ValueError, match="not given to its launcher"):
        launch(on_meta(4))


def test_tensors_made_for_a_launch_are_not_looked_at(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    @kept_launch
    def launch(first: torch.Tensor, made: tuple[torch.Tensor]) -> Launch:
        nonlocal asked
        asked += 1
        return Launch(kernel, (1,), {"first": first, "group": (made[0], 7), "size": 1, "BLOCK": 16})

    target = on_meta(4)
    launch(target, (target,))
    other = on_meta(5)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 32 if tensor is other else 64)
    launch(on_meta(4), (other,))
    assert (asked, kernel.launched) == (1, [((1, 1, 1), 10, 64, (32, 7), 1, 16)])


def test_what_is_kept_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_launches, "_MOST_KINDS", 8)
    launch = launcher(kernel, [])
    for size in range(30):
        launch(on_meta(4), None, size)
    assert len(kept_launches._kept) <= 8


def test_a_choice_is_kept_for_shapes_dtypes_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_launches, "_choices", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(kept_launches, "_MOST_KINDS", 8)
    asked: list[int] = []

    @kept_choice
    def choice(first: torch.Tensor, second: torch.Tensor | None, number: int) -> int:
        asked.append(number)
        return first.shape[0] + number

    assert [choice(on_meta(4), None, 3), choice(on_meta(4), None, 3), choice(on_meta(5), None, 3)] == [7, 7, 8]
    choice(on_meta(4), on_meta(4), 3)
    choice(on_meta(4), on_meta(4).half(), 3)
    choice(on_meta(4), None, 4)
    assert asked == [3, 3, 3, 3, 4]
    with forced({"some": 1}):
        choice(on_meta(4), None, 4)
    assert asked == [3, 3, 3, 3, 4, 4]
    monkeypatch.setattr(Driver, "device", 1)
    choice(on_meta(4), None, 4)
    assert asked == [3, 3, 3, 3, 4, 4, 4]
    for number in range(30):
        choice(on_meta(4), None, number)
    assert len(kept_launches._choices) <= 8


@triton.jit
def _bare_kernel(pointer, size, BLOCK: tl.constexpr):
    tl.store(pointer + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < size)


def test_tritons_kernels_have_what_a_kept_launch_needs() -> None:
    from triton.compiler.compiler import CompiledKernel

    assert _bare_kernel.arg_names == ["pointer", "size", "BLOCK"]
    assert all(hasattr(CompiledKernel, name) for name in ("run", "launch_metadata"))


def test_hooks_of_a_launch_are_called_with_its_metadata(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Compiled, "launch_metadata", lambda *arguments: arguments[3:])
    monkeypatch.setattr(Compiled, "run", lambda *arguments: passed.append(arguments[7:10]))
    launch, hooks = launcher(kernel, []), triton.knobs.runtime.launch_enter_hook

    def hook(metadata: Any) -> None: ...

    launch(on_meta(4), None, 3)
    launch(on_meta(4), None, 3)
    hooks.add(hook)
    try:
        launch(on_meta(4), None, 3)
    finally:
        hooks.remove(hook)
    leave = triton.knobs.runtime.launch_exit_hook
    assert passed == [(None, None, None), ((0, (None, 7), 3, 16), hooks, leave)]
