"""A call whose launch configuration is looked for, and how large such calls are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from fastformer_kernels.plans import DEPTH_CLASSES, TOKEN_CLASSES
from torch import Tensor

Group = Literal["attention", "decode", "norm", "cross_entropy", "feed_forward", "softmax"]
GROUPS: tuple[Group, ...] = ("attention", "decode", "norm", "cross_entropy", "feed_forward", "softmax")
Tensors = Sequence[Tensor]
Results = tuple[Tensor | None, ...]
Make = Callable[[torch.device], Tensors]
"""Makes random arguments on a device."""
Call = Callable[..., Results]
"""Computes results from them, which may take an argument's place."""


@dataclass(frozen=True)
class Problem:
    """A call that stands for a class of shapes.

    Attributes:
        group: what the user calls it.
        operation: whose configuration is looked for.
        case: the call in words.
        dtype: of all tensors that have no dtype of their own.
        tensors, call: what it is done with, and the call itself.
        head_dim: of attention; 0 for other operations.
    """

    group: Group
    operation: str
    case: str
    dtype: torch.dtype
    tensors: Make
    call: Call
    head_dim: int = 0


@dataclass(frozen=True)
class Sizes:
    """How large the calls are: each class of shapes has a call of about its upper end, an open class one beyond.

    Attributes:
        tokens, width: of the activations between layers.
        lengths, head_dims: of attention.
        columns: of rows that are normalised.
        classes: of cross-entropy.
        caches: of decoding: sequences, and keys of each.
        products: of feed-forward blocks: tokens and depth.
    """

    tokens: int
    width: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    columns: tuple[int, ...]
    classes: tuple[int, ...]
    caches: tuple[tuple[int, int], ...]
    products: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Of the activations."""
        return self.tokens * self.width


FULL = Sizes(
    tokens=16384,
    width=2048,
    lengths=(8192, 2048, 512),
    head_dims=(128, 64),
    columns=(4096, 1024, 2048, 8192, 16384, 512, 256),
    classes=(131072, 65536),
    caches=((8, 16384), (1, 32768), (64, 4096)),
    products=tuple(product((4 * TOKEN_CLASSES[-1], *reversed(TOKEN_CLASSES)), (*DEPTH_CLASSES, 2 * DEPTH_CLASSES[-1]))),
)
# For the interpreter.
TINY = Sizes(
    tokens=32,
    width=32,
    lengths=(32,),
    head_dims=(16,),
    columns=(48,),
    classes=(96,),
    caches=((1, 64),),
    products=((32, 32),),
)
