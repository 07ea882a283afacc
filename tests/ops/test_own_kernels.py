"""Each backend runs its own code: `triton` launches kernels, forward and backward, and `torch` launches none."""

from __future__ import annotations

import pytest
import torch
from devices import need_kernels
from triton.runtime.interpreter import GridExecutor

import fastformer
from fastformer.registry import OPERATORS, Make

CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list of the kernels that the interpreter has run, by name."""
    names: list[str] = []
    run = GridExecutor.__call__

    def record(executor: GridExecutor, *arguments: object, **options: object) -> object:
        names.append(executor.fn.__name__)
        # The interpreter accepts any number of warps; a GPU has at most 1,024 threads in a block.
        assert options.get("num_warps", 4) in (1, 2, 4, 8, 16, 32)
        return run(executor, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    return names


@pytest.mark.cpu
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend_name", ["triton", "torch"])
def test_kernels_are_launched_by_one_backend_alone(name: str, backend_name: str, launched: list[str]) -> None:
    need_kernels()
    operator = OPERATORS[name]
    torch.manual_seed(0)
    call = operator.inputs(Make(torch.float32, CPU))
    leaves = operator.leaves(call.tensors)
    with fastformer.backend(backend_name):
        output = operator.output(operator.ours, call._replace(tensors=leaves))
        forward = len(launched)
        if output.requires_grad:
            output.sum().backward()
    backward = len(launched) - forward
    assert bool(forward) == (backend_name == "triton")
    has_kernel = output.requires_grad and operator.backward_kernel
    assert bool(backward) == (backend_name == "triton" and has_kernel)
