"""The tables at the end of a run: a short one to print, and one with everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastformer import markdown
from fastformer.benchmarking.gpu.findings import ERROR, Finding, ceilings, findings_of, mean_ratio, worst_error
from fastformer.benchmarking.gpu.records import Entry, compiled, ends, records_of
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.tables import number

MOST_LINES = 78
WIDTH = 110
_HEADINGS = ("case", "metric", "fastformer", "of peak", "ratio", "best peer")
_WIDTHS = (36, 20, 16, 7, 6, 20)
# The largest number of lines for each step that say what went wrong.
_MOST_TROUBLES = 4

Row = tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """The part of the tables about one step."""

    heading: str
    short: list[Row]
    long: list[Row]
    troubles: list[str]


def short_table(found: Sequence[Entry]) -> str:
    """The end of each step, its first figures, and what failed, in at most `MOST_LINES` lines of `WIDTH` characters.

    A ratio above 1 means that Fastformer is better than the best peer. "Of peak" is the share of the measured ceiling.
    """
    parts = _parts(found)
    troubles = [_first(part.troubles, _MOST_TROUBLES) for part in parts]
    rooms = rooms_for([len(part.short) for part in parts], MOST_LINES - 1 - len(parts) - sum(map(len, troubles)))
    lines = [_aligned(_HEADINGS)]
    for part, trouble, room in zip(parts, troubles, rooms, strict=True):
        lines += [part.heading, *map(_aligned, part.short[:room]), *(f"  ! {line}" for line in trouble)]
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def long_table(found: Sequence[Entry]) -> str:
    """The table with everything, in Markdown."""
    lines = ["# GPU benchmark"]
    for part in _parts(found):
        lines += ["", f"## {part.heading}", *(f"- {line}" for line in part.troubles)]
        if part.long:
            headings = (*_HEADINGS[:-1], "peers")
            lines += ["", markdown.table(headings, "l" * len(headings), part.long)]
    return "\n".join(lines) + "\n"


def rooms_for(wanted: Sequence[int], room: int) -> list[int]:
    """Distribute `room` lines one by one among parts that want `wanted` lines each. Returns the lines of each part."""
    given = [0] * len(wanted)
    while room > 0 and given != list(wanted):
        for place, wish in enumerate(wanted):
            if given[place] < wish and room > 0:
                given[place] += 1
                room -= 1
    return given


def _parts(found: Sequence[Entry]) -> list[_Part]:
    most = ceilings(records_of(found, "environment"))
    missed = Counter(compiled(found))
    parts = []
    for name, end in ends(found).items():
        records = records_of(found, name)
        findings = findings_of(records)
        worst = worst_error(findings)
        main = [each for each in findings if each.metric != ERROR] + ([worst] if worst else [])
        kernels = {kernel: times for (step, kernel), times in missed.items() if step == name}
        parts.append(
            _Part(
                _heading(name, end, findings, len(records)),
                [(*_cells(each, most), _peers(each, [each.best_peer] if each.best_peer else [])) for each in main],
                [(*_cells(each, most), _peers(each, each.peers)) for each in findings],
                [*_troubles(end, records), *_compilations(kernels, end["modules"])],
            )
        )
    return parts


def _heading(name: str, end: Entry, findings: Sequence[Finding], records: int) -> str:
    heading = f"{name}: {end['end']}, {end['seconds']:.0f} s, {records} records"
    if (mean := mean_ratio(findings)) is None:
        return heading
    middle, least, most, compared = mean
    return f"{heading}; ratio to the best peer {middle:.2f} ({least:.2f} to {most:.2f}, {compared} figures)"


def _cells(finding: Finding, most: dict[str, float]) -> Row:
    """All cells of a row except the last."""
    measured = finding.ours if finding.ours is not None else finding.values[finding.best_peer or ""]
    return (
        finding.case,
        finding.metric,
        "" if finding.ours is None else f"{number(finding.ours)} {finding.unit}",
        f"{measured / most[finding.unit]:.0%}" if finding.unit in most else "",
        "" if finding.ratio is None else f"{finding.ratio:.2f}",
    )


def _peers(finding: Finding, names: Sequence[str]) -> str:
    """The peers' figures. They have the unit if there is no figure of Fastformer, which would show it."""
    unit = f" {finding.unit}" if finding.ours is None else ""
    return ", ".join(f"{number(finding.values[name])}{unit} {name}" for name in names)


def _troubles(end: Entry, records: Sequence[Entry]) -> list[str]:
    """The step's error, each reason for missing figures of Fastformer with its first case, and the missing peers."""
    cases: dict[str, list[str]] = {}
    peers: Counter[str] = Counter()
    for record in records:
        if record["value"] is None and record["peer"] == OURS:
            cases.setdefault(record["missing"] or "no reason given", []).append(f"{record['case']} {record['metric']}")
        elif record["value"] is None:
            peers[f"{record['peer']}: {record['missing']}"] += 1
    lines = [end["error"]] if end["error"] else []
    for reason, failed in cases.items():
        lines.append(f"{failed[0]}{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}: {reason}")
    if peers:
        lines.append("peers without figures: " + ", ".join(f"{peer} ({times})" for peer, times in peers.items()))
    return lines


def _compilations(kernels: dict[str, int], modules: int) -> list[str]:
    named = [f"{kernel} {times}" for kernel, times in kernels.items()]
    named += [f"{modules} C launchers"] if modules else []
    return [f"compiled during the run: {', '.join(named)}"] if named else []


def _first(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more lines in table.md"]


def _aligned(row: Row) -> str:
    cells = [
        cell[:width].ljust(width) if place in (0, 1, 5) else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, _WIDTHS, strict=True))
    ]
    return "  ".join(cells)
