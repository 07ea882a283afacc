"""Ahead-of-time compilation of Triton's launchers.

If triton has `make_launcher` (3.6 does, 3.9 does not), each signature of a kernel has its own launcher: an extension
module that a C compiler builds when the kernel is first launched.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia import driver
from triton.runtime import build

_COMPILER = shutil.which("gcc") or shutil.which("clang")


def compile_launcher(kernel: Any) -> None:
    """Put the launcher of a compiled kernel into Triton's cache, if this triton has launchers and a C compiler."""
    if kernel.metadata.target.backend == "cuda" and hasattr(driver, "make_launcher") and _COMPILER is not None:
        with _driver_library(_COMPILER), _nothing_loaded():
            driver.CudaUtils()
            driver.CudaLauncher(kernel.src, kernel.metadata)


@contextlib.contextmanager
def _driver_library(compiler: str) -> Iterator[None]:
    """Provide an empty library within the block. Extension modules link to it in place of NVIDIA's driver library."""
    name = "libcuda.so.1"
    with tempfile.TemporaryDirectory() as folder, triton.knobs.nvidia.scope():
        subprocess.run(
            [compiler, "-shared", "-x", "c", "/dev/null", "-o", Path(folder) / name, f"-Wl,-soname,{name}"], check=True
        )
        triton.knobs.nvidia.libcuda_path = folder
        _forget_library()
        try:
            yield
        finally:
            _forget_library()


def _forget_library() -> None:
    for cached in (driver.libcuda_dirs, driver.library_dirs):
        cached.cache_clear()


class _NotLoaded:
    """A replacement for an extension module: every attribute is None."""

    def __getattr__(self, name: str) -> None:
        return None


@contextlib.contextmanager
def _nothing_loaded() -> Iterator[None]:
    """Build extension modules within the block but do not load them, because loading needs the driver."""
    previous, build._load_module_from_path = build._load_module_from_path, lambda name, path: _NotLoaded()
    try:
        yield
    finally:
        build._load_module_from_path = previous
