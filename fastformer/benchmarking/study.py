"""Studies, their cases, and the peers that do a case's work."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, TIME, Goal, Measurement, Metric
from fastformer.benchmarking.memory import MemoryOf, peak_mebibytes
from fastformer.benchmarking.timing import SHORTEST_TURN, Run, interleaved

_COMPILERS = ("g++", "clang++", "c++", "cl")


@dataclass(frozen=True)
class Setting:
    """The settings of a run of a study.

    Attributes:
        device: the device that does the work.
        quick: whether to use small sizes and few rounds, which only check that everything works.
        rounds: the number of turns of each peer; None for the study's own number.
    """

    device: torch.device
    quick: bool = False
    rounds: int | None = None


@dataclass(frozen=True)
class Peer:
    """An implementation that can do a case's work.

    Attributes:
        prepare: makes the data and the model, and returns the run that is timed. The runs' results are compared.
        packages: import names of the packages that the peer needs.
        devices: PyTorch's names of the device types that it runs on; () for all.
        compiled: whether it uses torch.compile, which needs a C++ compiler on a CPU.
    """

    prepare: Callable[[], Run]
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    compiled: bool = False

    def missing(self, device: torch.device) -> str | None:
        """The reason why the peer cannot take part; None if it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed"
        if self.devices and device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.compiled and device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
            return "a C++ compiler is not installed"
        return None


@dataclass(frozen=True)
class Case:
    """A piece of work that peers do in turns.

    Attributes:
        name: the name, unique in its study.
        peers: the peers by name; `OURS` is Fastformer.
        work: the amount of work of one run, by unit: {"tokens": 4096}.
        agree: checks the results of all peers' first runs, by name. Raises AssertionError if they differ.
        curve, axis, at: see `Measurement`.
        memory: whether memory is measured in this case, if the study measures memory. Each peer needs a new process.
    """

    name: str
    peers: dict[str, Peer]
    work: dict[str, float] = field(default_factory=dict)
    agree: Callable[[dict[str, object]], None] | None = None
    curve: str | None = None
    axis: str | None = None
    at: float | None = None
    memory: bool = True


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A question that measurements answer.

    Attributes:
        name: the name on the command line.
        title: a title of one line.
        goals: the goals on a CPU, at full size.
        note: explanations that a reader of the tables needs.
    """

    name: str
    title: str
    goals: Sequence[Goal] = ()
    note: str = ""

    @abstractmethod
    def measure(self, setting: Setting) -> Iterator[Measurement]:
        """Measure, and yield each measurement as soon as it is made."""


@dataclass(frozen=True, kw_only=True)
class MeasuredStudy(Study):
    """A study that measures with its own function."""

    measurements: Callable[[Setting], Iterator[Measurement]]

    def measure(self, setting: Setting) -> Iterator[Measurement]:
        return self.measurements(setting)


@dataclass(frozen=True, kw_only=True)
class TimedStudy(Study):
    """A study in which peers do the work of each case in turns.

    Attributes:
        cases: makes the cases for a setting. Each measurement of memory on a CPU makes them again in a new process.
        rounds: the number of turns of each peer, unless the setting has another number.
        shortest_turn: see `interleaved`.
        memory: what counts as a peer's memory; None if memory is not measured.
        conclusions: yields further measurements. They are measured in another way, or computed from the others, such as
            the predictions of a fitted model.
    """

    cases: Callable[[Setting], Iterable[Case]]
    rounds: int = 5
    shortest_turn: float = SHORTEST_TURN
    memory: MemoryOf | None = None
    conclusions: Callable[[Setting, Sequence[Measurement]], Iterator[Measurement]] | None = None

    def measure(self, setting: Setting) -> Iterator[Measurement]:
        rounds = setting.rounds or (2 if setting.quick else self.rounds)
        measured = []
        for case in self.cases(setting):
            for measurement in self._measure(case, rounds, setting):
                measured.append(measurement)
                yield measurement
        if self.conclusions is not None:
            yield from self.conclusions(setting, measured)

    def _measure(self, case: Case, rounds: int, setting: Setting) -> Iterator[Measurement]:
        absent = {name: reason for name, peer in case.peers.items() if (reason := peer.missing(setting.device))}
        timed = interleaved(
            {name: peer.prepare for name, peer in case.peers.items() if name not in absent},
            rounds,
            setting.device,
            case.agree,
            may_fail=lambda name: name != OURS,
            shortest_turn=SHORTEST_TURN if setting.quick else self.shortest_turn,
        )
        absent |= timed.failures
        for name in case.peers:
            yield self._measurement(case, name, TIME, timed.seconds.get(name, []), absent.get(name))
        if self.memory is not None and case.memory:
            if setting.device.type == "cpu":  # the compiler's memory would count as the program's
                absent |= {
                    name: "on a CPU it includes the compiler's" for name, peer in case.peers.items() if peer.compiled
                }
            for name in case.peers:
                values = [] if name in absent else [self._peak(case, name, self.memory, setting)]
                yield self._measurement(case, name, PEAK_MEMORY, values, absent.get(name))

    def _peak(self, case: Case, peer: str, memory: MemoryOf, setting: Setting) -> float:
        """Peak MiB of a peer's run of a case. On a CPU it is measured in a new process.

        Raises:
            RuntimeError: the process failed. The message has its error.
        """
        if setting.device.type == "cuda":  # the allocator counts exactly, so no new process is needed
            return peak_mebibytes(case.peers[peer].prepare, memory, setting.device)
        what = (self.name, case.name, peer, memory, str(setting.device), "quick" if setting.quick else "full")
        command = [sys.executable, "-m", "fastformer.benchmarking.memory_process", *what]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{peer} failed in {self.name}, {case.name}: {done.stderr.strip()[-2000:]}")
        return float(done.stdout.split()[-1])

    def _measurement(
        self, case: Case, peer: str, metric: Metric, values: Sequence[float], missing: str | None
    ) -> Measurement:
        return Measurement(
            self.name, case.name, peer, metric, values, case.work, case.curve, case.axis, case.at, missing
        )
