"""The times of importing the package and of the command's help, each in a new process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import fastformer
from fastformer.benchmarking.measurement import OURS, TIME, Goal, Measurement, Metric
from fastformer.benchmarking.study import MeasuredStudy, Setting

ABOVE = Metric("time above `import torch`", "s")
IMPORTS = {
    "import fastformer": "import torch, fastformer",
    "import every operator": "import torch; from fastformer import *",
}
HELP = "fastformer --help"
ROUNDS = 5


def measure(setting: Setting) -> Iterator[Measurement]:
    rounds = setting.rounds or (1 if setting.quick else ROUNDS)
    yield from _imports(rounds)
    yield _alone(HELP, ["--help"], rounds)
    commands = Path(fastformer.__file__).with_name("commands").glob("[a-z]*.py")
    for command in sorted(path.stem for path in commands if "bench_" not in path.stem) if not setting.quick else ():
        yield _alone(f"fastformer {command} --help", [command, "--help"], 1)


def _imports(rounds: int) -> Iterator[Measurement]:
    """Time each import, in turns with an import of PyTorch alone."""
    programs = {"PyTorch": "import torch", **IMPORTS}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():  # untimed: reads the files from the disk
        _python("-c", program)
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(_python("-c", program))
    for name in IMPORTS:
        above = [mine - torch for mine, torch in zip(seconds[name], seconds["PyTorch"], strict=True)]
        yield Measurement("startup", name, OURS, TIME, seconds[name])
        yield Measurement("startup", name, "import torch", TIME, seconds["PyTorch"])
        yield Measurement("startup", name, OURS, ABOVE, above)


def _alone(name: str, arguments: Sequence[str], rounds: int) -> Measurement:
    _python("-m", "fastformer.cli", *arguments)
    return Measurement(
        "startup", name, OURS, TIME, [_python("-m", "fastformer.cli", *arguments) for _ in range(rounds)]
    )


def _python(*arguments: str) -> float:
    """Run Python with `arguments`, and return the seconds from the start of the process to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


STUDY = MeasuredStudy(
    name="startup",
    title="importing the package, and the command's help",
    measurements=measure,
    goals=(
        Goal("import fastformer", None, ABOVE, at_most=0.3),
        Goal("import every operator", None, ABOVE, at_most=0.3),
        Goal(HELP, None, at_most=1.0),
    ),
    note="Wall-clock time of new processes, with files in the page cache. A subcommand's help is measured once.",
)
