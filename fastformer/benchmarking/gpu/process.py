"""The process of one step. It imports the step, waits for its turn, and writes each finding immediately.

Run it as a module: ``python -m fastformer.benchmarking.gpu.process MODULE OUT DEVICE [dry]``. Its turn starts when it
reads a line from stdin: the number of seconds that it may take. The process ends when stdin ends, so that a killed
runner leaves nothing on the GPU.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fastformer.benchmarking.gpu.records import append, append_record
from fastformer.benchmarking.gpu.step import Setting, Step
from fastformer.console import in_a_line

RECORDS = "records.jsonl"


def main(module: str, out: Path, device: str, dry: bool) -> None:
    """Run the step. After an error, write it as the step's last entry and exit with status 1."""
    step: Step = importlib.import_module(module).STEP
    turn = sys.stdin.readline()
    if not turn:
        return
    deadline = time.monotonic() + float(turn)
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    # Write the traceback to the log if the process crashes or the time limit ends it.
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    path = out / RECORDS
    _note_compilations(path, step.name)
    try:
        for record in step.run(Setting(torch.device(device), dry, out, deadline)):
            append_record(path, step.name, record)
    except Exception as error:
        traceback.print_exc()
        append(path, step=step.name, error=in_a_line(error))
        raise SystemExit(1) from None


def _end_with_the_runner() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def _note_compilations(path: Path, step: str) -> None:
    """Record each of Fastformer's kernels that was not in the cache."""
    from fastformer.backends import HAS_TRITON

    if not HAS_TRITON:
        return
    import triton

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit and getattr(getattr(src, "fn", None), "module", "").startswith("fastformer"):
            append(path, step=step, compiled=src.name)

    triton.knobs.compilation.listener = listen


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], "dry" in sys.argv[4:])
