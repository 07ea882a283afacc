"""What our kernels compile to, on any machine: registers, spills, shared memory, and a model's fraction of peak."""

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
# Of the workload that the regression gate knows too: an operator, and which of its variants.
CASES = (
    ("attention", "d128-causal"),
    ("attention", "d128-causal-deterministic"),
    ("decode", "paged-1-group-4"),
    ("softmax", "1024"),
    ("norm", "layer-1024"),
    ("rotary", "half"),
)

# Bytes that a thread of public Triton kernels spills, by the kernel of ours that does the same: bfloat16, head_dim 128,
# causal, each with the launch configuration that it ships with, compiled by triton 3.9.0. Their registers are no
# figure to compare: the worst of them were capped at 32.
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
    # All gradients at once.
    ("sm_80", "attention d128-causal: key_value_gradient"): {"Triton tutorial": 3637, "FlagGems": 4204},
    ("sm_90", "attention d128-causal: key_value_gradient"): {
        "Triton tutorial": 447,
        "flash-attn's Triton kernel": 146,
        "FlagGems": 493,
    },
    # The query's in a kernel of its own.
    ("sm_80", "attention d128-causal-deterministic: key_value_gradient"): {"flash-linear-attention": 10},
    ("sm_90", "attention d128-causal-deterministic: key_value_gradient"): {"flash-linear-attention": 43},
    ("sm_80", "attention d128-causal-deterministic: query_gradient"): {"flash-linear-attention": 0},
    ("sm_90", "attention d128-causal-deterministic: query_gradient"): {"flash-linear-attention": 0},
}


def measurements(setting: Setting) -> Iterator[Measurement]:
    # Here, not above: the compiler is needed by nobody who only lists the studies.
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
    title="what the kernels compile to",
    measurements=measurements,
    note=(
        "Read from the compiled code, in bfloat16. The fraction of peak is that of no overlap between the pipes of the "
        "inner loop, by a model without latency and cache misses (fastformer kernels report has both ends of its "
        "bracket). Other kernels: recorded with triton 3.9.0 at the launch configurations that they ship with."
    ),
)
