"""Figures of our compiled kernels, on any machine: registers, spills, shared memory, and a modelled share of peak."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastformer.benchmarking.measurement import OURS, Measurement, Metric
from fastformer.benchmarking.study import MeasuredStudy, Setting

REGISTERS = Metric("registers", "a thread")
SPILLS = Metric("spills", "bytes a thread")
SHARED = Metric("shared memory", "KiB a CTA")
RESIDENT = Metric("CTAs", "a multiprocessor", higher_is_better=True)
PEAK = Metric("modelled fraction of peak", "%", higher_is_better=True)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Operators and variants of the workload, which the regression gate uses too.
CASES = (
    ("attention", "d128-causal"),
    ("attention", "d128-causal-deterministic"),
    ("decode", "paged-1-group-4"),
    ("softmax", "1024"),
    ("norm", "layer-1024"),
    ("rotary", "half"),
)

# The bytes that a thread of public Triton kernels spills, by the kernel of ours that does the same work. The work is
# causal attention in bfloat16 with head_dim 128. Each kernel has its shipped launch configuration and is compiled by
# triton 3.9.0. Registers cannot be compared: the worst of these kernels were limited to 32.
_RIVALS: dict[tuple[str, str], dict[str, int]] = {
    ("sm_80", "attention d128-causal: attention_forward"): {
        "Triton tutorial": 0,
        "flash-attn's Triton kernel": 123,
        "FlagGems": 16,
        "flash-linear-attention": 15,
    },
    ("sm_90", "attention d128-causal: attention_forward"): {
        "Triton tutorial": 0,
        "flash-attn's Triton kernel": 46,
        "FlagGems": 0,
        "flash-linear-attention": 0,
    },
    # These kernels compute all gradients at once.
    ("sm_80", "attention d128-causal: key_value_gradient"): {"Triton tutorial": 3637, "FlagGems": 4204},
    ("sm_90", "attention d128-causal: key_value_gradient"): {
        "Triton tutorial": 447,
        "flash-attn's Triton kernel": 146,
        "FlagGems": 493,
    },
    # These kernels compute the query's gradient in a separate kernel.
    ("sm_80", "attention d128-causal-deterministic: key_value_gradient"): {"flash-linear-attention": 10},
    ("sm_90", "attention d128-causal-deterministic: key_value_gradient"): {"flash-linear-attention": 43},
    ("sm_80", "attention d128-causal-deterministic: query_gradient"): {"flash-linear-attention": 0},
    ("sm_90", "attention d128-causal-deterministic: query_gradient"): {"flash-linear-attention": 0},
}


def measurements(setting: Setting) -> Iterator[Measurement]:
    # Imported here, because listing the studies does not need the compiler.
    from fastformer.kernel_reports.compilation import compile_ahead
    from fastformer.kernel_reports.report import figures_of
    from fastformer.kernel_reports.workload import cases

    chosen = CASES[3:5] if setting.quick else CASES
    architectures = ("sm_90",) if setting.quick else ARCHITECTURES
    work = [
        (variant, case.run)
        for operator, variant in chosen
        for case in cases([operator], ["bfloat16"], ["aligned"])
        if case.variant == variant
        for variant in [f"{operator} {variant}"]
    ]
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        _, failures = compile_ahead([run for _, run in work], architectures, Path(folder), processes)
        if failures:
            raise RuntimeError(f"{failures[0].specialization.kernel}: {failures[0].reason}")
        for figures in figures_of(work, architectures, Path(folder), processes):
            kernel = figures.kernel.strip("_").removesuffix("_kernel")
            name = f"{figures.work}: {kernel}"
            case = f"{figures.architecture}, {name}"
            ours = {
                REGISTERS: figures.registers,
                SPILLS: figures.spill_bytes,
                SHARED: figures.shared_memory / 1024,
                RESIDENT: figures.ctas,
                PEAK: 100 * figures.peak_low,
            }
            for metric, value in ours.items():
                yield Measurement("kernels", case, OURS, metric, [float(value)])
            for rival, spills in _RIVALS.get((figures.architecture, name), {}).items():
                yield Measurement("kernels", case, rival, SPILLS, [float(spills)])


STUDY = MeasuredStudy(
    name="kernels",
    title="figures of the compiled kernels",
    measurements=measurements,
    note=(
        "Read from the compiled code, in bfloat16. The fraction of peak is for no overlap between the pipes of the "
        "inner loop, by a model without latency and cache misses (`fastformer kernels report` has the upper bound "
        "too). Other kernels were recorded with triton 3.9.0 at their shipped launch configurations."
    ),
)
