"""The sources of keys and values in a forward: the packed tokens themselves, or one of Hugging Face's caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from fastformer.nn import Packing
from fastformer.ops.attention.attention import attention
from fastformer.ops.attention.weights import attention_weights
from fastformer.ops.rotary import rotary

SourceProjection = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from the encoder's output (..., hidden_size) to keys and values (..., kv_heads, head_dim)."""


class AttentionPattern(NamedTuple):
    """The settings of a block's attention.

    Attributes:
        causal: whether later tokens are hidden.
        window: the numbers of visible tokens to the left and to the right, as in `fastformer.attention`.
        scale: the scale of the scores; None for 1 / sqrt(head_dim).
        dropout_p: the probability of dropping a weight, in training.
        rotary: cosines and sines, each (positions, rotary_dim / 2).
        alibi_slopes: (heads,).
        relative_bias: (heads, 2 * max_distance + 1).
    """

    causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | None
    dropout_p: float
    rotary: tuple[Tensor, Tensor] | None = None
    alibi_slopes: Tensor | None = None
    relative_bias: Tensor | None = None

    @property
    def knows_positions(self) -> bool:
        """Whether a query's position in its sequence matters."""
        placed = (self.window, self.rotary, self.alibi_slopes, self.relative_bias)
        return self.causal or any(each is not None for each in placed)

    def arguments(self, training: bool) -> dict[str, Any]:
        """Return the arguments of `fastformer.attention`."""
        arguments = self._asdict()
        del arguments["rotary"]
        return arguments | {"dropout_p": self.dropout_p if training else 0.0}


