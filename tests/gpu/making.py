"""Tensors for the tests on a GPU: of real sizes, or of tiny ones in a dry run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


def dry_with(taken: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return the values of a parameter; a dry run uses only those `taken`, which at tiny sizes stand for all."""
    return [value if value in taken else pytest.param(value, marks=pytest.mark.real) for value in values]


@dataclass(frozen=True)
class Maker:
    """A maker of tensors on one device, the same in every run.

    Attributes:
        dry: whether sizes are tiny.
        device: where the tensors are.
        random: the generator of their values.
    """

    dry: bool
    device: torch.device
    random: torch.Generator

    def size(self, real: int, tiny: int) -> int:
        """Return `real`, or `tiny` in a dry run."""
        return tiny if self.dry else real

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.random, device=self.device, dtype=dtype).mul_(scale)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.random, device=self.device, dtype=dtype)

    def booleans(self, *shape: int, share: float) -> torch.Tensor:
        """Return random booleans, each True with probability `share`."""
        return torch.rand(shape, generator=self.random, device=self.device) < share

    def tensor(self, values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def ends(self, lengths: list[int]) -> torch.Tensor:
        """Return the boundaries of packed sequences of these lengths."""
        return self.tensor([0, *lengths], torch.int64).cumsum(0).to(torch.int32)
