"""The report on compiled kernels of each architecture: figures read from the compiled code, as data and as a table."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from fastformer_kernels.launch import ARCHITECTURES

from fastformer.console import Table
from fastformer.kernel_reports.binary import PIPES, blackwell_flops, bulk_bytes, highlights, pipe_of, read_kernel
from fastformer.kernel_reports.bounds import bounds_of
from fastformer.kernel_reports.compilation import FailedKernelsError, Track, Work, compile_ahead, triton_cache
from fastformer.kernel_reports.devices import DEVICES, resident_ctas
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import LaunchedKernel, stand_in


@dataclass(frozen=True)
class Figures:
    """The figures of a kernel that a piece of work launches on an architecture.

    Attributes:
        work, kernel, architecture: the names of the work, the kernel and the architecture.
        configuration: block sizes, warps and stages of the launch.
        registers: registers of a thread.
        spill_bytes: bytes that a thread writes to local memory because registers are full.
        shared_memory: bytes of shared memory of a CTA.
        shared_limit: the most shared memory that a CTA can have.
        ctas: CTAs that are resident on a multiprocessor.
        ctas_limit: the name of the limit that decides `ctas`.
        instructions: the number of instructions of the whole kernel.
        highlights: counts of matrix products, copies by width in bits, and spills.
        loop: instructions of the inner loop by pipe (`binary.PIPES`); those of the whole kernel if it has no loop.
        roof, peak_low, peak_high, limited_by, flops, bytes: see `bounds.Bounds`; for one iteration of the loop.
        flops_low, flops_high: the operations per second of the whole device at these bounds.
    """

    work: str
    kernel: str
    architecture: str
    configuration: dict[str, int]
    registers: int
    spill_bytes: int
    shared_memory: int
    shared_limit: int
    ctas: int
    ctas_limit: str
    instructions: int
    highlights: dict[str, int]
    loop: dict[str, int]
    roof: str
    peak_low: float
    peak_high: float
    limited_by: str
    flops: float
    bytes: float
    flops_low: float
    flops_high: float

    @property
    def key(self) -> tuple[str, str, str]:
        return self.architecture, self.work, self.kernel


def compiled_figures(
    work: Sequence[tuple[str, Work]], architectures: Sequence[str], cache: Path | None, processes: int, track: Track
) -> list[Figures]:
    """Compile every kernel that the work launches, unless the cache has it; return the figures of all.

    Args:
        work: the work and its names.
        architectures, processes, track: see `compile_ahead`.
        cache: the folder that keeps the compiled kernels; None for one that is deleted.

    Raises:
        FailedKernelsError: some kernels cannot run.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = cache or Path(folder)
        _, failures = compile_ahead([run for _, run in work], architectures, cache, processes, track)
        if failures:
            raise FailedKernelsError(failures)
        return list(figures_of(work, architectures, cache, processes))


def figures_of(
    work: Sequence[tuple[str, Work]], architectures: Sequence[str], cache: Path, processes: int
) -> Iterator[Figures]:
    """Yield the figures of every kernel that each named piece of work launches, in order.

    `cache` should already contain the compiled kernels.
    """
    for architecture in architectures:
        with triton_cache(cache), ThreadPoolExecutor(processes) as pool:
            launched = list(_launched(work, architecture))
            yield from pool.map(partial(_figures, architecture), launched)


def _launched(work: Sequence[tuple[str, Work]], architecture: str) -> Iterator[tuple[str, str, LaunchedKernel]]:
    """Yield work, name and kernel of each distinct launch. Further binaries of the same name in a work get a number."""
    with stand_in(architecture) as kernels, kernels_of_meta_operators():
        for name, run in work:
            kernels.clear()
            run()
            distinct = {kernel.metadata.hash: kernel for kernel in kernels}
            seen: Counter[str] = Counter()
            for kernel in distinct.values():
                seen[kernel.name] += 1
                number = f" ({seen[kernel.name]})" if seen[kernel.name] > 1 else ""
                yield name, kernel.name + number, kernel


