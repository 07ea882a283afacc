"""Attention in generation: of whole prompts, and of a few new tokens to those in a cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastformer.generation.cache import KeyValueCache
from fastformer.models.context import AttentionPattern, PackedContext, SourceProjection
from fastformer.ops.attention.attention import attention
from fastformer.ops.attention.cache import append_to_cache
from fastformer.ops.attention.decode import decode_attention
from fastformer.ops.rotary import rotary

Places = tuple[Tensor, Tensor]


class PrefillContext(NamedTuple):
    """Packed prompts, whose keys and values are stored in a cache.

    Attributes:
        packed: the prompts, with an encoder's output for their sources.
        cache, places: the cache of the prompts' tokens and the places in it.
        source_cache, source_places: the cache of the sources' tokens and the places in it.
    """

    packed: PackedContext
    cache: KeyValueCache
    places: Places
    source_cache: KeyValueCache | None = None
    source_places: Places | None = None

    def self_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        if pattern.rotary is not None:
            packed = self.packed
            query, key = rotary(
                query,
                key,
                *pattern.rotary,
                position_ids=packed.position_ids,
                cu_seqlens=packed.packing.cu_seqlens,
            )
        self.cache.write(layer, self.places, key, value)
        return self.packed.self_attention(layer, query, key, value, pattern._replace(rotary=None), training)

    def cross_attention(
        self, layer: int, query: Tensor, source: SourceProjection, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        assert self.packed.encoded is not None and self.source_cache is not None and self.source_places is not None
        key, value = source(self.packed.encoded)
        self.source_cache.write(layer, self.source_places, key, value)
        return self.packed.cross_attention(layer, query, lambda _: (key, value), pattern, training)


class DecodeContext(NamedTuple):
    """The next tokens of each sequence, equally many except for padding at the end. No method waits for a GPU.

    Attributes:
        batch, queries: the numbers of sequences, the first ones of the cache, and of new tokens of each.
        cache: keys and values; those of the new tokens are added.
        lengths: (batch,) int32, the number of earlier tokens in the cache.
        new_lengths: (batch,) int32, the number of new tokens that are not padding; None if none is padding.
        totals: (batch,) int32, the sum of both.
        source_cache: keys and values of the encoder's output.
        source_lengths: (batch,) int32, the number of tokens of each source.
    """

    batch: int
    queries: int
    cache: KeyValueCache
    lengths: Tensor
    new_lengths: Tensor | None
    totals: Tensor
    source_cache: KeyValueCache | None = None
    source_lengths: Tensor | None = None

    def self_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        query, key, value = self._dense(query), self._dense(key), self._dense(value)
        keys, values, block_table = self.cache.layer(layer, self.batch)
        cos, sin = pattern.rotary or (None, None)
        rotated = append_to_cache(
            key,
            value,
            keys,
            values,
            lengths=self.lengths,
            new_lengths=self.new_lengths,
            block_table=block_table,
            query=None if cos is None else query,
            cos=cos,
            sin=sin,
        )
        query = query if rotated is None else rotated
        if pattern.relative_bias is not None:
            # `decode_attention` has no relative bias, and `attention` has neither pages nor padding among the queries.
            assert block_table is None and self.new_lengths is None
            arguments = pattern.arguments(training)
            return self._tokens(attention(query, keys, values, key_lengths=self.totals, **arguments))
        return self._tokens(
            decode_attention(
                query,
                keys,
                values,
                lengths=self.totals,
                query_lengths=self.new_lengths,
                block_table=block_table,
                window=pattern.window,
                scale=pattern.scale,
                alibi_slopes=pattern.alibi_slopes,
            )
        )

    def cross_attention(
        self, layer: int, query: Tensor, source: SourceProjection, pattern: AttentionPattern, training: bool
    ) -> Tensor:
        assert self.source_cache is not None and self.source_lengths is not None
        keys, values, block_table = self.source_cache.layer(layer, self.batch)
        return self._tokens(
            decode_attention(
                self._dense(query),
                keys,
                values,
                lengths=self.source_lengths,
                block_table=block_table,
                causal=False,
                scale=pattern.scale,
            )
        )

    def _dense(self, tokens: Tensor) -> Tensor:
        """Reshape (batch * queries, heads, head_dim) to (batch, heads, queries, head_dim)."""
        return tokens.unflatten(0, (self.batch, self.queries)).transpose(1, 2)

    def _tokens(self, dense: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(dense, Tensor)
        return dense.transpose(1, 2).flatten(0, 1)
