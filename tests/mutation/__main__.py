"""Plants faults one at a time and reports which of them no test notices.

    PYTHONPATH=tests python -m mutation --mutants 200

Every mutant is a copy of the working tree with one small fault, in which the related tests run until one fails. Results
are kept in `<out>/results.jsonl`: the same command continues where it was stopped, and `--again` tries survivors again,
after tests were written for them. See docs/mutation.md.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutation.mutants import AREAS, Mutant, draw
from mutation.processes import pytest_in
from mutation.related import related_tests

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.json")
# pytest's statuses where a test fails, a file cannot be collected, or pytest itself cannot start with the fault.
NOTICED = {1, 2, 3, 4}
# A test in pytest's summary. Its parameters may contain the dash that otherwise precedes the reason.
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - |$)", re.MULTILINE)


def main() -> int:
    options = _options()
    results = Results(options.out / "results.jsonl", again=options.again)
    mutants = draw(ROOT, options.mutants, options.seed)
    waiting = [
        mutant for mutant in mutants if mutant.key not in results.by_key and mutant.key not in results.equivalent
    ]
    trees: queue.Queue[Path] = queue.Queue()
    for number in range(options.workers):
        trees.put(copy_of_the_working_tree(options.out / f"tree-{number}"))

    def try_one(mutant: Mutant) -> None:
        tree = trees.get()
        try:
            results.add(mutant, **run_tests(tree, mutant, options.seconds))
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(options.workers) as pool:
        for _ in pool.map(try_one, waiting):
            pass
    failing = failing_without_a_fault(trees.get(), results.noticing(mutants))
    summary = results.summary(mutants) | {"tests that fail without a fault": failing}
    (options.out / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(as_text(summary))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--mutants", type=int, default=200, help="how many are drawn, evenly over the areas")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=1, help="mutants tried at a time")
    parser.add_argument("--seconds", type=int, default=120, help="time for one test; past it, it has failed")
    parser.add_argument("--out", type=Path, default=ROOT / ".mutation", help="copies of the tree, results, report")
    parser.add_argument("--again", action="store_true", help="try those that survived once more")
    return parser.parse_args()


class Results:
    """The results of all mutants so far, one line of JSON for each.

    Args:
        path: the file that keeps the results.
        again: whether to forget the mutants that survived.
    """

    def __init__(self, path: Path, again: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        self.by_key = {entry["key"]: entry for entry in entries if not (again and entry["outcome"] == "survived")}
        self.equivalent: dict[str, str] = json.loads(EQUIVALENT.read_text())

    def add(self, mutant: Mutant, **found: str | float | None) -> None:
        entry = {"key": mutant.key, "line": mutant.line, "kind": mutant.kind, **found}
        self.by_key[mutant.key] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{entry['outcome']:9} {entry['seconds']:5.0f} s  {mutant.key}  {entry['noticed_by'] or ''}", flush=True)

    def noticing(self, mutants: list[Mutant]) -> list[str]:
        """Return the tests that noticed any of the mutants, each once."""
        entries = [self.by_key[mutant.key] for mutant in mutants if mutant.key in self.by_key]
        return sorted({entry["noticed_by"] for entry in entries if entry["noticed_by"]})

    def summary(self, mutants: list[Mutant]) -> dict:
        """Return counts by area, every survivor and the equivalent mutants."""
        areas, survivors = {}, []
        for area in AREAS:
            keys = [mutant.key for mutant in mutants if mutant.path.startswith(area)]
            tried = [self.by_key[key] for key in keys if key in self.by_key and key not in self.equivalent]
            outcomes = [entry["outcome"] for entry in tried]
            areas[area] = {
                "drawn": len(keys),
                "tried": len(tried),
                "equivalent": sum(key in self.equivalent for key in keys),
                "survived": outcomes.count("survived"),
            }
            survivors += [entry for entry in tried if entry["outcome"] == "survived"]
        equivalent = {mutant.key: self.equivalent[mutant.key] for mutant in mutants if mutant.key in self.equivalent}
        return {"areas": areas, "survivors": survivors, "equivalent": equivalent}


def copy_of_the_working_tree(target: Path) -> Path:
    """Copy the files that git knows or would add, as they are now, to `target`."""
    shutil.rmtree(target, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run_tests(tree: Path, mutant: Mutant, seconds: int) -> dict[str, str | float | None]:
    """Plant one mutant in `tree`, run its tests, remove it again, and return the outcome."""
    file = tree / mutant.path
    whole = file.read_text()
    existing = {path.relative_to(tree / "tests").as_posix() for path in (tree / "tests").rglob("*")}
    tests = related_tests(mutant.path, existing)
    file.write_text(mutant.apply(whole))
    start = time.monotonic()
    try:
        status, output = pytest_in(tree, tests, seconds)
    finally:
        file.write_text(whole)
    noticed = FAILED.search(output)
    if status != 0 and status not in NOTICED and status > 0:
        raise RuntimeError(f"pytest ended with status {status} for {mutant.key}:\n{output}")
    return {
        "outcome": "survived" if status == 0 else "noticed",
        "seconds": round(time.monotonic() - start, 1),
        "noticed_by": noticed[1] if noticed else None,
    }


def failing_without_a_fault(tree: Path, tests: list[str]) -> list[str]:
    """Return those of the tests that prove nothing, because they fail without a fault too."""
    if not tests:
        return []
    status, output = pytest_in(tree, [*tests, "--maxfail=0"], seconds=600)
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with status {status} for the tests that noticed faults:\n{output}")
    return FAILED.findall(output)


def as_text(summary: dict) -> str:
    lines = [
        f"{area}: {', '.join(f'{count} {name}' for name, count in found.items())}"
        for area, found in summary["areas"].items()
    ]
    tried = sum(found["tried"] for found in summary["areas"].values())
    survivors = summary["survivors"]
    share = f" ({len(survivors) / tried:.1%})" if tried else ""
    lines += ["", f"{len(survivors)} of {tried} survived{share}:"]
    lines += [f"  {entry['kind']}, line {entry['line']}: {entry['key']}" for entry in survivors]
    lines += [f"fails without a fault, proves nothing: {test}" for test in summary["tests that fail without a fault"]]
    lines += [f"equivalent: {key}: {reason}" for key, reason in summary["equivalent"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
