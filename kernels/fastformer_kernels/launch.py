"""The architectures of GPUs, their limits, and the helpers that every launcher shares.

Launch configurations are data. A rule chooses them from the architecture, the head or hidden size and the element size.
Nothing is timed at run time, so the first call of a kernel costs one compilation and no search.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import triton

from fastformer_kernels.cache_keys import make_independent_of_order

make_independent_of_order()
if triton.knobs.runtime.interpret:
    from fastformer_kernels import interpreter

    interpreter.install()

T = TypeVar("T")


@dataclass(frozen=True)
class Architecture:
    """The limits of a GPU that decide how kernels are launched.

    Attributes:
        name: the compiler's name, such as sm_90 or gfx942.
        shared_memory: bytes of shared memory one CTA may use.
        multiprocessors: number of them on the largest device (compute units on AMD).
        l2: bytes of the level-2 cache (on AMD, of one die).
        warp_size: threads in a warp.
    """

    name: str
    shared_memory: int
    multiprocessors: int
    l2: int
    warp_size: int = 32


# Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (maximum shared memory
# per thread block); AMD CDNA3 and CDNA4 ISA guides (64 and 160 KiB LDS, wavefronts of 64); multiprocessors and L2 from
# the white papers of A100, GA102, AD102, H100 SXM, B200, RTX PRO 6000, MI250X (one die), MI300X and MI355X.
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", 163 * 1024, 108, 40 << 20),
        Architecture("sm_86", 99 * 1024, 84, 6 << 20),
        Architecture("sm_89", 99 * 1024, 142, 96 << 20),
        Architecture("sm_90", 227 * 1024, 132, 50 << 20),
        Architecture("sm_100", 227 * 1024, 148, 126 << 20),
        Architecture("sm_120", 99 * 1024, 188, 128 << 20),
        Architecture("gfx90a", 64 * 1024, 110, 8 << 20, warp_size=64),
        Architecture("gfx942", 64 * 1024, 304, 4 << 20, warp_size=64),
        Architecture("gfx950", 160 * 1024, 256, 4 << 20, warp_size=64),
    )
}
# A launcher gets CPU tensors only in the interpreter. Any configuration works; the smallest limits are the safest.
INTERPRETER = Architecture("interpreter", 99 * 1024, 2, 1 << 20)


# For every launch: fused multiply-adds are faster and round once. Triton 3.10 forms them only on request.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def for_triton(choices: dict[tuple[int, int], T]) -> T:
    """The choice for the installed Triton: that of the newest version (major, minor) which is not newer than it."""
    major, minor = triton.__version__.split(".")[:2]
    return choices[max(version for version in choices if version <= (int(major), int(minor)))]


# The result of `architecture_of` while kernels are compiled for a GPU that this machine lacks.
_target: Architecture | None = None


@contextmanager
def target_architecture(name: str) -> Iterator[None]:
    """Choose launch configurations for the architecture `name`, on any device."""
    global _target
    previous, _target = _target, ARCHITECTURES[name]
    try:
        yield
    finally:
        _target = previous


def architecture_of(tensor: torch.Tensor) -> Architecture:
    """The architecture of the device that holds `tensor`; for an unknown one, the nearest older known one."""
    if _target is not None:
        return _target
    gpu = _gpu_of(tensor)
    return INTERPRETER if gpu is None else _architecture_of_gpu(gpu)


def multiprocessors_of(tensor: torch.Tensor) -> int:
    """The number of multiprocessors (AMD: compute units) of the device that holds `tensor`."""
    gpu = _gpu_of(tensor)
    if _target is not None or gpu is None:
        return architecture_of(tensor).multiprocessors
    return _properties(gpu).multi_processor_count


def _gpu_of(tensor: torch.Tensor) -> int | None:
    """The index of the GPU that holds `tensor`. None without a GPU: a tool may execute kernels on a CPU."""
    return tensor.device.index if tensor.is_cuda and _has_gpu() else None


# Needed at each launch, and constant for the life of a process.
_has_gpu = cache(torch.cuda.is_available)
_properties = cache(torch.cuda.get_device_properties)


@cache
def _architecture_of_gpu(index: int) -> Architecture:
    """The architecture of a GPU; of an unknown revision, the nearest older one."""
    properties = _properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return ARCHITECTURES.get(name, ARCHITECTURES["gfx90a"])
    capability = properties.major * 10 + properties.minor
    known = [int(name[3:]) for name in ARCHITECTURES if name.startswith("sm_")]
    older = [number for number in known if number <= capability]
    if not older:
        raise RuntimeError(
            f"device {index} ({properties.name}) has compute capability {properties.major}.{properties.minor}; "
            "Fastformer's kernels need 8.0 (Ampere) or later. Use fastformer.backend('torch')"
        )
    # An unknown minor revision gets the limits of the nearest older one: 8.7 is safe with the shared memory of 8.6.
    return ARCHITECTURES[f"sm_{max(older)}"]


def provide_scratch_memory() -> None:
    """Give kernels memory for the tensor descriptors that they make, from PyTorch's allocator on the current device.

    Triton keeps one allocator per thread and context, and autograd has its own threads: call this before each launch.
    Triton launches on PyTorch's current stream, and the memory is freed in the order of that stream.
    """
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def device_guard(tensor: torch.Tensor) -> torch.cuda.device:
    """Make `tensor`'s GPU current for a launch, so that a kernel runs there and on that device's current stream.

    Does nothing for a tensor on a CPU.
    """
    gpu = _gpu_of(tensor)
    return torch.cuda.device(-1 if gpu is None else gpu)
