"""What every launch goes by: the choice for the installed Triton, and the GPU that holds a tensor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from fastformer_kernels import kept_launches, launch

from fastformer.inspection.devices import DEVICES

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6.0", "old"), ("3.8.1", "old"), ("3.9.0", "new"), ("3.10.0+git1a2b", "new"), ("4.0.0", "new")],
)
def test_the_choice_of_the_newest_triton_that_is_no_newer_counts(
    version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert launch.for_triton({(3, 9): "new", (3, 6): "old"}) == expected


def on_gpu(index: int) -> Any:
    """A tensor as far as a launch asks where it is."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))


def test_each_tensor_is_served_by_the_gpu_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        SimpleNamespace(name="A100", major=8, minor=0, multi_processor_count=108),
        SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=130),
    ]
    launch._architecture_of_gpu.cache_clear()
    monkeypatch.setattr(launch, "_has_gpu", lambda: True)
    monkeypatch.setattr(launch, "_properties", gpus.__getitem__)
    assert [launch.architecture_of(on_gpu(index)).name for index in (1, 0, 1)] == ["sm_90", "sm_80", "sm_90"]
    assert [launch.multiprocessors_of(on_gpu(index)) for index in (1, 0)] == [130, 108]
    launch._architecture_of_gpu.cache_clear()


def test_a_tensor_that_a_tool_takes_for_a_gpus_is_launched_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    assert launch.architecture_of(on_gpu(0)) is launch.INTERPRETER
    with launch.device_guard(on_gpu(0)):
        pass


def test_kernels_are_launched_in_one_place() -> None:
    """Where a kernel's launch, `kernel[grid](...)`, stands in the sources."""
    package = Path(launch.__file__).parent
    launches = [
        (file.relative_to(package).as_posix(), node.func.value.attr)
        for file in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Attribute)
    ]
    assert launches == [("kept_launches.py", "kernel")]


def test_every_launch_is_inside_the_guard_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []

    @contextmanager
    def guard(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launched.append((arguments, list(current)))

    launched: list[Any] = []
    monkeypatch.setattr(kept_launches, "device_guard", guard)
    first, second = torch.zeros(1), torch.ones(1)
    launches = [kept_launches.Launch(Kernel(), (1,), (tensor,), {}) for tensor in (second, first)]
    kept_launches.kept_launch(lambda *tensors: launches)(first, second)
    assert launched == [((second,), [first]), ((first,), [first])]
    assert not current


# By the vendors' papers, in the order of their publication: bytes of shared memory that a thread block may use, from
# NVIDIA's table of technical specifications per compute capability and AMD's ISA guides, and the multiprocessors and
# MiB of level-2 cache of the largest product: A100, GA102, AD102, H100 SXM, B200, RTX PRO 6000, MI250X, MI300X, MI355X.
PUBLISHED = {
    "sm_80": (166912, 108, 40),
    "sm_86": (101376, 84, 6),
    "sm_89": (101376, 142, 96),
    "sm_90": (232448, 132, 50),
    "sm_100": (232448, 148, 126),
    "sm_120": (101376, 188, 128),
    "gfx90a": (65536, 110, 8),
    "gfx942": (65536, 304, 4),
    "gfx950": (163840, 256, 4),
}


def test_limits_are_the_published_ones() -> None:
    limits = {name: (a.shared_memory, a.multiprocessors, a.l2 >> 20) for name, a in launch.ARCHITECTURES.items()}
    assert limits == PUBLISHED
    assert {name: a.warp_size for name, a in launch.ARCHITECTURES.items()} == {
        name: 64 if name.startswith("gfx") else 32 for name in PUBLISHED
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_limits_agree_with_what_the_cost_model_knows_of_the_devices(name: str) -> None:
    """A device's products have as many multiprocessors as the largest, or fewer; a block has what the system leaves."""
    device, architecture = DEVICES[name], launch.ARCHITECTURES[name]
    assert device.multiprocessors <= architecture.multiprocessors <= 1.2 * device.multiprocessors
    reserved = 0 if name.startswith("gfx") else device.shared_reserved
    assert architecture.shared_memory == device.shared_memory - reserved
