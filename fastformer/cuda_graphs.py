"""CUDA graphs: the kernels of a step are recorded once and then launched together, with no Python in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastformer.backends import selected_backend, use_triton

Result = TypeVar("Result")


class Recorder(Protocol):
    """Records graphs of steps. A step is a function without arguments that returns tensors."""

    def warm_up(self, step: Callable[[], Result]) -> Result:
        """Run a step without recording it."""

    def record(self, step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Record a step without running it. Returns a function that runs it, and the result that each run replaces."""


class StepGraphs:
    """Runs repeated steps: each step runs as it is the first time, and as a recorded graph from the second time on.

    A step must read and write only tensors on the device, whose addresses do not change. The first run compiles kernels
    and sets up libraries, which is impossible while a graph is recorded. A step that is run only once is never
    recorded. All graphs share their memory: a step's result is valid until the next step.

    Args:
        recorder: records the graphs.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    def run(self, key: Hashable, step: Callable[[], Result]) -> Result:
        """Run a step. Steps that launch different kernels must have different keys."""
        if key not in self._seen:
            self._seen.add(key)
            return self._recorder.warm_up(step)
        if key not in self._graphs:
            self._graphs[key] = self._recorder.record(step)
        replay, result = self._graphs[key]
        replay()
        return result


class CudaRecorder:
    """Records steps of one device as `torch.cuda.CUDAGraph`s that share a memory pool.

    >>> recorder = CudaRecorder(torch.device("cuda"))
    >>> y = recorder.warm_up(lambda: x * 2)
    >>> replay, y = recorder.record(lambda: x * 2)
    >>> replay()
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # PyTorch's default stream for recording belongs to the first device that was recorded on.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], Result]) -> Result:
        """Run a step on the stream of the recordings, because a backward runs on the streams of its earlier forward."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step()
        current.wait_stream(self._stream)
        return result

    def record(self, step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Record a step. Other threads, such as data loaders, may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # Autocast frees its cached copies of weights when it ends, but the graph would still read them.
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = step()
        torch.clear_autocast_cache()
        return graph.replay, result


def why_no_graph(model: nn.Module, device: torch.device) -> str | None:
    """The reason why steps of `model` cannot be recorded, as a clause that follows "since"; None if they can."""
    if device.type != "cuda":
        return f"the model is on {device}"
    elsewhere = {str(tensor.device) for tensor in _tensors(model)} - {str(device)}
    if elsewhere:
        return f"parts of the model are on {', '.join(sorted(elsewhere))}"
    if not use_triton(torch.empty(0, device=device)):
        return "PyTorch's implementations (backend 'torch', or no triton) read lengths on the host"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"the model's {name or 'forward'} has hooks, which a graph would not run"
    return None


def recorded_state(models: Iterable[nn.Module]) -> Hashable:
    """The state that a recording of these models depends on: addresses of weights, and modes that choose kernels."""
    places = tuple(tensor.data_ptr() for model in models for tensor in _tensors(model))
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    precision = torch.get_float32_matmul_precision()
    return places, autocast, precision, torch.are_deterministic_algorithms_enabled(), selected_backend()


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
