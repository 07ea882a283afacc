"""Every launch uses the choice for the installed Triton, and the GPU that holds its tensor."""

from __future__ import annotations

import ast
import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.cuda._utils
import triton
from devices import need_kernels
from fastformer_kernels import kept_launches, launch
from fastformer_kernels.attention import launch as launch_of_attention
from torch import Tensor

import fastformer
from fastformer import BlockMask
from fastformer.kernel_reports.devices import DEVICES
from fastformer.registry.score_mod import DECAY

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
    """Return a stand-in for a tensor, with only what tells a launch its device."""
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


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, [0, 1]), (False, [-1, -1])])
def test_the_guard_makes_the_gpu_of_its_tensor_current(
    has_gpu: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard names the GPU of its tensor, or -1, for which PyTorch's guard does nothing."""
    monkeypatch.setattr(launch, "_has_gpu", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: device)
    assert [launch.device_guard(on_gpu(index)) for index in (0, 1)] == expected
    assert launch.device_guard(torch.zeros(1)) == -1


def test_a_tensor_that_a_tool_takes_for_a_gpus_is_launched_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    assert launch.architecture_of(on_gpu(0)) is launch.INTERPRETER
    with launch.device_guard(on_gpu(0)):
        pass


def test_kernels_are_launched_in_one_place() -> None:
    """The sources have one launch of a kernel, `kernel[grid](...)`, in one file."""
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
            return lambda **arguments: launched.append((arguments, list(current)))

    launched: list[Any] = []
    monkeypatch.setattr(kept_launches, "device_guard", guard)
    first, second = torch.zeros(1), torch.ones(1)
    launches = [kept_launches.Launch(Kernel(), (1,), {"pointer": tensor}) for tensor in (second, first)]
    kept_launches.kept_launch(lambda *tensors: launches)(first, second)
    assert launched == [({"pointer": second}, [first]), ({"pointer": first}, [first])]
    assert not current


# Multiprocessors and MiB of level-2 cache of each architecture's largest product, in the order of their publication:
# A100, GA102, AD102, H100 SXM, B200, RTX PRO 6000, MI250X (one die), MI300X and MI355X. From the vendors' papers.
# Drivers report the same multiprocessors. PyTorch's compiler, for example, writes
# `DeviceProperties(..., multi_processor_count=188, cc=120, ...)` into the kernels it makes. Such kernels are public for
# all but gfx90a and gfx950: these two are as in IREE's KnownTargets.cpp, where both dies of MI250X have 220.
PUBLISHED = {
    "sm_80": (108, 40),
    "sm_86": (84, 6),
    "sm_89": (142, 96),
    "sm_90": (132, 50),
    "sm_100": (148, 126),
    "sm_120": (188, 128),
    "gfx90a": (220 // 2, 8),
    "gfx942": (304, 4),
    "gfx950": (256, 4),
}


def test_sizes_are_the_published_ones() -> None:
    sizes = {name: (a.multiprocessors, a.l2 >> 20) for name, a in launch.ARCHITECTURES.items()}
    assert sizes == PUBLISHED
    assert {name: a.warp_size for name, a in launch.ARCHITECTURES.items()} == {
        name: 64 if name.startswith("gfx") else 32 for name in PUBLISHED
    }


# NVIDIA's own rules, in a header that comes with Triton. A partition of a multiprocessor's memory is rounded up to the
# next possible size; if there is none, that is an error.
OCCUPANCY = """
#include <cuda_occupancy.h>

static cudaOccDeviceProp device(int major, int minor) {
    cudaOccDeviceProp properties = {.computeMajor = major, .computeMinor = minor};
    return properties;
}

int is_a_partition(int major, int minor, size_t bytes) {
    cudaOccDeviceProp properties = device(major, minor);
    return cudaOccAlignUpShmemSizeVoltaPlus(&bytes, &properties) == CUDA_OCC_SUCCESS;
}

int blocks_per_multiprocessor(int major, int minor) {
    cudaOccDeviceProp properties = device(major, minor);
    int blocks = -1;
    cudaOccMaxBlocksPerMultiprocessor(&blocks, &properties);
    return blocks;
}
"""
# Bytes of a block's shared memory that CUDA keeps for itself from compute capability 8.0 on.
RESERVED = 1024


@pytest.fixture(scope="module")
def occupancy(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled library of NVIDIA's rules."""
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "occupancy.c").write_text(OCCUPANCY)
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["cc", "-shared", "-fPIC", f"-I{include}", "-o", "occupancy.so", "occupancy.c"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "occupancy.so"))
    library.is_a_partition.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    return library


@pytest.mark.parametrize("name", [name for name in launch.ARCHITECTURES if name.startswith("sm_")])
def test_limits_of_nvidias_are_those_of_its_own_header(name: str, occupancy: ctypes.CDLL) -> None:
    capability = divmod(int(name.removeprefix("sm_")), 10)
    largest = max(kib for kib in range(1024) if occupancy.is_a_partition(*capability, kib * 1024)) * 1024
    assert launch.ARCHITECTURES[name].shared_memory == largest - RESERVED
    assert DEVICES[name].ctas == occupancy.blocks_per_multiprocessor(*capability)


@pytest.mark.parametrize("name", [name for name in launch.ARCHITECTURES if name.startswith("gfx")])
def test_limits_of_amds_are_those_that_pytorch_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of AMD's devices are those of PyTorch's table for users' kernels, since AMD's driver reports none."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: None)
    limit = launch.ARCHITECTURES[name].shared_memory
    kernel = torch.cuda._utils._CudaKernel(None, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=rf"\({limit + 1} bytes\) exceeds device limit \({limit} bytes\)"):
        kernel.set_shared_memory_config(limit + 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_limits_agree_with_what_the_cost_model_knows_of_the_devices(name: str) -> None:
    """Products have at most the multiprocessors of the largest, and a block the memory that the system leaves."""
    device, architecture = DEVICES[name], launch.ARCHITECTURES[name]
    assert device.multiprocessors <= architecture.multiprocessors <= 1.2 * device.multiprocessors
    reserved = 0 if name.startswith("gfx") else device.shared_reserved
    assert architecture.shared_memory == device.shared_memory - reserved


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"causal": True}, "borders"),
        ({"window": (3, 3)}, "borders"),
        ({}, "whole"),
        ({"dropout_p": 0.1}, "dropped"),
        ({}, "undropped"),
        ({"bias": torch.zeros(256, 256)}, "loaded"),
        ({"softcap": 5.0}, "computed"),
        ({"score_mod": DECAY}, "modified"),
        ({"mask": BlockMask.from_mask(torch.ones(256, 256, dtype=torch.bool))}, "listed"),
        ({}, "folded"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else given,
)
def test_attention_s_class_says_what_decides_its_speed(
    options: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call's class names what decides its speed: configurations measured for one class are not used for another."""
    need_kernels()
    classes: list[tuple[str, ...]] = []

    def choose(operation: str, query: Tensor, default: Any, words: Callable[[], tuple[str, ...]]) -> Any:
        classes.append(words())
        return default

    monkeypatch.setattr(launch_of_attention, "chosen", choose)
    q = torch.randn(1, 1, 256, 16, requires_grad=True)
    with fastformer.backend("triton"):
        fastformer.attention(q, q, q, **options).sum().backward()
    assert len(classes) >= 2  # forward and backward
    assert all(word in words for words in classes)
