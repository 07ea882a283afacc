"""Store and show the launch configurations that were measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING

from fastformer.console import Table
from fastformer.files import atomic_file

if TYPE_CHECKING:
    from fastformer.kernel_reports.tuning.measurement import Finding, Unmeasured


_NOT_LAUNCHED = (
    "not launched: configurations that do not compile, need more than the GPU has, hang, or give wrong results."
)


def store_plans(path: Path, architecture: str, measured: dict[str, dict[str, int]]) -> None:
    """Add configurations measured on `architecture` with this version of triton to the file, atomically.

    The architecture's configurations that another version of triton measured are removed. A damaged file, or one of
    another format, is reported on standard error and replaced.

    Raises:
        OSError: the file cannot be written.
    """
    import triton
    from fastformer_kernels.configurations import FORMAT, read_plans

    try:
        architectures = read_plans(path)
    except ValueError as error:
        print(f"fastformer tune: {error}; the file is replaced", file=sys.stderr)
        architectures = {}
    before = architectures.get(architecture, {"triton": None, "configurations": {}})
    kept = before["configurations"] if before["triton"] == triton.__version__ else {}
    architectures[architecture] = {"triton": triton.__version__, "configurations": {**kept, **measured}}
    with atomic_file(path) as file:
        file.write(json.dumps({"format": FORMAT, "architectures": architectures}, indent=2, sort_keys=True).encode())


def summary(findings: Sequence[Finding | Unmeasured]) -> Table:
    """A table with a row for each operation. The note lists the problems that could not be measured."""
    from fastformer.kernel_reports.tuning.measurement import Unmeasured

    by_operation: dict[str, list[Finding]] = {}
    lost = []
    for finding in findings:
        if isinstance(finding, Unmeasured):
            lost.append(f"{finding.problem.case} could not be measured: {finding.reason}.")
        else:
            by_operation.setdefault(finding.problem.operation, []).append(finding)
    rows = []
    for operation, found in by_operation.items():
        best = max(found, key=lambda finding: finding.gain)
        faster = [finding for finding in found if finding.winner != finding.default]
        mean = exp(sum(log(finding.gain) for finding in found) / len(found))
        failed = sum(len(finding.failures) for finding in found)
        rows.append(
            (
                operation,
                f"{len(faster)} of {len(found)}",
                f"{mean:.2f}x",
                f"{best.gain:.2f}x",
                best.problem.case if faster else "",
                f"{failed}",
            )
        )
    return Table(
        ("operation", "classes with a faster configuration", "mean gain", "best gain", "at", "not launched"),
        rows,
        "lrrrlr",
        note=" ".join([_NOT_LAUNCHED, *lost]),
    )
