"""CUDA graphs: the kernels of a step, recorded once and launched again together, with no Python in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastformer.backends import selected_backend, use_triton

Result = TypeVar("Result")


class Recorder(Protocol):
    """Makes graphs of steps, which take nothing and give tensors."""

    def warm_up(self, step: Callable[[], Result]) -> Result:
        """Take a step as it is."""

    def record(self, step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Take a step down without running it; gives what runs it, and the result that each run writes anew."""


class StepGraphs:
    """Steps that are taken again and again: each the first time as it is, from the second time on as a graph.

    What a step reads and writes lies in tensors that stay where they are, nothing of it on the host. The first time
    compiles kernels and sets libraries up, which is impossible while a graph is recorded; and what never comes again
    is never recorded. All graphs share their memory: a step's result holds until the next step.

    Args:
        recorder: makes the graphs.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    def run(self, key: Hashable, step: Callable[[], Result]) -> Result:
        """Take a step; `key` is different for steps that launch other kernels."""
        if key not in self._seen:
            self._seen.add(key)
            return self._recorder.warm_up(step)
        if key not in self._graphs:
            self._graphs[key] = self._recorder.record(step)
        replay, result = self._graphs[key]
        replay()
        return result


class CudaRecorder:
    """Records steps as `torch.cuda.CUDAGraph`s of one device, which share a pool of memory.

    >>> recorder = CudaRecorder(torch.device("cuda"))
    >>> y = recorder.warm_up(lambda: x * 2)
    >>> replay, y = recorder.record(lambda: x * 2)
    >>> replay()
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # PyTorch's own stream for this would be of the device that was first recorded on.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], Result]) -> Result:
        """On the stream of the recordings: a backward goes back to the streams of what it finds from before."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step()
        current.wait_stream(self._stream)
        return result

    def record(self, step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Other threads, such as those that load data, may do as they like meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # Weights that autocast has cast and kept are gone when it ends, and the graph would still read them.
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = step()
        torch.clear_autocast_cache()
        return graph.replay, result


def why_no_graph(model: nn.Module, device: torch.device) -> str | None:
    """Why steps of `model` cannot be recorded, to follow "since"; None if they can."""
    if device.type != "cuda":
        return f"the model is on {device}"
    elsewhere = {str(tensor.device) for tensor in _tensors(model)} - {str(device)}
    if elsewhere:
        return f"parts of the model are on {', '.join(sorted(elsewhere))}"
    if not use_triton(torch.empty(0, device=device)):
        return "PyTorch's implementations (backend 'torch', or no triton) read lengths on the host"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"the model's {name or 'forward'} has hooks, which would run no more"
    return None


def recorded_state(models: Iterable[nn.Module]) -> Hashable:
    """What a recorded step of these models cannot follow: where weights are, and modes that choose kernels."""
    places = tuple(tensor.data_ptr() for model in models for tensor in _tensors(model))
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    precision = torch.get_float32_matmul_precision()
    return places, autocast, precision, torch.are_deterministic_algorithms_enabled(), selected_backend()


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
