"""A stand-in for a GPU: every launcher runs as on a GPU, up to the launch itself, and the compiled kernels are kept.

>>> with stand_in("sm_90") as kernels:
...     softmax_forward(torch.empty(8, 1024, device="meta"), dim=-1)
>>> [kernel.name for kernel in kernels]
['_softmax_forward_kernel']

Tensors may be on the device ``meta``: they take no memory and count as aligned. A stand-in does not work in Triton's
interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastformer_kernels.launch import ARCHITECTURES, Architecture, target_architecture
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager


@dataclass(frozen=True)
class LaunchedKernel:
    """A kernel that was compiled for a launch.

    Attributes:
        name: the name of the Triton function.
        binary: the cubin or hsaco.
        metadata: Triton's metadata: target, num_warps, num_stages, shared (bytes per CTA), hash, ...
        constants: the Triton function's compile-time arguments by name. A field of a named tuple is `tuple.field`.
        grid: the number of programs of the launch in each dimension.
    """

    name: str
    binary: bytes
    metadata: Any
    constants: dict[str, Any]
    grid: tuple[int, int, int]

    def text(self, stage: str) -> str:
        """The kernel's text after a stage of the compiler: ttir, ttgir, llir; ptx or amdgcn.

        Raises:
            ValueError: the cache has only the binary, as the caches of `fastformer kernels compile` have.
        """
        files = get_cache_manager(self.metadata.hash).get_group(f"{self.name}.json") or {}
        if f"{self.name}.{stage}" not in files:
            raise ValueError(
                f"the cache has no {stage} of {self.name}, because `kernels compile` keeps none; use another --cache"
            )
        return Path(files[f"{self.name}.{stage}"]).read_text()


@contextmanager
def stand_in(architecture: str) -> Iterator[list[LaunchedKernel]]:
    """Make every kernel launch within the block compile for `architecture` and stop before it runs.

    Args:
        architecture: a name in `ARCHITECTURES`.

    Returns:
        The kernels launched so far, in order, with repetitions.

    Raises:
        ValueError: there is no such architecture.
        triton.OutOfResources: a kernel needs more shared or tensor memory than the architecture has.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter cannot compile kernels; unset TRITON_INTERPRET")
    launched: list[LaunchedKernel] = []
    config = triton.runtime.driver
    previous = config._active
    config.set_active(_StandInDriver(ARCHITECTURES[architecture], launched))
    try:
        with target_architecture(architecture):
            yield launched
    finally:
        config._active = previous


def gpu_target(architecture: str) -> GPUTarget:
    """The compiler's target for an architecture of `ARCHITECTURES`."""
    warp_size = ARCHITECTURES[architecture].warp_size
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), warp_size)
    return GPUTarget("hip", architecture, warp_size)


class _StandInDriver:
    """A driver that answers Triton's launch path in place of a GPU."""

    def __init__(self, architecture: Architecture, launched: list[LaunchedKernel]) -> None:
        self.architecture = architecture
        self.launched = launched
        self.utils = self

    def get_current_device(self) -> str:
        """The key under which Triton keeps compiled kernels: usually the device, here the architecture."""
        return self.architecture.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.architecture.name)

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": self.architecture.shared_memory}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[int, Any, int, int, int]:
        """Return module, function, registers, spills and threads per CTA. The launcher is later given the function."""
        return 1, (name, binary), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        constants = {_name(source, path): getattr(value, "value", value) for path, value in source.constants.items()}

        def launch(grid_0: int, grid_1: int, grid_2: int, stream: int, function: Any, *arguments: Any) -> None:
            # A kernel keeps its launcher longer than this driver is active.
            driver = triton.runtime.driver.active
            name, binary = function
            driver.launched.append(LaunchedKernel(name, binary, metadata, constants, (grid_0, grid_1, grid_2)))

        return launch


def _name(source: Any, path: tuple[int, ...]) -> str:
    """The name of a constant: that of its argument and, within a named tuple, of its field."""
    place, *within = path
    argument = source.fn.arg_names[place]
    return ".".join([argument, *(source.signature[argument]._fields[field] for field in within)])