def _figures(architecture: str, launch: tuple[str, str, LaunchedKernel]) -> Figures:
    work, name, kernel = launch
    resources, code = read_kernel(kernel)
    device, metadata = DEVICES[architecture], kernel.metadata
    columns = getattr(metadata, "tmem_size", 0) or 0
    ctas, ctas_limit = resident_ctas(device, metadata.num_warps, resources.registers, metadata.shared, columns)
    bounds = bounds_of(code.loop, metadata.num_warps, device, blackwell_flops(kernel, code), bulk_bytes(kernel, code))
    at_peak = bounds.flops / bounds.clocks[bounds.roof] * device.clock * device.multiprocessors
    mix = Counter(pipe_of(instruction.name) for instruction in code.loop)
    return Figures(
        work=work,
        kernel=name,
        architecture=architecture,
        configuration={
            **{name: value for name, value in _constants(kernel).items() if name.startswith("BLOCK")},
            "num_warps": metadata.num_warps,
            "num_stages": metadata.num_stages,
        },
        registers=resources.registers,
        spill_bytes=resources.spill_bytes,
        shared_memory=metadata.shared,
        shared_limit=ARCHITECTURES[architecture].shared_memory,
        ctas=ctas,
        ctas_limit=ctas_limit,
        instructions=len(code.instructions),
        highlights=highlights(code),
        loop={pipe: mix[pipe] for pipe in PIPES},
        roof=bounds.roof,
        peak_low=round(bounds.low, 4),
        peak_high=round(bounds.high, 4),
        limited_by=bounds.limited_by,
        flops=bounds.flops,
        bytes=bounds.bytes,
        flops_low=at_peak * bounds.low,
        flops_high=at_peak * bounds.high,
    )


def _constants(kernel: LaunchedKernel) -> dict[str, Any]:
    """The kernel's constants by name, without the names of the tuples that contain them."""
    return {name.rpartition(".")[2]: value for name, value in kernel.constants.items()}


def as_json(figures: Iterable[Figures]) -> dict[str, Any]:
    """The report as JSON types, with the version of triton: figures of different versions are not comparable."""
    return {"triton": triton.__version__, "kernels": [asdict(entry) for entry in figures]}


def from_json(report: dict[str, Any]) -> list[Figures]:
    return [Figures(**entry) for entry in report["kernels"]]


def as_table(figures: Sequence[Figures]) -> Table:
    """A table with a row for each kernel. The column "peak" has the lower and the upper bound of `bounds`."""
    headings = ("arch", "work", "kernel", "configuration", "regs", "spill", "shared KiB", "CTAs/SM", "instr", "in loop")
    contents = ("notable instructions", "mix of the loop %", "peak %, bound")
    return Table(
        (*headings, *contents),
        [_row(entry) for entry in figures],
        "llllrrrrrrlll",
        title="compiled kernels",
        note=_NOTE,
    )


def _row(entry: Figures) -> tuple[str, ...]:
    size = sum(entry.loop.values())
    return (
        entry.architecture,
        entry.work,
        entry.kernel.strip("_").removesuffix("_kernel"),
        " ".join(f"{name.removeprefix('BLOCK_').lower()}={value}" for name, value in entry.configuration.items()),
        str(entry.registers),
        str(entry.spill_bytes),
        f"{entry.shared_memory / 1024:.0f} of {entry.shared_limit / 1024:.0f}",
        f"{entry.ctas} ({entry.ctas_limit})",
        f"{entry.instructions:,}",
        f"{size:,}",
        " ".join(f"{name} x{count}" for name, count in entry.highlights.items()),
        " ".join(f"{pipe} {count / size:.0%}".rstrip("%") for pipe, count in entry.loop.items() if count),
        f"{entry.peak_low:.0%} to {entry.peak_high:.0%} of {entry.roof}, {entry.limited_by}",
    )


_NOTE = (
    "spill: bytes that each thread stores to memory because registers are full. peak: bounds without overlap and with "
    "perfect overlap of all pipes in the inner loop, by a model without latency, bank conflicts or cache misses "
    "(fastformer.kernel_reports.bounds); they are not predictions."
)
