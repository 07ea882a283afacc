"""A model that continues sequences with a cache: whole prompts first, then a few tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from fastformer.generation.cache import CacheShape, ContiguousCache, KeyValueCache, PagedCache
from fastformer.generation.context import DecodeContext, PrefillContext
from fastformer.generation.devices import on_device
from fastformer.generation.direct import direct
from fastformer.models.context import PackedContext
from fastformer.models.heads.causal_lm import FastformerForCausalLM
from fastformer.models.heads.sequence_to_sequence import FastformerForSeq2SeqLM
from fastformer.nn import Packing, TransformerEmbedding
from fastformer.ops.packing import packed_positions

LanguageModel = FastformerForCausalLM | FastformerForSeq2SeqLM


class CachedModel:
    """A model, and the cache of the sequences that it continues, which are in the first slots.

    Args:
        model: in evaluation mode.
        slots: the most sequences at once.
        capacity: the most tokens of a sequence, including its prompt.
        source_capacity: the most tokens of an encoder-decoder's source.
        page_size, pages: sizes of a paged cache; None for a contiguous one.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        capacity: int,
        source_capacity: int = 0,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        config = model.config
        self.device = model.device
        dtype = next(self.decoder.parameters()).dtype
        shape = CacheShape(len(self.decoder.layers), config.kv_heads, config.size_per_head, dtype, self.device)
        self.cache: KeyValueCache
        if page_size is None:
            self.cache = ContiguousCache(shape, slots, capacity)
        else:
            assert pages is not None
            self.cache = PagedCache(shape, slots, capacity, page_size, pages)
        self.source_cache: ContiguousCache | None = None
        if config.is_encoder_decoder:
            self.source_cache = ContiguousCache(shape, slots, source_capacity)
        self.source_lengths = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self._last_position = (config.position_limit or capacity) - 1
        self._positions = torch.arange(capacity + 1, device=self.device)

    def prefill(
        self, prompts: Sequence[Sequence[int]], first_slot: int, sources: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Read prompts, and the sources of an encoder-decoder, into neighbouring slots.

        Returns:
            The logits of the next tokens, (prompts, vocab_size).
        """
        ids, positions, slots, packing = self._packed(prompts, first_slot)
        places = self.cache.places(slots, positions)
        context: PackedContext = PackedContext(packing, positions)
        source_places = None
        if sources is not None:
            assert self.source_cache is not None and isinstance(self.model, FastformerForSeq2SeqLM)
            source_ids, source_positions, source_slots, source = self._packed(sources, first_slot)
            encoded = self.model.get_encoder()(
                source_ids, cu_seqlens=source.cu_seqlens, max_seqlen=source.max_seqlen, return_dict=True
            ).last_hidden_state
            context = context._replace(encoded=encoded, source=source)
            source_places = self.source_cache.places(source_slots, source_positions)
            self.source_lengths[first_slot : first_slot + len(sources)] = source.cu_seqlens.diff()
        hidden = self.decoder.run(
            self._embed(ids, positions),
            PrefillContext(context, self.cache, places, self.source_cache, source_places),
        )
        return self._logits(hidden[packing.cu_seqlens[1:].long() - 1])

    def decode(self, tokens: Tensor, lengths: Tensor, new_lengths: Tensor | None = None) -> Tensor:
        """Continue the sequences in the first slots by some tokens each. Nothing waits for a GPU.

        Args:
            tokens: (batch, queries) int64.
            lengths: (batch,) int32, the number of earlier tokens of each sequence.
            new_lengths: (batch,) int32, the number of new tokens of each sequence; the rest are padding. None for all.

        Returns:
            The logits of the token after each, (batch, queries, vocab_size).
        """
        batch, queries = tokens.shape
        positions = lengths[:, None] + self._positions[:queries]
        if self.decoder.relative_bias is not None:
            # This attention takes no padding among the queries. Padding is written beyond the end and never read.
            new_lengths = None
        if new_lengths is not None:
            positions = positions.clamp(max=self._last_position)
        context = DecodeContext(
            batch,
            queries,
            self.cache,
            lengths,
            new_lengths,
            lengths + (queries if new_lengths is None else new_lengths),
            self.source_cache,
            self.source_lengths[:batch],
        )
        hidden = self.decoder.run(
            self._embed(tokens.flatten(), positions.flatten()), direct(context, self.model.config.position_embedding)
        )
        return self._logits(hidden).unflatten(0, (batch, queries))

    def fits(self, capacity: int, source_capacity: int) -> bool:
        """Whether sequences and sources of these sizes fit into the cache."""
        source_fits = self.source_cache is None or source_capacity <= self.source_cache.capacity
        return capacity <= self.cache.capacity and source_fits

    def clear(self) -> None:
        """Free the room of all sequences."""
        self.cache.clear()

    def move(self, source: int, target: int, tokens: int) -> None:
        """Move the sequence of `tokens` tokens in slot `source` to slot `target`."""
        self.cache.move(source, target, tokens)
        if self.source_cache is not None:
            self.source_cache.move(source, target, self.source_cache.capacity)
            self.source_lengths[target] = self.source_lengths[source]

    def _packed(self, sequences: Sequence[Sequence[int]], first_slot: int) -> tuple[Tensor, Tensor, Tensor, Packing]:
        """Return the tokens, their positions and slots, each (total_tokens,), and the sequences' boundaries."""
        ids = on_device(torch.tensor(list(chain.from_iterable(sequences)), device="cpu"), self.device)
        lengths = list(map(len, sequences))
        boundaries = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")
        cu_seqlens = on_device(boundaries, self.device)
        each = torch.arange(first_slot, first_slot + len(lengths), device="cpu")
        slots = each.repeat_interleave(torch.tensor(lengths, device="cpu"))
        positions = packed_positions(cu_seqlens, len(ids))
        return ids, positions, on_device(slots, self.device), Packing(cu_seqlens, max(lengths))

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        if isinstance(self.model, FastformerForSeq2SeqLM):
            embeddings = self.model.get_encoder().embeddings
            assert isinstance(embeddings, TransformerEmbedding)
            words = embeddings.words(ids)
            return self.decoder.embeddings(None, None, positions, inputs_embeds=words)
        return self.decoder.embeddings(ids, None, positions)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.scaled(hidden))
