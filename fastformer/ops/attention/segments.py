"""Split a call of attention into dense problems, for the implementation in PyTorch.

Each is a (batch, heads, sequence, head_dim) problem without padding. It is one packed sequence, one sequence with a key
length, or the whole call. Neighbouring sequences of equal lengths form one problem.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.attention.score_mod import score_mod_of

from fastformer.ops.attention.block_mask import listed_columns, shown_in_rows

NEGATIVE_INFINITY = float("-inf")


class Segment(NamedTuple):
    """A dense problem: some queries of neighbouring sequences of equal lengths, and the keys they may attend to.

    Tensors of the whole call come as (batch, heads, sequence, head_dim), packed ones with a batch of one.

    Attributes:
        arguments: the arguments of the whole call.
        batch: the range of sequences.
        query_tokens, key_tokens: the range of all their queries and keys along the whole call's sequence dimension.
        queries, keys: the range of queries and keys within each sequence.
        offset: a query's own position minus its index.
        prefix: the number of first keys to which the right limit does not apply.
    """

    arguments: AttentionArguments
    batch: slice
    query_tokens: slice
    key_tokens: slice
    queries: slice
    keys: slice
    offset: int
    prefix: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of sequences, queries and keys."""
        return size(self.batch), size(self.queries), size(self.keys)

    @property
    def limited(self) -> bool:
        """Whether a query's position, or a block mask, limits the keys it may attend to."""
        a = self.arguments
        return a.right != UNBOUNDED or a.left != UNBOUNDED or a.chunk > 0 or a.query_lists is not None

    def of_queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take this segment's part of the queries, or of a tensor with their layout, as a view with its own batch."""
        return self._part(tensor, self.query_tokens, self.queries)

    def of_keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take this segment's part of the keys, or of a tensor with their layout, as a view with its own batch."""
        return self._part(tensor, self.key_tokens, self.keys)

    def of_scores(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take this segment's part of a (batch, heads, queries, keys) tensor, whose dimensions of size one
        broadcast."""
        return cut_dim(cut_dim(cut_dim(tensor, 0, self.batch), 2, self.queries), 3, self.keys)

    def by_queries(self, rows: int) -> Iterator[Segment]:
        """Split into parts of `rows` queries, each with the keys that the limits allow."""
        for start in range(self.queries.start, self.queries.stop, rows):
            queries = slice(start, min(start + rows, self.queries.stop))
            yield self._replace(queries=queries, keys=self._reach(queries))

    def by_sequences(self, count: int) -> Iterator[Segment]:
        """Split into parts of `count` sequences."""
        for start in range(self.batch.start, self.batch.stop, count):
            batch = slice(start, min(start + count, self.batch.stop))
            if not self.arguments.packed:
                yield self._replace(batch=batch)
                continue
            first, last = start - self.batch.start, batch.stop - self.batch.start
            m, n = size(self.query_tokens) // size(self.batch), size(self.key_tokens) // size(self.batch)
            query_tokens = slice(self.query_tokens.start + first * m, self.query_tokens.start + last * m)
            key_tokens = slice(self.key_tokens.start + first * n, self.key_tokens.start + last * n)
            yield self._replace(batch=batch, query_tokens=query_tokens, key_tokens=key_tokens)

    def distance(self, device: torch.device) -> torch.Tensor:
        """The distance from each query's own position to each key, (queries, keys); positive for later keys."""
        queries = torch.arange(self.queries.start + self.offset, self.queries.stop + self.offset, device=device)
        return torch.arange(self.keys.start, self.keys.stop, device=device) - queries[:, None]

    def bias(self, device: torch.device) -> torch.Tensor | None:
        """The float32 sum of all biases added to the scores before masking: 4-D, broadcasting to them; None if none."""
        a = self.arguments
        parts = [] if a.bias is None else [widened(self.of_scores(a.bias))]
        if a.alibi_slopes is not None:
            slopes = cut_dim(a.alibi_slopes, 0, self.batch)
            parts.append(self.distance(device).abs() * -slopes[:, :, None, None])
        if a.relative_bias is not None:
            reach = a.relative_bias.shape[1] // 2
            place = self.distance(device).clamp(-reach, reach) + reach
            parts.append(a.relative_bias.float()[None, :, place])
        return functools.reduce(torch.add, parts) if parts else None

    def allowed(self, device: torch.device) -> torch.Tensor | None:
        """The keys that each query may attend to by mask and position; 4-D boolean, or None for all keys."""
        a, queries, keys = self.arguments, self.queries, self.keys
        conditions = [] if a.mask is None else [self.of_scores(a.mask)]
        if a.query_lists is not None and a.query_bits is not None:
            conditions.append(shown_in_rows(a.query_lists, a.query_bits, self.batch, queries, keys.stop)[..., keys])
        nearest, farthest = keys.start - (queries.stop - 1 + self.offset), keys.stop - 1 - queries.start - self.offset
        right = a.right != UNBOUNDED and farthest > a.right
        left = a.left != UNBOUNDED and nearest < -a.left
        # The diagonal of the queries' own positions.
        own = queries.start + self.offset - keys.start
        if right:
            near = torch.ones(size(queries), size(keys), dtype=torch.bool, device=device).tril_(own + a.right)
            if self.prefix:
                near[:, : max(0, self.prefix - keys.start)] = True
            conditions.append(near[None, None])
        if left:
            far = torch.ones(size(queries), size(keys), dtype=torch.bool, device=device).triu_(own - a.left)
            conditions.append(far[None, None])
        if a.chunk:
            key = torch.arange(keys.start, keys.stop, device=device)
            query = torch.arange(queries.start + self.offset, queries.stop + self.offset, device=device)
            conditions.append((key // a.chunk == query[:, None] // a.chunk)[None, None])
        return functools.reduce(torch.logical_and, conditions) if conditions else None

    def change(self, scores: torch.Tensor) -> torch.Tensor:
        """Apply the call's `ScoreMod`, if it has one, to scores (batch, heads, queries, keys)."""
        if self.arguments.score_mod is None:
            return scores
        reference = score_mod_of(self.arguments.score_mod).reference
        if reference is None:
            raise ValueError("score_mod needs its reference on a CPU, and with the backend torch")
        heads = slice(0, scores.shape[1])
        parts = (self.batch, heads, self.queries, self.keys)
        indices = [torch.arange(part.start, part.stop, device=scores.device) for part in parts]
        changed = reference(scores, *(index.view(-1, *(1,) * (3 - place)) for place, index in enumerate(indices)))
        if not isinstance(changed, torch.Tensor):
            raise TypeError(f"score_mod's reference must return a tensor; got {type(changed).__name__}")
        if changed.shape != scores.shape or changed.dtype != scores.dtype:
            raise ValueError(
                f"score_mod's reference must return the scores' shape and dtype, {tuple(scores.shape)} and "
                f"{scores.dtype}; got {tuple(changed.shape)} and {changed.dtype}"
            )
        return changed

    def visible(self, device: torch.device) -> torch.Tensor | None:
        """The keys that each query sees by mask, position and bias; 4-D boolean, or None for all keys."""
        return visible_by(self.bias(device), self.allowed(device))

    def _part(self, tensor: torch.Tensor, tokens: slice, within: slice) -> torch.Tensor:
        if not self.arguments.packed:
            return tensor[self.batch, :, within]
        count = size(self.batch)
        if count == 1:
            return tensor.narrow(2, tokens.start + within.start, size(within))
        each = tensor[0].narrow(1, tokens.start, size(tokens)).unflatten(1, (count, size(tokens) // count))
        return each.transpose(0, 1)[:, :, within]

    def _reach(self, queries: slice) -> slice:
        """A range of keys that has all those which the `queries` may attend to by position or by a block mask."""
        a, low, high = self.arguments, self.keys.start, self.keys.stop
        first, last = queries.start + self.offset, queries.stop - 1 + self.offset
        if a.right != UNBOUNDED:
            high = min(high, max(last + a.right + 1, self.prefix))
        if a.left != UNBOUNDED:
            low = max(low, first - a.left)
        if a.chunk:
            low, high = max(low, first // a.chunk * a.chunk), min(high, (last // a.chunk + 1) * a.chunk)
        if a.query_lists is not None:
            first_listed, end_listed = listed_columns(a.query_lists, self.batch, queries)
            low, high = max(low, first_listed), min(high, end_listed)
        low = min(low, self.keys.stop)
        return slice(low, max(low, high))


def segments(query: torch.Tensor, key: torch.Tensor, arguments: AttentionArguments) -> Iterator[Segment]:
    """Yield the call as dense problems; neighbouring sequences of equal lengths are one."""
    if query.numel() == 0:
        return
    batch = arguments.batch(query)
    prefixes = [0] * batch if arguments.prefix_lengths is None else arguments.prefix_lengths.tolist()
    if arguments.cu_seqlens_q is not None and arguments.cu_seqlens_k is not None:
        q_bounds, k_bounds = arguments.cu_seqlens_q.tolist(), arguments.cu_seqlens_k.tolist()
        q_lengths, k_lengths = ([b - a for a, b in itertools.pairwise(bounds)] for bounds in (q_bounds, k_bounds))
    else:
        q_bounds, k_bounds = [0] * (batch + 1), [0] * (batch + 1)
        q_lengths, k_lengths = [query.shape[2]] * batch, [key.shape[2]] * batch
        if arguments.key_lengths is not None:
            k_lengths = arguments.key_lengths.tolist()
    start = 0
    for (m, n, prefix), run in itertools.groupby(zip(q_lengths, k_lengths, prefixes, strict=True)):
        stop = start + sum(1 for _ in run)
        if m:
            yield Segment(
                arguments=arguments,
                batch=slice(start, stop),
                query_tokens=slice(q_bounds[start], q_bounds[stop]),
                key_tokens=slice(k_bounds[start], k_bounds[stop]),
                queries=slice(0, m),
                keys=slice(0, n),
                offset=n - m if arguments.bottom_right else 0,
                prefix=prefix,
            )
        start = stop


def whole_as_segment(query: torch.Tensor, arguments: AttentionArguments) -> Segment:
    """Return a dense call without lengths as one segment."""
    m, n = arguments.max_seqlen_q, arguments.max_seqlen_k
    offset = n - m if arguments.bottom_right else 0
    everything = slice(0, 0)
    return Segment(
        arguments, slice(0, query.shape[0]), everything, everything, slice(0, m), slice(0, n), offset, prefix=0
    )


def visible_by(bias: torch.Tensor | None, allowed: torch.Tensor | None) -> torch.Tensor | None:
    """The keys that each query sees: a bias of -inf hides a key like a mask does, even where the score is NaN."""
    if bias is None:
        return allowed
    shown = bias != NEGATIVE_INFINITY
    return shown if allowed is None else shown & allowed


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def size(part: slice) -> int:
    return part.stop - part.start


def cut_dim(tensor: torch.Tensor, dim: int, cut: slice) -> torch.Tensor:
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, cut.start, size(cut))


def as_dense(tensor: torch.Tensor) -> torch.Tensor:
    """View a packed (total_tokens, heads, head_dim) tensor as dense, with a batch of one."""
    return tensor.transpose(0, 1)[None] if tensor.dim() == 3 else tensor


def dense_rows(lse: torch.Tensor) -> torch.Tensor:
    """View a packed (heads, total_tokens) log-sum-exp as dense, with a batch of one."""
    return lse[None] if lse.dim() == 2 else lse
