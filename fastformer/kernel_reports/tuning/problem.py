"""A call whose launch configuration is tuned, and the sizes of such calls."""

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
"""Computes results from the arguments. It may write a result over an argument."""


@dataclass(frozen=True)
class Problem:
    """A call that stands for a class of shapes.

    Attributes:
        group: the user's name for the operation.
        operation: the operation whose configuration is tuned.
        case: a description of the call.
        dtype: the dtype of all tensors without a fixed dtype.
        tensors: makes the arguments of the call.
        call: the call itself.
        head_dim: the size of attention's heads, the greater one where values are narrower; 0 for other operations.
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
    """The sizes of the calls. The call of a class of shapes has a size near the class's upper end, or a larger size.

    Attributes:
        tokens, width: the shape of the activations between layers.
        lengths: sequence lengths of attention.
        head_dims: head sizes of attention.
        wide_head_dims: further ones, of keys and of values. They are measured only at the first length.
        columns: lengths of the rows that are normalised.
        classes: numbers of classes of cross-entropy.
        caches: caches of decoding, each as (sequences, keys of each sequence).
        latent_caches: the same for multi-head latent attention, in which the values are a part of the keys.
        products: feed-forward blocks, each as (tokens, depth).
    """

    tokens: int
    width: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    wide_head_dims: tuple[tuple[int, int], ...]
    columns: tuple[int, ...]
    classes: tuple[int, ...]
    caches: tuple[tuple[int, int], ...]
    latent_caches: tuple[tuple[int, int], ...]
    products: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """The number of elements of the activations."""
        return self.tokens * self.width


FULL = Sizes(
    tokens=16384,
    width=2048,
    lengths=(8192, 2048, 512),
    head_dims=(128, 64),
    # Gemma 4's global layers, and the multi-head latent attention of DeepSeek-V2 before it is absorbed.
    wide_head_dims=((512, 512), (192, 128)),
    columns=(4096, 1024, 2048, 8192, 16384, 512, 256),
    classes=(131072, 65536),
    caches=((8, 16384), (1, 32768), (64, 4096)),
    latent_caches=((8, 16384),),
    products=tuple(product((4 * TOKEN_CLASSES[-1], *reversed(TOKEN_CLASSES)), (*DEPTH_CLASSES, 2 * DEPTH_CLASSES[-1]))),
)
# Sizes for Triton's interpreter.
TINY = Sizes(
    tokens=32,
    width=32,
    lengths=(32,),
    head_dims=(16,),
    wide_head_dims=((32, 16),),
    columns=(48,),
    classes=(96,),
    caches=((1, 64),),
    latent_caches=((1, 64),),
    products=((32, 32),),
)
