"""Run the steps one after the other, each in a separate process, within a time that is never exceeded."""

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
# Seconds from a step's deadline to SIGTERM, and from SIGTERM to SIGKILL.
_GRACE = 3.0
_PATIENCE = 1.0


@dataclass(frozen=True)
class Known:
    """A step and the name of its module."""

    module: str
    step: Step


@dataclass(frozen=True)
class Place:
    """The settings of all steps.

    Attributes:
        out: the folder of the records, of the log, and of other files of the steps.
        device: the device that does the work.
        dry: whether sizes are tiny.
        variables: environment variables of the steps' processes, in addition to those of this process.
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
    """Run `steps`, which write their findings into the records.

    Args:
        steps: the steps, in order.
        place: the settings of all steps.
        end: the `time.monotonic()` at which the last step must have ended.
        say: called with the name of each step that has ended.
    """
    waiting: list[subprocess.Popen[bytes]] = []
    try:
        for number, known in enumerate(steps):
            # The next step's process does its imports while this one works.
            waiting += [_process(each, place) for each in steps[number:][len(waiting) : 2]]
            seconds = share(end - time.monotonic(), [each.step for each in steps[number:]])
            with _ended(waiting.pop(0)) as process:
                _turn(process, known.step.name, seconds, place)
            say(known.step.name)
    finally:
        for process in waiting:
            _end(process)


def share(left: float, steps: Sequence[Step]) -> float:
    """The seconds for the first of `steps`, if `left` seconds are left for all. The others get what it does not use."""
    return max(0.0, left) * steps[0].seconds / sum(step.seconds for step in steps)


def _process(known: Known, place: Place) -> subprocess.Popen[bytes]:
    """Start the process of a step, which waits for its turn. It leads a group, so its own processes end with it."""
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
    """Let a step work for at most `seconds`, and record its end."""
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
    with contextlib.suppress(BrokenPipeError):  # the process has ended before its turn
        process.stdin.write(f"{seconds}\n".encode())
        process.stdin.flush()


def _cause(status: int, name: str, seen: int, place: Place) -> str:
    """The reason why a step failed: its own entry, or else the signal or exit status and the last printed line."""
    for entry in entries(place.records)[seen:]:
        if entry.get("step") == name and "case" not in entry and entry.get("error"):
            return str(entry["error"])
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}; last line printed: {_last_line(place.log)}"


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_bytes()[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()


def _modules(place: Place) -> int:
    """The number of Triton's extension modules in the cache, such as launchers, which a C compiler builds."""
    cache = place.variables.get("TRITON_CACHE_DIR")
    return sum(1 for _ in Path(cache).glob("*/*.so")) if cache else 0


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process, and end it with all processes that it started at the end of the block."""
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        # A process that waits for a broken GPU may never end. The other steps still run.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
