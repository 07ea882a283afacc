"""The selected backend is right in concurrent threads and tasks, in autograd's threads and in compiled code."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastformer
from fastformer import backends
from fastformer.backends import selected_backend

pytestmark = [pytest.mark.cpu, pytest.mark.quick]


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_blocks_within_blocks() -> None:
    assert selected_backend() == "auto"
    with fastformer.backend("torch"):
        with pytest.raises(KeyError), fastformer.backend("triton"):
            assert selected_backend() == "triton"
            raise KeyError
        assert selected_backend() == "torch"
        with pytest.raises(ValueError, match="backend must be one of auto, triton, torch; got 'cuda'"):
            fastformer.backend("cuda").__enter__()
        assert selected_backend() == "torch"
    assert selected_backend() == "auto"


def test_overlapping_blocks_of_threads() -> None:
    """Each thread sees its own backend, also where the block that is entered first is left first."""
    barrier = threading.Barrier(2)
    seen: dict[str, list[str]] = {"torch": [], "triton": []}

    def run(name: str, first: bool) -> None:
        if not first:
            barrier.wait()
        with fastformer.backend(name):
            if first:
                barrier.wait()
            barrier.wait()
            seen[name].append(selected_backend())
            if not first:
                barrier.wait()
        if first:
            barrier.wait()
        seen[name].append(selected_backend())

    threads = [threading.Thread(target=run, args=arguments) for arguments in (("torch", True), ("triton", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"torch": ["torch", "auto"], "triton": ["triton", "auto"]}
    assert selected_backend() == "auto"
    assert backends._latest is None


def test_other_threads_and_tasks_keep_theirs() -> None:
    with fastformer.backend("torch"):
        assert in_thread(selected_backend) == "auto"
        assert in_thread(lambda: contextvars.copy_context().run(selected_backend)) == "auto"

    async def task(name: str) -> list[str]:
        with fastformer.backend(name):
            await asyncio.sleep(0)
            inside = selected_backend()
        return [inside, selected_backend()]

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(task("torch"), task("triton")))

    assert asyncio.run(both()) == [["torch", "auto"], ["triton", "auto"]]


class Nested(torch.autograd.Function):
    """A backward that calls backward again, so deep that PyTorch continues in its own threads."""

    seen: list[tuple[int, str]]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        Nested.seen.append((threading.get_ident(), selected_backend()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Nested.apply(x, ctx.depth - 1).sum().backward()
        return gradient, None


def backends_of_autograd() -> set[str]:
    Nested.seen = []
    Nested.apply(torch.ones(1, requires_grad=True), 62).sum().backward()
    assert len({thread for thread, _ in Nested.seen}) > 1
    return {name for _, name in Nested.seen}


def test_threads_of_autograd_have_the_callers() -> None:
    assert backends_of_autograd() == {"auto"}
    with fastformer.backend("torch"):
        assert backends_of_autograd() == {"torch"}
        assert in_thread(backends_of_autograd) == {"auto"}
        with fastformer.backend("triton"):
            assert backends_of_autograd() == {"triton"}
        assert backends_of_autograd() == {"torch"}
    assert backends_of_autograd() == {"auto"}


def test_compiled_code_follows() -> None:
    def number(x: torch.Tensor) -> torch.Tensor:
        return x + {"auto": 1, "torch": 2, "triton": 3}[selected_backend()]

    torch._dynamo.reset()
    compiled = torch.compile(number, backend="eager", fullgraph=True)
    zero = torch.zeros(())
    assert compiled(zero) == 1
    for name, expected in (("torch", 2), ("triton", 3), ("torch", 2)):
        with fastformer.backend(name):
            assert compiled(zero) == expected
        assert compiled(zero) == 1
