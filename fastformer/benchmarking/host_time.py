"""What a call costs the host: in a loop with nothing around it, on one thread, the best of many turns."""

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

from fastformer.benchmarking.calls import Call, Function
from fastformer.benchmarking.timing import threads, wait

# A GPU's queue holds about a thousand launches; a call of ours has a few.
_MOST_CALLS, _SECONDS_OF_A_TURN = 100, 0.005


# What `torch.autograd.grad` and `backward` come to; their own 10 to 20 µs fall on a step once, not on every operator.
_run_backward = Variable._execution_engine.run_backward


@dataclass(frozen=True)
class HostCall:
    """A function and what it is called with, made once.

    Attributes:
        function, inputs: with a star, as a caller would write it out.
        gradients: of its outputs; None: there is no backward.
        kept: grows with every call, and is emptied before each turn.
    """

    function: Function
    inputs: Sequence[Any]
    gradients: Sequence[Tensor] | None = None
    kept: list[Any] | None = None

    @classmethod
    def of(cls, call: Call, kept: list[Any] | None = None) -> HostCall:
        """The same as `call`, which looks at what it gets and gives back."""
        return cls(call.function, tuple(call.inputs), call.gradients, kept)

    def timer(self) -> timeit.Timer:
        """Times a loop of it: the processor's time of all threads, as a GPU's backward has one of its own."""
        names = {
            "call": self.function,
            "inputs": self.inputs,
            "kept": [] if self.kept is None else self.kept,
            "gc": gc,
        }
        statement = "call(*inputs)"
        if self.gradients is not None:
            names |= {
                "backward": _run_backward,
                "gradients": tuple(self.gradients),
                "leaves": tuple(each for each in self.inputs if isinstance(each, Tensor) and each.requires_grad),
            }
            # One output, or a tuple of them.
            outputs = f"({statement},)" if len(self.gradients) == 1 else statement
            statement = f"backward({outputs}, gradients, False, False, leaves, accumulate_grad=False)"
        # timeit would leave out what a call's garbage costs.
        return timeit.Timer(statement, "kept.clear(); gc.enable()", time.process_time, names)


def best_microseconds(calls: Mapping[str, HostCall], rounds: int, device: torch.device) -> dict[str, float]:
    """Of one of each of the calls, which take turns: what else the machine does only ever adds to it.

    Calls without a backward run without gradients, as those of an evaluation.
    """
    timers = {name: call.timer() for name, call in calls.items()}
    backward = any(call.gradients is not None for call in calls.values())
    with threads(1), torch.set_grad_enabled(backward):
        # The first ones compile, and fill caches.
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
