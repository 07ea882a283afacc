"""Decoding steps on a CPU by PyTorch's own functions, without the operators' checks and dispatch.

In steps of a few rows, the operators' checks and dispatch cost as much as a layer's work other than matrix products.
Here such work is done once for each step, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer.backends import use_triton
from fastformer.generation.cache import ContiguousCache
from fastformer.generation.context import DecodeContext
from fastformer.models.context import AttentionPattern, SourceProjection
from fastformer.nn import LayerNorm
from fastformer.ops.rotary import rotary

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class DirectLayerNorm(nn.Module):
    """A module that computes what a `LayerNorm` computes in evaluation, from its parameters."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0, return_sum: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `LayerNorm`; there is no dropout."""
        assert dropout_p == 0.0
        norm = self.norm
        total = input if residual is None else residual + input
        output = F.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return (output, total) if residual is not None and return_sum else output


class DirectContext(NamedTuple):
    """An equivalent of `DecodeContext` for one new token of each sequence, with the lengths on the host.

    Attributes:
        general: the context of the same tokens.
        groups: ranges of neighbouring sequences with equal lengths, and these lengths.
        positions: (batch, 1), the positions of the tokens.

    Attributes:
        general: of the same tokens.
        groups: neighbouring sequences of equal lengths, and these.
        positions: (batch, 1), of the tokens.
    """

    general: DecodeContext
    groups: list[tuple[slice, int]]
    positions: Tensor

    def self_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        keys, values, _ = self.general.cache.layer(layer, self.general.batch)
        if pattern.rotary is not None:
            # Treat each token as a sequence of one.
            query, key = rotary(query[:, :, None], key[:, :, None], *pattern.rotary, position_ids=self.positions)
            query, key = query[:, :, 0], key[:, :, 0]
        left = None if pattern.window is None else pattern.window[0]
        grouped = query.view(len(query), keys.shape[1], -1, keys.shape[3])
        attended = []
        for rows, length in self.groups:
            seen = slice(0 if left is None else max(0, length - left), length + 1)
            keys[rows, :, length] = key[rows]
            values[rows, :, length] = value[rows]
            attended.append(
                _attention(grouped[rows], keys[rows, :, seen], values[rows, :, seen], scale=pattern.scale)[0]
            )
        return (attended[0] if len(attended) == 1 else torch.cat(attended)).reshape(query.shape)

    def cross_attention(
        self, layer: int, query: Tensor, source: SourceProjection, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        return self.general.cross_attention(layer, query, source, pattern, training)


def direct(general: DecodeContext, position_embedding: str) -> DecodeContext | DirectContext:
    """Return a faster equivalent of `general`, or `general` itself if there is none."""
    cache = general.cache
    if (
        general.queries > 1
        or general.new_lengths is not None
        or not isinstance(cache, ContiguousCache)
        or position_embedding in ("alibi", "relative")
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return general
    keys = cache.layer(0, general.batch).keys
    if keys.device.type != "cpu" or keys.dtype != torch.float32 or use_triton(keys):
        return general
    return DirectContext(general, list(_equal(general.lengths.tolist())), general.lengths[:, None])


def _equal(lengths: list[int]) -> Iterator[tuple[slice, int]]:
    stop = 0
    for length, equal in itertools.groupby(lengths):
        start, stop = stop, stop + len(list(equal))
        yield slice(start, stop), length
