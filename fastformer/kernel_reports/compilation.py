"""Compile kernels ahead of time into a Triton cache, without a GPU: all kernels that some work will launch on one.

1. The work runs on meta tensors under a stand-in for each architecture. Triton's own launch path specialises every
   launch (divisible by 16, equal to one, 64-bit, aligned, smaller than 2 GiB) and is stopped before it compiles.
2. Parallel processes compile each distinct specialisation once.
3. The work runs again on the finished cache. A launch that still compiles anything is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import operator
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from fastformer_kernels.launch import ARCHITECTURES, Architecture
from triton.runtime.jit import JITFunction

from fastformer.kernel_reports.launchers import compile_launcher
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in

# Limits of a CTA on every architecture. Only sm_100 has tensor memory.
_TENSOR_MEMORY_COLUMNS = 512
_MOST_THREADS = 1024

Work = Callable[[], object]
"""Calls of operators or of a model on meta tensors."""
Track = Callable[[Iterable[None], int], Iterable[None]]
"""Shows progress: takes an iterable of steps and their number, and yields the steps."""


@dataclass(frozen=True)
class Specialization:
    """A kernel for one launch configuration and one kind of arguments.

    Attributes:
        architecture: a name in `ARCHITECTURES`.
        module, kernel: the module and the name of the Triton function.
        key: Triton's own key of the types, constants and options.
        arguments: what Triton compiles the function with, as `_pickled` returns it.
    """

    architecture: str
    module: str
    kernel: str
    key: str
    arguments: bytes = field(compare=False, repr=False)


@dataclass(frozen=True)
class Failure:
    """A specialisation that cannot run: it does not compile, or it needs more resources than its architecture has."""

    specialization: Specialization
    reason: str

    def __str__(self) -> str:
        return f"{self.specialization.architecture} {self.specialization.kernel}: {self.reason}"


class FailedKernelsError(Exception):
    """Some kernels cannot run. The message has a line for each of them."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__("\n".join([f"{len(failures)} kernels failed:", *dict.fromkeys(map(str, failures))]))


def compile_ahead(
    work: Sequence[Work],
    architectures: Sequence[str],
    cache: Path,
    processes: int | None = None,
    track: Track = lambda steps, total: steps,
) -> tuple[list[Specialization], list[Failure]]:
    """Compile the kernels that `work` launches on `architectures` into the Triton cache `cache`.

    Args:
        work: functions that launch the kernels. Each is run in this process, once for each architecture.
        architectures: names in `ARCHITECTURES`.
        cache: a folder in the layout of TRITON_CACHE_DIR. It is created if it does not exist, or else added to. Triton
            stores the absolute paths of its files: use the cache at the same path, or `relocate` it.
        processes: the number of processes that compile in parallel; by default one for each CPU.
        track: shows progress.

    Returns:
        All specialisations, and those that failed.
    """
    specializations = list(dict.fromkeys(s for name in architectures for s in specializations_of(work, name)))
    failures: list[Failure] = []
    steps = _compile_all(specializations, cache.absolute(), processes or os.cpu_count() or 1)
    for failure in track(steps, len(specializations)):  # type: ignore[arg-type]
        if failure is not None:
            failures.append(failure)
    return specializations, failures


def specializations_of(work: Sequence[Work], architecture: str) -> list[Specialization]:
    """The distinct specialisations that `work` requests on `architecture`. Nothing is compiled.

    Raises:
        ValueError: a function of the user's own, such as one of a `ScoreMod`, cannot be found by its name.
    """
    found: dict[Specialization, None] = {}

    def keep(function: JITFunction, key: str, *arguments: Any) -> None:
        found[Specialization(architecture, function.module, function.fn.__qualname__, key, _pickled(arguments))] = None

    with instead_of_compiling(keep), stand_in(architecture), kernels_of_meta_operators():
        for run in work:
            run()
    return list(found)


@contextlib.contextmanager
def instead_of_compiling(keep: Callable[..., None]) -> Iterator[None]:
    """Stop every launch that has to compile within the block, and call `keep` instead.

    Triton has a hook for this, but it first makes JSON of what it gives the hook, which fails for a function among the
    constants.

    Args:
        keep: takes the function, Triton's key of the specialisation, signature, constants, options and attributes.
    """

    def stop(function: JITFunction, key: str, signature: Any, device: Any, *rest: Any, warmup: bool = False) -> None:
        keep(function, key, signature, *rest[:3])

    compiling, JITFunction._do_compile = JITFunction._do_compile, stop
    try:
        yield
    finally:
        JITFunction._do_compile = compiling


