"""Runs of pytest in processes forked from one that has imported the tests' dependencies, but not the tested code."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# The interpreter's switch must be set before triton is imported.
os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["numpy", "torch", "triton", "transformers", "hypothesis.strategies", "lightning.pytorch", "datasets"]
)


def pytest_in(tree: Path, tests: list[str], seconds: int) -> tuple[int, str]:
    """Run pytest, and return its status and what it printed."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"--timeout={seconds}"]
    printed = tree / "printed.txt"
    process = _CONTEXT.Process(target=_run_pytest, args=(tree, [*options, *tests], printed))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, printed.read_text()


def _run_pytest(tree: Path, arguments: list[str], printed: Path) -> None:
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    tests = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = f"{tree}:{tree / 'kernels'}"
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), str(tree / "kernels"), *(path for path in sys.path if not path.startswith(tests))]
    status = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(status)
