"""The report of a run: Markdown with a picture for each study, next to the results in JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastformer import markdown
from fastformer.benchmarking.comparison import Change
from fastformer.benchmarking.crossovers import comparisons
from fastformer.benchmarking.measurement import Verdict, verdicts
from fastformer.benchmarking.results import Results
from fastformer.benchmarking.studies import load
from fastformer.benchmarking.tables import change_rows, crossover_rows, environment_rows, study_tables, verdict_rows

RESULTS, _REPORT = "results.json", "report.md"


def report_files(folder: Path, studies: Iterable[str]) -> list[Path]:
    """The files that a run of these studies may write into a folder."""
    pictures = [f"{name}{kind}.png" for name in studies for kind in ("", "-ratios")]
    return [folder / name for name in (RESULTS, _REPORT, *pictures)]


def judged(results: Results) -> list[Verdict]:
    """The verdicts on all goals of the studies in `results`. Goals are only for full sizes on a CPU."""
    if results.quick or results.environment.gpu:
        return []
    return [
        verdict
        for name, measurements in results.studies.items()
        for verdict in verdicts(load(name).goals, measurements)
    ]


def write_report(results: Results, folder: Path, changes: Sequence[Change] = ()) -> None:
    """Write ``report.md``, and a PNG for each study that compares something, into `folder`."""
    from fastformer.benchmarking.pictures import draw

    sections = []
    if results.quick:
        sections.append("**Small sizes and few rounds, to check that everything works: do not publish these figures.**")
    sections.append(environment_rows(results.environment.rows()).markdown())
    if goals := judged(results):
        sections += ["## Goals", verdict_rows(goals).markdown()]
    if changes:
        sections += ["## Changes", change_rows(changes).markdown()]
    for name, measurements in results.studies.items():
        study = load(name)
        sections += [f"## {name}: {study.title}", study.note] if study.note else [f"## {name}: {study.title}"]
        sections += [rows.markdown() for rows in study_tables(measurements, results.environment.device)]
        if compared := comparisons(measurements):
            sections.append(crossover_rows(compared).markdown())
        for picture in draw(measurements, study.goals, study.title, folder / f"{name}.png"):
            sections.append(markdown.picture(study.title, picture))
        sections.append(f"Took {results.seconds[name]:,.0f} s.")
    markdown.write_report(folder / _REPORT, "Benchmarks", sections)
