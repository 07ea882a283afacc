"""The report's picture: for each architecture, a row with a roofline and the instruction mix of the inner loops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from fastformer.kernel_reports.binary import PIPES
from fastformer.kernel_reports.devices import DEVICES
from fastformer.kernel_reports.report import Figures

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#BBBBBB")


def draw(figures: Sequence[Figures], path: Path) -> None:
    """Write the picture of `figures` to `path` (PNG, PDF or SVG by its suffix)."""
    architectures = list(dict.fromkeys(entry.architecture for entry in figures))
    groups = [[entry for entry in figures if entry.architecture == name] for name in architectures]
    heights = [max(4.0, 0.26 * len(group) + 1.4) for group in groups]
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(19, sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights, "width_ratios": (2, 3)},
        layout="constrained",
    )
    for name, group, (roofline, mix) in zip(architectures, groups, axes, strict=True):
        _roofline(roofline, name, group)
        _mix(mix, name, group)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _roofline(axis: plt.Axes, architecture: str, group: Sequence[Figures]) -> None:
    device = DEVICES[architecture]
    intensities = [entry.flops / entry.bytes for entry in group if entry.bytes and entry.flops]
    x = np.geomspace(min([0.1, *intensities]) / 2, max([1e3, *intensities]) * 2, 200)
    for kind, peak in device.tensor_flops.items():
        axis.plot(x, np.minimum(peak, x * device.bandwidth) / 1e12, color="black", linewidth=1)
        axis.annotate(
            f"tensor {kind}-bit" if kind == "16" else f"tensor {kind}",
            (x[-1], peak / 1e12),
            ha="right",
            va="bottom",
            fontsize=7,
        )
    for number, entry in enumerate(group, 1):
        if not entry.bytes or not entry.flops:
            continue
        intensity, color = entry.flops / entry.bytes, _COLORS[0] if entry.roof == "tensor" else _COLORS[3]
        low, high = entry.flops_low / 1e12, entry.flops_high / 1e12
        axis.plot([intensity, intensity], [low, high], color=color, linewidth=2, marker="_", markersize=5)
        axis.annotate(str(number), (intensity, high), fontsize=7, ha="center", va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte that the loop loads and stores", ylabel="Tflop/s")
    axis.set_title(f"{architecture} ({device.name}): no overlap to perfect overlap; modelled, not measured", fontsize=9)
    axis.grid(True, which="major", linewidth=0.3)


def _mix(axis: plt.Axes, architecture: str, group: Sequence[Figures]) -> None:
    rows = np.arange(len(group))
    left = np.zeros(len(group))
    for pipe, color in zip(PIPES, _COLORS, strict=True):
        share = np.array([100 * entry.loop[pipe] / sum(entry.loop.values()) for entry in group])
        axis.barh(rows, share, left=left, color=color, label=pipe, height=0.8)
        left += share
    labels = [
        f"{number}. {entry.work}  {entry.kernel.strip('_').removesuffix('_kernel')}"
        for number, entry in enumerate(group, 1)
    ]
    axis.set_yticks(rows, labels, fontsize=7)
    axis.set_ylim(len(group) - 0.4, -0.6)
    for row, entry in enumerate(group):
        spill = f"  spills {entry.spill_bytes} B" if entry.spill_bytes else ""
        axis.text(101, row, f"{sum(entry.loop.values()):,}{spill}", va="center", fontsize=7)
    axis.set(xlim=(0, 118), xlabel="% of the inner loop's instructions; their number is at the right")
    axis.set_title(f"{architecture}: instructions of the inner loop by pipe", fontsize=9)
    axis.legend(ncols=len(PIPES), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.03), frameon=False)
