"""Kernels run on the current stream, after earlier work on it, in whichever thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from gpu.calls import CALLS
from gpu.judging import SEED, Call, assert_same, output_grads, outputs_of, results, run
from gpu.making import Maker
from torch import Tensor

# About 50 ms, longer than any launch takes.
_CYCLES = 100_000_000
THREADS = 4


@contextmanager
def busy_stream(dry: bool) -> Iterator[None]:
    """Make another stream than the default current, with other work to do first, and wait for it at the end."""
    if dry:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        yield
    stream.synchronize()


def test_a_late_producer(call: Call, dry: bool) -> None:
    """Results are right when inputs are NaN until a late producer writes them on the same stream."""
    inputs, grads = call.inputs(torch.bfloat16), output_grads(call, torch.bfloat16)
    torch.manual_seed(SEED)
    expected = results(call.operator, inputs, grads)
    late = [torch.full_like(tensor, float("nan")) for tensor in (*inputs, *(grads or []))]
    torch.manual_seed(SEED)
    with busy_stream(dry):
        for tensor, values in zip(late, (*inputs, *(grads or [])), strict=True):
            tensor.copy_(values)
        late_grads = None if grads is None else late[len(inputs) :]
        actual = results(call.operator, late[: len(inputs)], late_grads)
    assert_same(actual, expected)


def in_threads(functions: list[Callable[[], list[Tensor]]]) -> list[list[Tensor]]:
    """Run each function in its own thread, all at once, and return the results; an error in one is raised."""
    found: dict[int, list[Tensor] | BaseException] = {}

    def note(number: int, function: Callable[[], list[Tensor]]) -> None:
        try:
            found[number] = function()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=note, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = []
    for number in range(len(functions)):
        result = found[number]
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def with_gradients_of_ones(call: Call) -> list[Tensor]:
    inputs = call.inputs(torch.bfloat16)
    if not call.backward:
        return results(call.operator, inputs, None)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    outputs = outputs_of(call.operator, leaves)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    return [*(output.detach() for output in outputs), *grads]


@pytest.mark.parametrize("name", ["causal attention", "rms_norm", "fused gated feed_forward", "paged decode_attention"])
def test_launches_from_several_threads(name: str, make: Maker, real_gpu: None) -> None:
    """Threads with their own streams run forward and backward at once, also with kernels not launched before."""
    calls = [CALLS[name](make) for _ in range(THREADS)]

    def on_a_stream(call: Call) -> list[Tensor]:
        with busy_stream(dry=False):
            return with_gradients_of_ones(call)

    actual = in_threads([partial(on_a_stream, call) for call in calls])
    for call, found in zip(calls, actual, strict=True):
        assert_same(found, with_gradients_of_ones(call))


def test_backward_in_another_thread(dry: bool, make: Maker) -> None:
    """Gradients are right when the forward runs in this thread on a busy stream, and another thread calls backward."""
    call = CALLS["causal attention"](make)
    grads = output_grads(call, torch.bfloat16)
    expected = run(call, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in call.inputs(torch.bfloat16)]
    with busy_stream(dry):
        outputs = call.operator(*leaves)
        (found,) = in_threads([lambda: list(torch.autograd.grad(outputs, leaves, grads))])
    assert_same(found, expected[len(outputs) :])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["softmax", "rms_norm", "causal attention", "fused feed_forward", "merge_attention"])
def test_a_device_that_is_not_current(name: str, make: Maker) -> None:
    """Results are right for tensors on the second GPU while the first is current."""
    call = CALLS[name](make)
    expected = run(call, torch.bfloat16)
    inputs, grads = call.inputs(torch.bfloat16), output_grads(call, torch.bfloat16)
    actual = results(call.operator, *([tensor.to("cuda:1") for tensor in tensors] for tensors in (inputs, grads or [])))
    assert_same([tensor.to(make.device) for tensor in actual], expected)
