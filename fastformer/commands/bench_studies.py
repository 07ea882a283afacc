"""The command ``fastformer bench``: compare everything with its peers, in one run."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fastformer.arguments import CommandParser, chosen_device
from fastformer.benchmarking.comparison import changes
from fastformer.benchmarking.crossovers import comparisons
from fastformer.benchmarking.environment import environment
from fastformer.benchmarking.measurement import Measurement
from fastformer.benchmarking.report import RESULTS, judged, report_files, write_report
from fastformer.benchmarking.results import Results, load_results
from fastformer.benchmarking.studies import STUDIES, load
from fastformer.benchmarking.study import Setting
from fastformer.benchmarking.tables import Rows, change_rows, crossover_rows, number, study_tables, verdict_rows
from fastformer.console import Table
from fastformer.files import OVERWRITE_HELP, check_out

_DESCRIPTION = """\
Compare Fastformer with its peers: they do the same work in turns, in one run, and must get the same result. Peers that
are not installed are named. Writes results.json, report.md and a picture for each study into a folder.
"""
_EPILOG = """\
Ratios are medians over the rounds. A speed of 2 x means that the peer took twice the time of fastformer.
Exit status 1 if a goal is missed (on a CPU, at full size), or if --compare finds a regression.

examples:
  fastformer bench                                      all studies
  fastformer bench generation linear-cross-entropy      two of them
  fastformer bench --quick                              small sizes: does everything run?
  fastformer bench --out runs/new --compare runs/bench/results.json
  fastformer bench --resume                             the studies that a killed run had not finished
  fastformer bench gpu --help                           a benchmark for a few minutes on a GPU
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer bench``.

    Args:
        arguments: the command line after ``bench``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    options = _parser().parse_args(arguments)
    if options.list:
        for name in STUDIES:
            print(f"{name:<22} {load(name).title}")
        return
    unknown = [name for name in options.studies if name not in STUDIES]
    if unknown:
        raise ValueError(f"studies must be among {', '.join(STUDIES)}; got {', '.join(unknown)}")
    if not (options.resume and (options.out / RESULTS).exists()):
        check_out(report_files(options.out, options.studies or STUDIES), options.overwrite)
    old = load_results(options.compare) if options.compare else None
    results = _run(options)
    found = list(changes(old, results)) if old else []
    write_report(results, options.out, found)
    goals = judged(results)
    if goals:
        _show(verdict_rows(goals), "goals")
    regressions = [change for change in found if change.regression]
    if regressions:
        _show(change_rows(regressions), f"worse than in {options.compare}")
    print(f"{options.out / 'report.md'}   {time.monotonic() - begin:,.0f} s in all")
    if regressions or any(goal.met is False for goal in goals):
        raise SystemExit(1)


def _run(options: argparse.Namespace) -> Results:
    """Run the studies, and save the results after each."""
    device = chosen_device(options.device)
    path = options.out / RESULTS
    results = Results(environment(device), options.quick)
    if options.resume and path.exists():
        results = load_results(path)
        if results.quick != options.quick:
            raise ValueError(f"--quick must be the same as in the run to resume, {path}")
    for name in options.studies or STUDIES:
        if name in results.studies:
            print(f"{name}: finished before")
            continue
        study = load(name)
        print(f"\n--- {name}: {study.title}")
        began = time.monotonic()
        measured = []
        for measurement in study.measure(Setting(device, options.quick, options.rounds)):
            _say(measurement)
            measured.append(measurement)
        results.studies[name] = measured
        results.seconds[name] = time.monotonic() - began
        results.save(path)
        for place, rows in enumerate(study_tables(measured, results.environment.device)):
            _show(rows, "" if place else study.note)
        if compared := comparisons(measured):
            _show(crossover_rows(compared), "who is better where")
    return results


def _say(measurement: Measurement) -> None:
    """Print progress to stderr, because a study may take minutes."""
    value = number(measurement.median) if measurement.values else f"not measured: {measurement.missing}"
    what = f"{measurement.metric.name} {value} {measurement.metric.unit if measurement.values else ''}"
    print(f"  {measurement.case}: {measurement.peer}: {what}", file=sys.stderr, flush=True)


def _show(rows: Rows, title: str) -> None:
    align = "".join("l" if place < 2 else "r" for place in range(len(rows.headings)))
    print(f"\n{Table(rows.headings, rows.rows, align, title)}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"some of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="show what each study measures, and stop")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds; not for publication")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--rounds", type=_positive, help="number of turns of each peer (default: each study's own)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="earlier results: show regressions")
    parser.add_argument("--resume", action="store_true", help="keep the finished studies in --out")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
