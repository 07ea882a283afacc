"""Checks of arguments accept sizes that are symbols, which a compiled function has after calls of several lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastformer

LENGTH = 40


def documents(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q // 16 == k // 16


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "mask": lambda: {"mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()},
    "block-mask": lambda: {"mask": fastformer.BlockMask.from_function(documents, None, None, LENGTH, LENGTH)},
    "slopes": lambda: {"alibi_slopes": torch.rand(1, 2)},
}


@pytest.fixture(autouse=True)
def forget_compiled_functions() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("argument", GIVEN)
def test_attention_after_other_lengths(argument: str) -> None:
    compiled = torch.compile(fastformer.attention, fullgraph=True, backend="eager")
    for length in (16, 24, 32):
        compiled(torch.randn(1, 2, length - 3, 8), *torch.randn(2, 1, 2, length, 8))
    tensors, given = torch.randn(3, 1, 2, LENGTH, 8).unbind(), GIVEN[argument]()
    torch.testing.assert_close(compiled(*tensors, **given), fastformer.attention(*tensors, **given))


def test_softmax_after_other_lengths() -> None:
    compiled = torch.compile(fastformer.softmax, fullgraph=True, backend="eager")
    for length in (16, 24, 32):
        compiled(torch.randn(length - 3, length))
    x, mask = torch.randn(LENGTH, LENGTH), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(compiled(x, mask=mask), fastformer.softmax(x, mask=mask))
