"""Host time of a call: measured in an otherwise empty loop on one thread; the best of many turns counts."""

from __future__ import annotations

import gc
import time
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.variable import Variable
from torch.utils._pytree import tree_leaves

from fastformer.benchmarking.calls import Call, Function
from fastformer.benchmarking.timing import threads, wait

# The most calls of a turn: a GPU's queue holds about a thousand launches, and each of our calls has a few. Then the
# seconds of a turn.
_MOST_CALLS, _SECONDS_OF_A_TURN = 100, 0.005


# The function behind `torch.autograd.grad` and `backward`. Their own 10 to 20 µs are spent once in a step, not once
# for each operator.
_run_backward = Variable._execution_engine.run_backward


@dataclass(frozen=True)
class HostCall:
    """A function and its arguments, which are made once.

    Attributes:
        function, inputs: the function, which is called as `function(*inputs)`.
        gradients: the gradients of its outputs; None for no backward.
        kept: a list that grows with every call. It is emptied before each turn.
    """

    function: Function
    inputs: Sequence[Any]
    gradients: Sequence[Tensor] | None = None
    kept: list[Any] | None = None

    @classmethod
    def of(cls, call: Call, kept: list[Any] | None = None) -> HostCall:
        """Make a `HostCall` of `call`. It has less overhead: a `Call` inspects its arguments and results."""
        return cls(call.function, tuple(call.inputs), call.gradients, kept)

    def timer(self) -> timeit.Timer:
        """A timer of a loop of calls. It counts CPU time of all threads: on a GPU the backward has its own thread."""
        names = {
            "call": self.function,
            "inputs": self.inputs,
            "kept": [] if self.kept is None else self.kept,
            "gc": gc,
        }
        statement = "call(*inputs)"
        if self.gradients is not None:
            parts = tree_leaves(list(self.inputs))
            leaves = [each for each in parts if isinstance(each, Tensor) and each.requires_grad]
            names |= {
                "backward": _run_backward,
                "gradients": tuple(self.gradients),
                "leaves": tuple(leaves),
            }
            # One output, or a tuple of them.
            outputs = f"({statement},)" if len(self.gradients) == 1 else statement
            statement = f"backward({outputs}, gradients, False, False, leaves, accumulate_grad=False)"
        # timeit turns garbage collection off, but its time belongs to a call.
        return timeit.Timer(statement, "kept.clear(); gc.enable()", time.process_time, names)


def best_microseconds(calls: Mapping[str, HostCall], rounds: int, device: torch.device) -> dict[str, float]:
    """The shortest time of each call in µs. Calls take turns. The shortest time counts, because other work adds time.

    Calls without a backward run without gradients, as in an evaluation.
    """
    timers = {name: call.timer() for name, call in calls.items()}
    backward = any(call.gradients is not None for call in calls.values())
    with threads(1), torch.set_grad_enabled(backward):
        # The first calls compile and fill caches.
        for timer in timers.values():
            timer.timeit(2)
        repeats = {name: _calls_of_a_turn(timer, device) for name, timer in timers.items()}
        found: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                found[name].append(_seconds(timer, repeats[name], device))
    return {name: 1e6 * min(each) for name, each in found.items()}


def _calls_of_a_turn(timer: timeit.Timer, device: torch.device) -> int:
    most = _MOST_CALLS if device.type == "cuda" else 100 * _MOST_CALLS
    return max(1, min(most, int(_SECONDS_OF_A_TURN / max(_seconds(timer, 10, device), 1e-7))))


def _seconds(timer: timeit.Timer, calls: int, device: torch.device) -> float:
    wait(device)
    taken = timer.timeit(calls)
    wait(device)
    return taken / calls
