"""Runs the steps one after the other, each in a process of its own, within a time that is never exceeded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastformer.benchmarking.gpu.process import RECORDS
from fastformer.benchmarking.gpu.records import append, entries
from fastformer.benchmarking.gpu.step import Step

LOG = "log.txt"
# Seconds between a step's own deadline and its end by request, and between that and its end by force.
_GRACE = 3.0
_PATIENCE = 1.0


@dataclass(frozen=True)
class Known:
    """A step and the module that has it."""

    module: str
    step: Step


@dataclass(frozen=True)
class Place:
    """Where and how steps are run.

    Attributes:
        out: folder of the records, the log, and whatever steps leave.
        device: on which their work is done.
        dry: tiny sizes.
        variables: environment variables of their processes, beside this one's own.
    """

    out: Path
    device: str
    dry: bool
    variables: dict[str, str]

    @property
    def records(self) -> Path:
        return self.out / RECORDS

    @property
    def log(self) -> Path:
        return self.out / LOG


def run_steps(steps: Sequence[Known], place: Place, end: float, say: Callable[[str], None]) -> None:
    """Run `steps`. What they find is in the records.

    Args:
        end: `time.monotonic()` at which the last of them has ended.
        say: given the name of each that has ended.
    """
    waiting: list[subprocess.Popen[bytes]] = []
    try:
        for number, known in enumerate(steps):
            # The next one imports what it needs while this one works.
            waiting += [_process(each, place) for each in steps[number:][len(waiting) : 2]]
            seconds = share(end - time.monotonic(), [each.step for each in steps[number:]])
            with _ended(waiting.pop(0)) as process:
                _turn(process, known.step.name, seconds, place)
            say(known.step.name)
    finally:
        for process in waiting:
            _end(process)


def share(left: float, steps: Sequence[Step]) -> float:
    """Seconds for the first of `steps` of those that are left for all. What it does not take, the others have."""
    return max(0.0, left) * steps[0].seconds / sum(step.seconds for step in steps)


def _process(known: Known, place: Place) -> subprocess.Popen[bytes]:
    """The process of a step, which waits for its turn. It leads a group, so that it ends with its own processes."""
    arguments = [known.module, str(place.out), place.device, *(["dry"] if place.dry else [])]
    with open(place.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fastformer.benchmarking.gpu.process", *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **place.variables},
            start_new_session=True,
        )


def _turn(process: subprocess.Popen[bytes], name: str, seconds: float, place: Place) -> None:
    """Let a step work for so long, and write down how it ended."""
    began, compiled, seen = time.monotonic(), _modules(place), len(entries(place.records))
    with open(place.log, "a") as log:
        log.write(f"=== {name}, {seconds:.0f} s\n")
    end, error = "stopped", None
    try:
        _start(process, seconds - min(_GRACE, seconds / 5))
        status = process.wait(seconds)
        end, error = ("ok", None) if status == 0 else ("failed", _cause(status, name, seen, place))
    except subprocess.TimeoutExpired:
        end, error = "timed out", f"was ended after {seconds:.0f} s"
    finally:
        taken = round(time.monotonic() - began, 1)
        append(place.records, step=name, end=end, error=error, seconds=taken, modules=_modules(place) - compiled)


def _start(process: subprocess.Popen[bytes], seconds: float) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended before its turn
        process.stdin.write(f"{seconds}\n".encode())
        process.stdin.flush()


def _cause(status: int, name: str, seen: int, place: Place) -> str:
    """Why a step failed: what it wrote down itself, else the signal or status and the last it printed."""
    for entry in entries(place.records)[seen:]:
        if entry.get("step") == name and "case" not in entry and entry.get("error"):
            return str(entry["error"])
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}; last line printed: {_last_line(place.log)}"


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_bytes()[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()


def _modules(place: Place) -> int:
    """How many of Triton's own extension modules, launchers among them, a C compiler has made in the cache."""
    cache = place.variables.get("TRITON_CACHE_DIR")
    return sum(1 for _ in Path(cache).glob("*/*.so")) if cache else 0


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended, and all that it started with it, when the block is left."""
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        # One that waits for a broken GPU may not be ended at all; the others go on.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
