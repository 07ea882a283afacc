"""Ahead-of-time compilation: the kernels that some work will launch on a GPU, compiled into a Triton cache without one.

1. The work runs on meta tensors under a stand-in for each architecture. Triton's own launch path specialises every
   launch (divisible by 16, equal to one, 64-bit, aligned, smaller than 2 GiB) and is stopped before it compiles.
2. What it asked for, each distinct specialisation once, is compiled by parallel processes.
3. The work runs again on the finished cache; a launch that compiles anything now is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
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

# Of a block, on every architecture; the first is sm_100's alone.
_TENSOR_MEMORY_COLUMNS = 512
_MOST_THREADS = 1024

Work = Callable[[], object]
"""Calls of operators or of a model on meta tensors."""


@dataclass(frozen=True)
class Specialization:
    """One kernel as one launch configuration and one kind of arguments need it.

    Attributes:
        architecture: a name in `ARCHITECTURES`.
        module, kernel: where the Triton function is.
        data: Triton's own serialisation of signature, constants, attributes and options, as JSON. That forgets the
            classes of named tuples, which kernels take for arguments; hence
        arguments: signature, constants and attributes, pickled.
    """

    architecture: str
    module: str
    kernel: str
    data: str
    arguments: bytes = field(compare=False, repr=False)


@dataclass(frozen=True)
class Failure:
    """A specialisation that cannot run: it does not compile, or needs more than its architecture has."""

    specialization: Specialization
    reason: str


def compile_ahead(
    work: Sequence[Work],
    architectures: Sequence[str],
    cache: Path,
    processes: int | None = None,
    track: Callable[[Iterable[None], int], Iterable[None]] = lambda steps, total: steps,
) -> tuple[list[Specialization], list[Failure]]:
    """Compile what `work` launches on `architectures` into the Triton cache `cache`.

    Args:
        work: what launches the kernels; each is run in this process, for each architecture.
        architectures: names in `ARCHITECTURES`.
        cache: a folder in the layout of TRITON_CACHE_DIR; made if it is not there, else added to. Triton remembers the
            absolute paths of its files: use the cache where it was made, or `relocate` it.
        processes: how many compile at once; by default one for each CPU.
        track: shows progress; given an iterable of as many steps as the number it is given.

    Returns:
        Every specialisation, and those that failed.
    """
    specializations = list(dict.fromkeys(s for name in architectures for s in specializations_of(work, name)))
    failures: list[Failure] = []
    steps = _compile_all(specializations, cache.absolute(), processes or os.cpu_count() or 1)
    for failure in track(steps, len(specializations)):  # type: ignore[arg-type]
        if failure is not None:
            failures.append(failure)
    return specializations, failures


def specializations_of(work: Sequence[Work], architecture: str) -> list[Specialization]:
    """Each distinct specialisation that `work` asks for on `architecture`; nothing is compiled."""
    found: dict[Specialization, None] = {}

    def keep(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        arguments = pickle.dumps((compile["signature"], compile["constants"], compile["configs"][0]))
        data = compile["specialization_data"]
        found[Specialization(architecture, fn.module, fn.name, data, arguments)] = None
        return True  # stops the launch here

    previous, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, keep
    try:
        with stand_in(architecture), kernels_of_meta_operators():
            for run in work:
                run()
    finally:
        triton.knobs.runtime.jit_cache_hook = previous
    return list(found)


@contextlib.contextmanager
def triton_cache(folder: Path) -> Iterator[None]:
    """Make `folder` Triton's cache within the block."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder.absolute())
        yield


def compiled_by(work: Sequence[Work], architectures: Sequence[str], cache: Path) -> list[str]:
    """Names of the kernels that a GPU of each architecture would still have to compile for `work`, given `cache`.

    Every launch goes through Triton's own launch path, up to the driver. Must run where the kernels have not been
    launched before: Triton keeps those in memory.
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


def relocate(cache: Path, new_home: Path) -> None:
    """Prepare `cache` to be used at the absolute path `new_home`, on this machine or another one."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        moved = {name: str(new_home / group.parent.name / Path(path).name) for name, path in paths.items()}
        group.write_text(json.dumps({"child_paths": moved}))


def reduce_to_launches(cache: Path) -> None:
    """Delete from `cache` what a launch does not need: sources and intermediate representations."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        kept = {name: path for name, path in paths.items() if Path(name).suffix in (".json", ".cubin", ".hsaco")}
        group.write_text(json.dumps({"child_paths": kept}))
        for name in set(paths) - set(kept):
            (group.parent / name).unlink(missing_ok=True)


@contextlib.contextmanager
def compiler(cache: Path, processes: int) -> Iterator[Callable[[Specialization], Future[str | None]]]:
    """Processes that compile into `cache` what they are handed: a call promises why it cannot run, None if it can.

    What has not been begun when the block is left is given up. LLVM ends its process where it does not know on: that is
    the reason then, and another process takes the place of that one.
    """
    mine = threading.local()
    started: list[ProcessPoolExecutor] = []

    def compile_by_my_process(specialization: Specialization) -> str | None:
        if not hasattr(mine, "process"):
            # Not forked: LLVM's and torch's threads do not survive that.
            mine.process = ProcessPoolExecutor(1, get_context("spawn"), _use_cache, (str(cache),))
            started.append(mine.process)
        try:
            return mine.process.submit(_compile, specialization).result()
        except BrokenProcessPool:
            del mine.process
            return "the compiler ended its process; its last output says why"

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
    """Compile one specialisation into the cache; returns why it cannot run, if it cannot."""
    with stand_in(specialization.architecture):
        try:
            kernel = _specialize(_find(specialization), specialization)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    compile_launcher(kernel)
    return _what_it_lacks(kernel.metadata, ARCHITECTURES[specialization.architecture])


def _what_it_lacks(metadata: Any, architecture: Architecture) -> str | None:
    """What a kernel needs more of than there is, and Triton would refuse to launch it for; registers ptxas heeds."""
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
    """What `JITFunction.preload` does with JSON, from pickled arguments; returns the compiled kernel."""
    device = triton.runtime.driver.active.get_current_device()
    backend = function.device_caches[device][3]
    known = json.loads(specialization.data)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in known["options"].items()}
    signature, constants, attributes = pickle.loads(specialization.arguments)
    return function._do_compile(
        known["key"], signature, device, constants, backend.parse_options(options), attributes, warmup=True
    )


def _find(specialization: Specialization) -> JITFunction:
    function = getattr(importlib.import_module(specialization.module), specialization.kernel)
    while not isinstance(function, JITFunction):  # heuristics wrap the function
        function = function.fn
    return function