class AttentionRecord:
    """A record of the attention weights of a forward, recomputed from the fused attention's log-sum-exp.

    Weights are (batch, heads, queries, keys), before dropout and without gradient. For packed sequences the numbers of
    queries and keys are those of the longest sequence; entries beyond a sequence's end are zero.

    Args:
        heads: the heads to record; None for all.

    Attributes:
        own: each block's weights among the tokens, by the block's number.
        source: each block's weights for the encoder's output, by the block's number.
    """

    def __init__(self, heads: Sequence[int] | None = None) -> None:
        self.heads = heads
        self.own: dict[int, Tensor] = {}
        self.source: dict[int, Tensor] = {}

    def attend(
        self, weights: dict[int, Tensor], layer: int, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor:
        """Compute `attention` and record its weights as those of `layer` in `weights`, which is `own` or `source`."""
        attended, lse = attention(query, key, value, return_lse=True, **arguments)
        del arguments["dropout_p"]
        weights[layer] = attention_weights(query, key, lse, heads=self.heads, **arguments)
        return attended


class AttentionContext(Protocol):
    """The functions that a block's attention calls. Tokens are (tokens, heads, head_dim), in the input's order."""

    def self_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        """Attention among the tokens and earlier ones; returns (tokens, heads, head_dim)."""

    def cross_attention(
        self, layer: int, query: Tensor, source: SourceProjection, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        """Attention to the encoder's output; returns (tokens, heads, head_dim)."""


class PackedContext(NamedTuple):
    """Whole sequences, one after the other.

    Attributes:
        packing: the boundaries of the sequences.
        position_ids: (total_tokens,).
        encoded: the encoder's output, (source_tokens, hidden_size).
        source: the boundaries of its sequences.
        record: records the attention weights; None for no record.
        queries: the boundaries of the querying tokens, if these are not all tokens.
    """

    packing: Packing
    position_ids: Tensor
    encoded: Tensor | None = None
    source: Packing | None = None
    record: AttentionRecord | None = None
    queries: Packing | None = None

    def self_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        cu_seqlens, max_seqlen = self.packing
        if pattern.rotary is not None:
            query, key = rotary(query, key, *pattern.rotary, position_ids=self.position_ids, cu_seqlens=cu_seqlens)
        arguments = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen, **pattern.arguments(training)}
        if self.queries is not None:
            arguments |= {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
            arguments |= {"cu_seqlens_q": self.queries.cu_seqlens, "max_seqlen_q": self.queries.max_seqlen}
        if self.record is not None:
            return self.record.attend(self.record.own, layer, query, key, value, **arguments)
        attended = attention(query, key, value, **arguments)
        assert isinstance(attended, Tensor)
        return attended

    def cross_attention(
        self, layer: int, query: Tensor, source: SourceProjection, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        assert self.encoded is not None and self.source is not None
        key, value = source(self.encoded)
        arguments = {
            "cu_seqlens_q": self.packing.cu_seqlens,
            "max_seqlen_q": self.packing.max_seqlen,
            "cu_seqlens_k": self.source.cu_seqlens,
            "max_seqlen_k": self.source.max_seqlen,
            **pattern.arguments(training),
        }
        if self.record is not None:
            return self.record.attend(self.record.source, layer, query, key, value, **arguments)
        attended = attention(query, key, value, **arguments)
        assert isinstance(attended, Tensor)
        return attended


class CachedContext:
    """New tokens of a dense batch, and earlier ones in one of Hugging Face's caches, for its generation.

    Args:
        cache: dynamic, static or sliding; an `EncoderDecoderCache` if there is an encoder.
        batch, queries: the numbers of sequences and of new tokens of each.
        attention_mask: (batch, past + queries), non-zero for a real token; None if all are.
        position_ids: (batch, queries).
        encoded: the encoder's output, (batch, source, hidden_size).
        source_mask: (batch, source), non-zero for a real token; None if all are.
        record: records the attention weights; None for no record.
    """

    def __init__(
        self,
        cache: Cache,
        batch: int,
        queries: int,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        encoded: Tensor | None = None,
        source_mask: Tensor | None = None,
        record: AttentionRecord | None = None,
    ) -> None:
        self.cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self.source_cache = cache if isinstance(cache, EncoderDecoderCache) else None
        self.batch, self.queries = batch, queries
        self.real = _boolean_mask(attention_mask)
        self.position_ids = position_ids
        self.encoded = encoded
        self.source_real = _boolean_mask(source_mask)
        self.record = record

    def self_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        query, key, value = self._dense(query), self._dense(key), self._dense(value)
        if pattern.rotary is not None:
            query, key = rotary(query, key, *pattern.rotary, position_ids=self.position_ids)
        # A static cache's length is a tensor that the update changes, so take a copy.
        past = self.cache.get_seq_length(layer) + 0
        keys, first = self.cache.get_mask_sizes(self.queries, layer)
        key, value = self.cache.update(key, value, layer)
        arguments = pattern.arguments(training)
        if isinstance(past, int) and first + keys == past + self.queries:
            if self.real is not None:
                arguments["mask"] = self.real[:, None, None, first : first + keys]
        else:
            arguments |= self._by_position(past, keys, first, pattern)
        if self.record is not None:
            return self._tokens(self.record.attend(self.record.own, layer, query, key, value, **arguments))
        return self._tokens(attention(query, key, value, **arguments))

    def cross_attention(
        self, layer: int, query: Tensor, source: SourceProjection, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        assert self.source_cache is not None
        cache = self.source_cache.cross_attention_cache
        if self.source_cache.is_updated.get(layer):
            known = cache.layers[layer]
            assert isinstance(known, CacheLayerMixin) and known.keys is not None and known.values is not None
            key, value = known.keys, known.values
        else:
            assert self.encoded is not None
            key, value = (each.transpose(1, 2) for each in source(self.encoded))
            key, value = cache.update(key, value, layer)
            self.source_cache.is_updated[layer] = True
        arguments = pattern.arguments(training)
        if self.source_real is not None:
            arguments["mask"] = self.source_real[:, None, None, :]
        if self.record is not None:
            return self._tokens(
                self.record.attend(self.record.source, layer, self._dense(query), key, value, **arguments)
            )
        return self._tokens(attention(self._dense(query), key, value, **arguments))

    def _by_position(self, past: int | Tensor, keys: int, first: int, pattern: AttentionPattern) -> dict[str, Any]:
        """Return a mask and a bias made from positions, for a cache whose last key is not the last query's."""
        device = self.position_ids.device
        query_position = torch.arange(self.queries, device=device)[:, None] + past
        key_position = torch.arange(keys, device=device) + first
        distance = key_position - query_position
        mask = (distance <= 0) & (key_position >= 0)
        if pattern.window is not None and pattern.window[0] is not None:
            mask = mask & (distance >= -pattern.window[0])
        mask = mask[None, None]
        if self.real is not None:
            known = key_position.clamp(0, self.real.shape[1] - 1)
            mask = mask & self.real[:, known][:, None, None, :]
        bias = None
        if pattern.alibi_slopes is not None:
            bias = -pattern.alibi_slopes[None, :, None, None] * distance.abs()
        elif pattern.relative_bias is not None:
            farthest = pattern.relative_bias.shape[1] // 2
            bias = pattern.relative_bias[None, :, distance.clamp(-farthest, farthest) + farthest]
        return {
            "mask": mask,
            "bias": bias,
            "causal": False,
            "window": None,
            "alibi_slopes": None,
            "relative_bias": None,
        }

    def _dense(self, tokens: Tensor) -> Tensor:
        """Reshape (batch * queries, heads, head_dim) to (batch, heads, queries, head_dim)."""
        return tokens.unflatten(0, (self.batch, self.queries)).transpose(1, 2)

    def _tokens(self, dense: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(dense, Tensor)
        return dense.transpose(1, 2).flatten(0, 1)


def _boolean_mask(mask: Tensor | None) -> Tensor | None:
    """Return `mask` as booleans; None if nothing is padding and a check costs nothing."""
    if mask is None or (mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())):
        return None
    return mask.to(torch.bool)