@contextlib.contextmanager
def triton_cache(folder: Path) -> Iterator[None]:
    """Make `folder` Triton's cache within the block."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder.absolute())
        yield


def compiled_by(work: Sequence[Work], architectures: Sequence[str], cache: Path) -> list[str]:
    """The names of the kernels that `work` still has to compile on a GPU of each architecture with the cache `cache`.

    Every launch goes through Triton's own launch path, up to the driver. Run this in a process that has not launched
    the kernels before, because Triton keeps launched kernels in memory.
    """
    missed: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            missed.append(src.name)

    with triton_cache(cache), triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        for architecture in architectures:
            with stand_in(architecture), kernels_of_meta_operators():
                for run in work:
                    run()
    return missed


@contextlib.contextmanager
def compiler(cache: Path, processes: int) -> Iterator[Callable[[Specialization], Future[str | None]]]:
    """Yield a function that compiles a specialisation into `cache` in one of `processes` processes.

    It returns a future of the reason why the kernel cannot run, or of None if it can. Compilations that have not begun
    at the end of the block are cancelled. LLVM ends its process on an error that it cannot handle: this is reported as
    the reason, and a new process replaces the old one.
    """
    mine = threading.local()
    started: list[ProcessPoolExecutor] = []

    def compile_by_my_process(specialization: Specialization) -> str | None:
        if not hasattr(mine, "process"):
            # Spawned, not forked: the threads of LLVM and torch do not survive a fork.
            mine.process = ProcessPoolExecutor(1, get_context("spawn"), _use_cache, (str(cache),))
            started.append(mine.process)
        try:
            return mine.process.submit(_compile, specialization).result()
        except BrokenProcessPool:
            del mine.process
            return "the compiler ended its process; see its last output for the reason"

    with ThreadPoolExecutor(processes) as threads:
        try:
            yield lambda specialization: threads.submit(compile_by_my_process, specialization)
        finally:
            threads.shutdown(cancel_futures=True)
            for process in started:
                process.shutdown()


def _compile_all(specializations: list[Specialization], cache: Path, processes: int) -> Iterator[Failure | None]:
    with compiler(cache, processes) as submit:
        pending = {submit(specialization): specialization for specialization in specializations}
        for done in as_completed(pending):
            reason = done.result()
            yield None if reason is None else Failure(pending[done], reason)


def _use_cache(cache: str) -> None:
    triton.knobs.cache.dir = cache


def _compile(specialization: Specialization) -> str | None:
    """Compile one specialisation into the cache. Returns the reason if the kernel cannot run, else None."""
    with stand_in(specialization.architecture):
        try:
            kernel = _specialize(_find(specialization), specialization)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    compile_launcher(kernel)
    return _what_it_lacks(kernel.metadata, ARCHITECTURES[specialization.architecture])


def _what_it_lacks(metadata: Any, architecture: Architecture) -> str | None:
    """The reason why Triton would refuse to launch a kernel: it needs too much of a resource. None if there is none.

    Registers are not checked, because ptxas keeps to their limit.
    """
    needed = {
        "bytes of shared memory": (metadata.shared, architecture.shared_memory),
        "columns of tensor memory": (getattr(metadata, "tmem_size", None) or 0, _TENSOR_MEMORY_COLUMNS),
        "threads": (metadata.num_warps * architecture.warp_size, _MOST_THREADS),
    }
    return next(
        (
            f"needs {need} {what}, {architecture.name} has {limit}"
            for what, (need, limit) in needed.items()
            if need > limit
        ),
        None,
    )


def _specialize(function: JITFunction, specialization: Specialization) -> Any:
    device = triton.runtime.driver.active.get_current_device()
    signature, constants, options, attributes = pickle.loads(specialization.arguments)
    return function._do_compile(specialization.key, signature, device, constants, options, attributes, warmup=True)


def _find(specialization: Specialization) -> JITFunction:
    function = _named(specialization.module, specialization.kernel)
    while not isinstance(function, JITFunction):  # heuristics wrap the function
        function = function.fn
    return function


def _named(module: str, name: str) -> Any:
    return operator.attrgetter(name)(importlib.import_module(module))


def _pickled(arguments: tuple[Any, ...]) -> bytes:
    """Signature, constants, options and attributes of a specialisation, for another process."""
    stream = io.BytesIO()
    _Pickler(stream).dump(arguments)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles a Triton function, which a `ScoreMod` has among the constants, as its module and name."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, JITFunction):
            return NotImplemented
        module, name = value.module, value.fn.__qualname__
        try:
            # In another process, the program's own module has another name, which the name of a kernel contains.
            found = None if module == "__main__" else _named(module, name)
        except (ImportError, AttributeError):
            found = None
        if found is not value:
            raise ValueError(
                f"the Triton function {name} of module {module} cannot be compiled in another process, which would not "
                "find it. Define it at the top of a module that is imported, under its own name"
            )
        return _named, (module, name)
