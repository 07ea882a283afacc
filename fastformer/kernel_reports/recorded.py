"""Figures recorded in a folder. There is a file for each version of triton, because every version has other figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import triton
from fastformer_kernels.launch import ARCHITECTURES

from fastformer.kernel_reports.report import Figures, as_json, from_json
from fastformer.lines import json_file


def recorded_file(folder: Path) -> Path:
    """The file of the installed version of triton."""
    return folder / f"triton-{triton.__version__}.json"


def read_figures(path: Path) -> list[Figures]:
    """Read figures from a file."""
    return from_json(json_file(path))


def write_figures(figures: Sequence[Figures], path: Path) -> None:
    """Write figures into a file, each kernel on a line of its own."""
    report = as_json(figures)
    kernels = ",\n".join(map(json.dumps, report["kernels"]))
    path.write_text(f'{{"triton": {json.dumps(report["triton"])}, "kernels": [\n{kernels}\n]}}\n')


def record(figures: Sequence[Figures], architectures: Sequence[str], path: Path) -> None:
    """Replace the recorded figures of `architectures`, and keep those of all others; sorted by architecture."""
    recorded = read_figures(path) if path.exists() else []
    kept = [entry for entry in recorded if entry.architecture not in architectures]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figures(sorted([*kept, *figures], key=lambda entry: list(ARCHITECTURES).index(entry.architecture)), path)
