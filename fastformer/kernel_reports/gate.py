"""The regression gate: compare the compiled kernels with figures kept in the repository; some must not get worse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastformer.kernel_reports.report import Figures

MOST_MORE_INSTRUCTIONS = 0.03
# Instructions from the least to the most capable. Falling to a lower step is a regression.
_PRODUCTS = (("HMMA", "v_mfma", "IMMA"), ("HGMMA",), ("UTCHMMA", "UTCQMMA"))
_COPIES = (("LDGSTS",), ("UTMALDG", "UBLKCP"))


def regressions(recorded: Iterable[Figures], current: Iterable[Figures]) -> list[str]:
    """A line for each figure that got worse, and for each kernel that is new or gone. Empty if all is well."""
    before, after = ({entry.key: entry for entry in figures} for figures in (recorded, current))
    lines = []
    for key in {**before, **after}:
        name = " ".join(key)
        if key not in after:
            lines.append(f"{name}: recorded, but no longer launched")
        elif key not in before:
            lines.append(f"{name}: launched, but not recorded")
        else:
            lines += [f"{name}: {change}" for change in _worse(before[key], after[key])]
    return lines


def unwanted_spills(figures: Iterable[Figures]) -> list[str]:
    """A line for each 16-bit attention kernel that spills on sm_90 with head_dim 64, 96, 128, 256 or 512."""
    return [
        f"{' '.join(entry.key)}: spills {entry.spill_bytes} bytes per thread"
        for entry in figures
        if entry.architecture == "sm_90"
        and re.match(r"attention/d(64|96|128|256|512)\b.*/b?float16/", entry.work)
        and entry.spill_bytes > 0
    ]


def _worse(before: Figures, after: Figures) -> list[str]:
    changes = []
    if after.spill_bytes > before.spill_bytes:
        changes.append(f"spills {before.spill_bytes} -> {after.spill_bytes} bytes per thread")
    if after.shared_memory > after.shared_limit:
        changes.append(f"needs {after.shared_memory} bytes of shared memory; the limit is {after.shared_limit}")
    if after.instructions > before.instructions * (1 + MOST_MORE_INSTRUCTIONS):
        growth = after.instructions / before.instructions - 1
        changes.append(
            f"instructions {before.instructions} -> {after.instructions} ({growth:+.1%}, at most "
            f"{MOST_MORE_INSTRUCTIONS:+.0%})"
        )
    for what, ladder in (("matrix products", _PRODUCTS), ("copies", _COPIES)):
        had, has = _rung(before, ladder), _rung(after, ladder)
        if has < had:
            changes.append(f"no longer has {what} by {' or '.join(ladder[had - 1])}")
    return changes


def _rung(figures: Figures, ladder: Sequence[tuple[str, ...]]) -> int:
    """The highest step of the ladder that the kernel's instructions reach, from 1; 0 if they reach none."""
    highest = 0
    for step, names in enumerate(ladder, 1):
        if any(instruction.startswith(names) for instruction in figures.highlights):
            highest = step
    return highest
