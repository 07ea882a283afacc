"""The findings of a run on disk: one line of JSON for each entry, written as soon as it is known."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastformer.benchmarking.gpu.step import Record

Entry = dict[str, Any]
"""A line. It has `time`, and one of these:

- `run`: the arguments of the run. It is the first line, and there is another one for each time the run was resumed.
- `step` and the fields of a `Record`.
- `step` and `compiled`: a kernel that was not in the cache.
- `step` and `error`: the step's exception, on one line.
- `step`, `end` (ok, failed, timed out, stopped), `error`, `seconds`, `modules` (built by a C compiler): a step's end.
"""


def append(path: Path, **entry: Any) -> None:
    """Add a line, and wait until it is on the disk."""
    line = json.dumps({"time": round(time.time(), 3), **entry}, default=str) + "\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the last line is incomplete: its process was killed while it wrote
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def append_record(path: Path, step: str, record: Record) -> None:
    """Add a record of a step. A value that is not finite is stored as missing, with the value as the reason."""
    fields = asdict(record)
    if record.value is not None and not math.isfinite(record.value):
        fields |= {"value": None, "missing": record.missing or str(record.value)}
    append(path, step=step, **fields)


def entries(path: Path) -> list[Entry]:
    """All entries, without incomplete lines of processes that were killed while they wrote."""
    found: list[Entry] = []
    if not path.exists():
        return found
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def records_of(found: Sequence[Entry], step: str) -> list[Entry]:
    """The records of a step. If the step was run again, the latest record of each case, peer and metric."""
    latest = {
        (entry["case"], entry["peer"], entry["metric"]): entry
        for entry in found
        if entry.get("step") == step and "case" in entry
    }
    return list(latest.values())


def ends(found: Sequence[Entry]) -> dict[str, Entry]:
    """The last end of each step, by name."""
    return {entry["step"]: entry for entry in found if "end" in entry}


def compiled(found: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """The step and the name of each kernel that was compiled during the run."""
    return ((entry["step"], entry["compiled"]) for entry in found if "compiled" in entry)


def write_results(path: Path, found: Sequence[Entry]) -> None:
    """Write everything into one JSON file: the arguments of the runs, and the end and the records of each step."""
    steps = list(dict.fromkeys(entry["step"] for entry in found if "step" in entry))
    results = {
        "runs": [entry["run"] for entry in found if "run" in entry],
        "steps": {
            step: {
                **{key: value for key, value in ends(found).get(step, {}).items() if key not in ("step", "time")},
                "compiled": [kernel for name, kernel in compiled(found) if name == step],
                "records": [
                    {key: value for key, value in entry.items() if key != "step"} for entry in records_of(found, step)
                ],
            }
            for step in steps
        },
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
