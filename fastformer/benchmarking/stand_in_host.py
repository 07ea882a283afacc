"""Measure the host time of a call up to its launches without a GPU: until Triton's launcher has the arguments.

Run it as a module in a new process: ``python -m fastformer.benchmarking.stand_in_host``. In this process the operators
treat tensors on meta like those on a GPU, so the way from the call to the launch is the same as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import _meta_registrations

ARCHITECTURE = "sm_90"
STEP = "BERT-base, a training step of 8 x 128 tokens"
_META = torch.device("meta")
_SERVE_META = ("Meta", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class HostTime(NamedTuple):
    """The host time of a case, in µs.

    Attributes:
        case: the name of the case.
        ours: the time of our calls, up to the last launch and back.
        bare: the time of the same number of launches of a kernel without arguments.
        launches: the number of launches.
        whole: the time of a whole step with PyTorch's part; None if the case is a call.
    """

    case: str
    ours: float
    bare: float
    launches: int
    whole: float | None = None


@triton.jit
def _empty_kernel():
    """Do nothing."""


@contextmanager
def _cpp_on_meta() -> Iterator[None]:
    """Let PyTorch's own operators on meta run in C++ within the block, if there is a C++ version that serves meta.

    On a GPU they run in C++ too. `torch.empty_like` of a tensor on meta then takes 1 µs rather than 24.
    """
    python = _meta_registrations._meta_lib_dont_use_me_use_register_meta
    names = [key.split("/")[1] for key in python._op_impls]
    python._destroy()
    needed = torch.library.Library("aten", "IMPL")
    for name in names:
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key) for key in _SERVE_META):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            needed.impl(name, operator.py_kernels[torch._C.DispatchKey.Meta], "Meta")
    yield
    needed._destroy()


def operators(rounds: int, quick: bool, only: str) -> Iterator[HostTime]:
    """Yield the host time of each operator that launches kernels."""
    from fastformer.benchmarking.host_time import HostCall, best_microseconds
    from fastformer.benchmarking.launch_cases import cases
    from fastformer.benchmarking.operations import Sizes

    sizes = Sizes(8, 128, 768, 12, 3072, 30522, 1024, torch.bfloat16)
    with _launches() as launched:
        for name, operation, backward in cases(sizes, only):
            if quick and not name.startswith("softmax:"):
                continue
            call = HostCall.of(operation.run(operation.ours, sizes, _META, backward), launched)
            launches = _count(call, backward, launched)
            if launches:
                bare = HostCall(_bare(launches), (), kept=launched)
                found = best_microseconds({"ours": call, "bare": bare}, rounds, _META)
                yield HostTime(name, **found, launches=launches)


def training_step(rounds: int) -> HostTime:
    """Measure a training step: the shortest of `rounds` steps."""
    from fastformer.benchmarking.operator_time import OperatorTime

    step = _bert_step()
    with _launches() as launched:
        step()  # compiles
        launched.clear()
        step()
        launches = len(launched)
        whole = min(_microseconds(step) for _ in range(rounds))
        with OperatorTime() as ours:
            of_steps = []
            for _ in range(rounds):
                ours.clear()
                step()
                of_steps.append(ours.microseconds)
        bare = min(_microseconds(_bare(launches)) for _ in range(rounds))
    return HostTime(STEP, min(of_steps), bare, launches, whole)


def _bert_step() -> Callable[[], None]:
    """A step of BERT-base in bfloat16 with dropout, without the optimizer. One in seven tokens is predicted."""
    from fastformer.planning.model_work import Batch, arguments, known_model, meta_model

    config, kind = known_model("bert-base")
    model = meta_model(config, kind, "bf16-true").train()
    inputs = arguments(model, Batch(8, 1024, 128, 1024, 128, 1024 // 7, token_types=True))

    def step() -> None:
        loss = model(**inputs)["loss"]
        loss.backward(torch.empty_like(loss))
        model.zero_grad()

    return step


@contextmanager
def _launches() -> Iterator[list[Any]]:
    """Let calls with tensors on meta reach the stand-in's launcher within the block. Yields the list of launches."""
    from fastformer.backends import backend
    from fastformer.kernel_reports.stand_in import stand_in

    with stand_in(ARCHITECTURE) as launched, backend("triton"):
        yield launched


def _count(call: Any, backward: bool, launched: list[Any]) -> int:
    launched.clear()
    with torch.set_grad_enabled(backward):
        call.timer().timeit(1)
    return len(launched)


def _bare(launches: int) -> Callable[[], None]:
    """A function that launches a kernel without arguments `launches` times."""
    turns = (None,) * launches

    def launch() -> None:
        for _ in turns:
            _empty_kernel[(1,)]()

    return launch


def _microseconds(run: Callable[[], None]) -> float:
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e6


def main() -> None:
    """Print a `HostTime` as a line of JSON for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    from fastformer.ops.operator import direct_on_meta

    torch.set_num_threads(1)
    with direct_on_meta(), _cpp_on_meta():
        for found in operators(options.rounds, options.quick, options.only):
            print(json.dumps(found), flush=True)
        if not options.quick and options.only in STEP:
            print(json.dumps(training_step(options.rounds)))


if __name__ == "__main__":
    main()
