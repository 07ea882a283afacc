"""What every launch goes by: the choice for the installed Triton, and the GPU that holds a tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from fastformer_kernels import launch

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6.0", "old"), ("3.8.1", "old"), ("3.9.0", "new"), ("3.10.0+git1a2b", "new"), ("4.0.0", "new")],
)
def test_the_choice_of_the_newest_triton_that_is_no_newer_counts(
    version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert launch.for_triton({(3, 9): "new", (3, 6): "old"}) == expected


def on_gpu(index: int) -> Any:
    """A tensor as far as a launch asks where it is."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))


def test_each_tensor_is_served_by_the_gpu_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        SimpleNamespace(name="A100", major=8, minor=0, multi_processor_count=108),
        SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=130),
    ]
    launch._architecture_of_gpu.cache_clear()
    monkeypatch.setattr(launch, "_has_gpu", lambda: True)
    monkeypatch.setattr(launch, "_properties", gpus.__getitem__)
    assert [launch.architecture_of(on_gpu(index)).name for index in (1, 0, 1)] == ["sm_90", "sm_80", "sm_90"]
    assert [launch.multiprocessors_of(on_gpu(index)) for index in (1, 0)] == [130, 108]
    launch._architecture_of_gpu.cache_clear()


def test_a_tensor_that_a_tool_takes_for_a_gpus_is_launched_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_gpu", lambda: False)
    assert launch.architecture_of(on_gpu(0)) is launch.INTERPRETER
    with launch.device_guard(on_gpu(0)):
        pass
