"""How kernels are launched: the architectures, their limits, and the helpers every launcher shares.

Launch configurations are data, chosen by rule from the architecture, the head or hidden size and the element size;
nothing is timed at run time, so the first call of a kernel costs one compilation and no search.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Architecture:
    """What a kernel needs to know of a GPU.

    Attributes:
        name: the compiler's name: sm_90, gfx942.
        shared_memory: bytes of shared memory one CTA may use.
        warp_size: threads in a warp.
    """

    name: str
    shared_memory: int
    warp_size: int = 32


# Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (maximum shared memory
# per thread block); AMD CDNA3 and CDNA4 ISA guides (64 and 160 KiB LDS, wavefronts of 64).
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", 163 * 1024),
        Architecture("sm_86", 99 * 1024),
        Architecture("sm_89", 99 * 1024),
        Architecture("sm_90", 227 * 1024),
        Architecture("sm_100", 227 * 1024),
        Architecture("sm_120", 99 * 1024),
        Architecture("gfx90a", 64 * 1024, warp_size=64),
        Architecture("gfx942", 64 * 1024, warp_size=64),
        Architecture("gfx950", 160 * 1024, warp_size=64),
    )
}
# A CPU tensor reaches a launcher in the interpreter only; any configuration does, the smallest limits are the safest.
INTERPRETER = Architecture("interpreter", 99 * 1024)


# For every launch: fused multiply-adds are faster and round once. Triton 3.10 stops forming them unasked.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

# What `architecture_of` answers while kernels are compiled for a GPU that is not there.
_target: Architecture | None = None


@contextmanager
def target_architecture(name: str) -> Iterator[None]:
    """Choose launch configurations for the architecture `name`, whatever holds the tensors."""
    global _target
    previous, _target = _target, ARCHITECTURES[name]
    try:
        yield
    finally:
        _target = previous


def architecture_of(tensor: torch.Tensor) -> Architecture:
    """The architecture of the device that holds `tensor`; an unknown one is taken for its nearest older relative."""
    if _target is not None:
        return _target
    if not tensor.is_cuda or not torch.cuda.is_available():
        return INTERPRETER
    return _architecture_of_device(tensor.device.index)


@lru_cache
def _architecture_of_device(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
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
    # A minor revision shares its family's limits: 8.7 is not 8.6 but is safe with its shared memory.
    return ARCHITECTURES[f"sm_{max(older)}"]


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many programs of one CTA each run at once on the device that holds `tensor`; a few where there is no GPU."""
    if not tensor.is_cuda or not torch.cuda.is_available():
        return 4
    return _multiprocessors_of_device(tensor.device.index)


@lru_cache
def _multiprocessors_of_device(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def device_guard(tensor: torch.Tensor) -> torch.cuda.device:
    """Make `tensor`'s GPU current for a launch, so that a kernel runs there and on that device's current stream.

    Does nothing for a tensor on a CPU.
    """
    return torch.cuda.device(tensor.device.index if tensor.is_cuda and torch.cuda.is_available() else -1)
