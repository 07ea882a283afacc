"""The arguments of an attention call besides query, key and value. Every backend shares them: no triton is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

UNBOUNDED = -1

# A block mask's tiles have this many rows and columns, a multiple of every kernel's tile.
MASK_TILE = 128
WORD_BITS = 32
MASK_WORDS = MASK_TILE // WORD_BITS
# The numbers before the tiles of a list.
LIST_HEADER = 3

T = TypeVar("T")


class Learned(NamedTuple, Generic[T]):
    """One value for each learned argument, in the order in which operators take them."""

    bias: T
    relative: T
    alibi_slopes: T
    head_scales: T
    sinks: T


class AttentionArguments(NamedTuple):
    """The arguments of one attention call, checked and in canonical form.

    Dense tensors are (batch, heads, sequence, head_dim); with `cu_seqlens_q` and `cu_seqlens_k` they are packed,
    (total_tokens, heads, head_dim). Positions, masks and biases then count within each sequence.

    Attributes:
        mask: boolean, True = may attend, 4-D: (batch, heads, queries, keys), any of which may also be 1.
        bias: added to the scores, shaped like `mask`, any floating dtype.
        relative_bias: (heads, 2 * max_distance + 1), any floating dtype, contiguous. Its element max_distance + d is
            added, with d = key position - query position, limited to [-max_distance, max_distance].
        alibi_slopes: (1 or batch, heads) float32; adds -slope * |query position - key position|.
        head_scales: (heads,) float32; multiplies each head's scores in addition to `scale`.
        sinks: (heads,) float32; one more logit per head that takes part in the normalisation only.
        key_lengths: (batch,) int32; keys from this index on are masked. Dense only.
        prefix_lengths: (batch,) int32; `right` does not limit keys before this index.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 boundaries of the packed sequences.
        query_lists, query_bits: the lists and bits of a block mask's `by_query`, its `TileLists`. Dense only.
        key_lists, key_bits: those of its `by_key`, for the backward.
        max_seqlen_q, max_seqlen_k: the length of the longest packed sequence (dense: the sequence length).
        scale: multiplies the scores.
        left, right: how far before and after its own position a query may attend; UNBOUNDED for no limit.
        chunk: a query may attend only within its own chunk of this many positions; 0 for no limit.
        bottom_right: True if the last query is at the last key's position, False if the first is at the first key's.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        score_mod: the key of the `ScoreMod` that changes scores after the softcap.
        dropout_p: probability that a weight is dropped.
        seed: (2,) int64 on the tensors' device, the counter-based generator's seed and offset; set with `dropout_p`.
    """

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    relative_bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    head_scales: torch.Tensor | None
    sinks: torch.Tensor | None
    key_lengths: torch.Tensor | None
    prefix_lengths: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    query_lists: torch.Tensor | None
    query_bits: torch.Tensor | None
    key_lists: torch.Tensor | None
    key_bits: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    left: int
    right: int
    chunk: int
    bottom_right: bool
    softcap: float
    score_mod: str | None
    dropout_p: float
    seed: torch.Tensor | None

    @property
    def learned(self) -> Learned[torch.Tensor | None]:
        return Learned(self.bias, self.relative_bias, self.alibi_slopes, self.head_scales, self.sinks)

    def with_learned(self, learned: Sequence[torch.Tensor | None]) -> AttentionArguments:
        """The same call, with each learned argument replaced by the given one unless that is None."""
        start = self._fields.index("bias")
        fields = list(self)
        for place, tensor in enumerate(learned, start):
            fields[place] = fields[place] if tensor is None else tensor
        return AttentionArguments._make(fields)

    @property
    def loads_scores(self) -> bool:
        """True if kernels load a mask or a bias for each query and key."""
        return self.mask is not None or self.bias is not None or self.relative_bias is not None

    def for_launch(self) -> tuple[Any, ...]:
        """Return the arguments as a kept launch takes them: one value if none of them is a tensor, else one by one."""
        if (
            self.key_lengths is self.prefix_lengths is self.cu_seqlens_q is self.query_lists is None
            and self.seed is self.mask is self.bias is None
        ):
            if self.relative_bias is self.alibi_slopes is self.head_scales is self.sinks is None:
                return (self,)
        return self

    @staticmethod
    def of_launch(fields: tuple[Any, ...]) -> AttentionArguments:
        """Return the arguments from which `for_launch` made `fields`."""
        return fields[0] if len(fields) == 1 else AttentionArguments(*fields)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def batch(self, query: torch.Tensor) -> int:
        """The number of sequences."""
        return query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


class AttentionGradients(NamedTuple):
    """Gradients of a call's differentiable arguments; None for a learned one whose gradient was not asked for."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    relative_bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    head_scales: torch.Tensor | None
    sinks: torch.Tensor | None


def sum_by_distance(scores: torch.Tensor, arguments: AttentionArguments) -> torch.Tensor:
    """Sum (batch, heads, queries, keys) by head and by key position - query position, laid out like `relative_bias`."""
    assert arguments.relative_bias is not None
    heads, places = arguments.relative_bias.shape
    batch, _, queries, keys = scores.shape
    q = torch.arange(queries, device=scores.device)
    k = torch.arange(keys, device=scores.device)
    offsets = _position_offsets(arguments, batch, queries, keys, scores.device)
    distance = k - q[:, None] - offsets[:, None, None]
    place = distance.clamp(-(places // 2), places // 2) + places // 2
    head = torch.arange(heads, device=scores.device)[:, None, None]
    sums = torch.zeros(heads, places, dtype=scores.dtype, device=scores.device)
    return sums.index_put_((head, place[:, None]), scores, accumulate=True)


def _position_offsets(
    arguments: AttentionArguments, batch: int, queries: int, keys: int, device: torch.device
) -> torch.Tensor:
    """Return the position of each sequence's first query, (batch,)."""
    if not arguments.bottom_right:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if arguments.cu_seqlens_q is not None and arguments.cu_seqlens_k is not None:
        return (arguments.cu_seqlens_k.diff() - arguments.cu_seqlens_q.diff()).long()
    if arguments.key_lengths is not None:
        return arguments.key_lengths.long() - queries
    return torch.full((batch,), keys - queries, dtype=torch.int64, device=device)


def empty_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An output for `query`, with value's head_dim, in the memory layout of `empty_gradient`.

    Merging the heads afterwards then needs no copy.
    """
    return _empty_like(query, value.shape[-1])


def empty_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like `tensor`, in memory as (batch, sequence, heads, head_dim).

    It is (sequence, batch, heads, head_dim) if `tensor` has this order, PyTorch's layout without `batch_first`.
    """
    return _empty_like(tensor, tensor.shape[-1])


def _empty_like(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A tensor like `tensor` with another head_dim, in the memory layout that `empty_gradient` describes."""
    shape = tensor.shape
    if len(shape) == 3:
        return tensor.new_empty((*shape[:-1], head_dim))
    batch, heads, sequence, _ = shape
    stride_batch, _, stride_sequence, _ = tensor.stride()
    if stride_sequence > stride_batch:
        strides = (heads * head_dim, head_dim, batch * heads * head_dim, 1)
    else:
        strides = (sequence * heads * head_dim, head_dim, heads * head_dim, 1)
    return tensor.new_empty_strided((batch, heads, sequence, head_dim), strides)


def empty_lse(query: torch.Tensor) -> torch.Tensor:
    """A log-sum-exp for `query`: float32, (batch, heads, queries), or packed (heads, total_tokens)."""
    shape = query.shape
    return query.new_empty(shape[:-1] if len(shape) == 4 else (shape[1], shape[0]), dtype=torch.float32)
