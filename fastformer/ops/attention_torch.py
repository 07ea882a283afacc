"""Attention in PyTorch: on a CPU its own flash attention wherever that can express the call, an explicit one elsewhere.

A call is cut into segments, each a dense (batch, heads, sequence, head_dim) problem without padding: one per packed
sequence, one per sequence with a key length, or the whole. The explicit path works in float32 on a few query rows at a
time, so that scores for all queries are never held at once; its backward recomputes them from the log-sum-exp.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from fastformer_kernels.attention.arguments import (
    UNBOUNDED,
    AttentionArguments,
    AttentionGradients,
    Learned,
    empty_gradient,
    empty_lse,
    empty_output,
)

from fastformer.ops.attention_dropout import dropout_keep
from fastformer.ops.autocast import without_autocast
from fastformer.ops.dropout import kept_scale, seed_words

SCORE_ELEMENTS = 1 << 22
SCORE_ELEMENTS_IN_CACHE = 1 << 18
EXPLICIT_ROWS = 64
FLASH_ROWS = 128
NEGATIVE_INFINITY = float("-inf")
# Numbers in the widest vectors of a CPU.
_VECTOR = 16
_flash_forward = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@without_autocast
def attention_forward_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; see `fastformer.attention`."""
    if _fits_flash(query, key, value, arguments) and not _hides_nan(query, arguments):
        output, lse = _flash_forward_of_all(query, key, value, arguments)
        # What is not finite may be a value that no query may see.
        if _shows_all(arguments) or is_finite(output):
            return output, lse
    output, lse = empty_output(query, value), empty_lse(query)
    dense = _as_dense(query), _as_dense(key), _as_dense(value), _as_dense(output)
    careful = query.is_cpu and not is_finite(value)
    for segment in _segments(query, key, arguments):
        _forward_explicit(*dense, _dense_rows(lse), segment, careful)
    return output, lse


def _flash_forward_of_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_one_flash_call(arguments):
        result, result_lse = _flash_forward(query, key, value, 0.0, arguments.right == 0, scale=arguments.scale)
        return _with_sequence_outside(result, query), result_lse.contiguous()
    output, lse = empty_output(query, value), empty_lse(query)
    dense = _as_dense(query), _as_dense(key), _as_dense(value), _as_dense(output)
    for segment in _segments(query, key, arguments):
        _forward_flash(*dense, _dense_rows(lse), segment)
    return output, lse


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether nothing in a tensor on a CPU is infinite or NaN; of finite numbers that add up to infinity it says no."""
    total = tensor.sum() if tensor.dtype == torch.float32 else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item())


def _hides_nan(query: torch.Tensor, arguments: AttentionArguments) -> bool:
    """Whether PyTorch's flash attention may make zeros of NaN: it does of rows that are NaN where the keys are fewer
    than one of its vectors has elements, and of a bias."""
    bias = arguments.bias
    few = arguments.max_seqlen_k < _VECTOR and not is_finite(query)
    return few or (bias is not None and math.isnan(bias.sum(dtype=torch.float32).item()))


def _shows_all(arguments: AttentionArguments) -> bool:
    """Whether every query sees every key for all that can be told without looking."""
    a = arguments
    return (
        a.right == a.left == UNBOUNDED
        and a.mask is None
        and a.bias is None
        and a.relative_bias is None
        and not a.chunk
        and not a.packed
    )


@without_autocast
def attention_backward_torch(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: AttentionArguments,
    needed: Learned[bool],
) -> AttentionGradients:
    """Gradients of checked arguments; those of learned ones that are not `needed` are None."""
    bias_learns = needed.bias or needed.relative or needed.alibi_slopes
    if grad_lse is None and not bias_learns and _fits_flash(query, key, value, arguments):
        tensors = (grad_output, query, key, value, output, lse)
        gradients = _flash_backward_of_all(*tensors, arguments)
        # What is not finite would reach the gradients of all, masked or not.
        if _shows_all(arguments) or is_finite(gradients[0]):
            return AttentionGradients(*gradients, None, None, None, None, None)
    grad_query, grad_key, grad_value = (empty_gradient(tensor).zero_() for tensor in (query, key, value))
    learned = arguments.learned
    sums = Learned(
        *(
            torch.zeros_like(tensor, dtype=torch.float32) if wanted and tensor is not None else None
            for tensor, wanted in zip(learned, needed, strict=True)
        )
    )
    q, k, v, o, do = (_as_dense(tensor) for tensor in (query, key, value, output, grad_output))
    grads = [_as_dense(grad) for grad in (grad_query, grad_key, grad_value)]
    rows, grad_rows = _dense_rows(lse), None if grad_lse is None else _dense_rows(grad_lse)
    careful = query.is_cpu and not all(is_finite(tensor) for tensor in (query, key, value, grad_output))
    for segment in _segments(query, key, arguments):
        _backward_explicit(do, grad_rows, q, k, v, o, rows, grads, segment, sums, careful)
    return AttentionGradients(
        grad_query,
        grad_key,
        grad_value,
        *(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, learned, strict=True)
        ),
    )


def _flash_backward_of_all(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: AttentionArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if _is_one_flash_call(arguments):
        causal, scale = arguments.right == 0, arguments.scale
        three = _flash_backward(grad_output, query, key, value, output, lse, 0.0, causal, scale=scale)
        dq, dk, dv = map(_with_sequence_outside, three, (query, key, value))
        return dq, dk, dv
    dq, dk, dv = (empty_gradient(tensor).zero_() for tensor in (query, key, value))
    do, q, k, v, o = (_as_dense(tensor) for tensor in (grad_output, query, key, value, output))
    grads = [_as_dense(grad) for grad in (dq, dk, dv)]
    for segment in _segments(query, key, arguments):
        _backward_flash(do, q, k, v, o, _dense_rows(lse), grads, segment)
    return dq, dk, dv


@without_autocast
def attention_weights_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    heads: torch.Tensor | None,
    query_rows: torch.Tensor | None,
    arguments: AttentionArguments,
) -> torch.Tensor:
    """Weights (batch, chosen heads, chosen rows, keys); see `fastformer.attention_weights`."""
    if heads is None:
        if query_rows is None and arguments.cu_seqlens_q is arguments.key_lengths is arguments.prefix_lengths is None:
            return _all_weights(query, key, lse, arguments)
        heads = torch.arange(query.shape[1], device=query.device)
    chosen, kv_heads = _choose_heads(arguments, heads), heads // (query.shape[1] // key.shape[1])
    runs = [(0, 0, arguments.max_seqlen_q)] if query_rows is None else list(_runs(query_rows.tolist()))
    row_count = sum(length for _, _, length in runs)
    weights = query.new_zeros(arguments.batch(query), len(heads), row_count, arguments.max_seqlen_k)
    dense_query, dense_key, rows = _as_dense(query), _as_dense(key), _dense_rows(lse)
    for segment in _segments(query, key, chosen):
        q = segment.of_queries(dense_query)[:, heads]
        k = segment.of_keys(dense_key)[:, kv_heads].float()
        row_lse = _as_shift(segment.of_queries(rows)[:, heads])
        for place, row, length in runs:
            at = slice(row, min(row + length, q.shape[2]))
            if row < at.stop:
                values = _scores(q[:, :, at].float(), k, segment._replace(queries=at)).values
                target = weights[segment.batch, :, place : place + _size(at), segment.keys]
                target.copy_(values.sub_(row_lse[:, :, at]).exp_())
    return weights


@without_autocast
def attention_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attention_forward_torch` returns, made of functions that can be differentiated; it holds all scores."""
    heads, q, k, v = query.shape[1], *map(_as_dense, (query, key, value))
    outputs, lses = [], []
    for segment in _segments(query, key, arguments):
        k_part, v_part = (_float_heads(segment.of_keys(tensor), heads) for tensor in (k, v))
        output, lse = _attend(segment.of_queries(q).float(), k_part, v_part, segment)
        outputs.append(_joined(output.to(query.dtype), arguments.packed, "sequences heads tokens head_dim"))
        lses.append(_joined(lse, arguments.packed, "sequences heads tokens"))
    if not outputs:
        return empty_output(query, value).zero_(), empty_lse(query)
    if arguments.packed:
        return torch.cat(outputs), torch.cat(lses, 1)
    return torch.cat(outputs), torch.cat(lses)


def _joined(part: torch.Tensor, packed: bool, names: str) -> torch.Tensor:
    """A segment's part of the output or log-sum-exp as the call's tensor has it."""
    if not packed:
        return part
    target = "(sequences tokens) heads head_dim" if "head_dim" in names else "heads (sequences tokens)"
    return rearrange(part, f"{names} -> {target}")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: _Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a segment whose tensors these are, with equal numbers of heads."""
    a = segment.arguments
    scores = torch.matmul(q, k.transpose(-1, -2)) * a.scale
    if a.head_scales is not None:
        scores = scores * a.head_scales[:, None, None]
    if a.softcap:
        scores = torch.tanh(scores / a.softcap) * a.softcap
    bias, allowed, keep = segment.bias(q.device), segment.allowed(q.device), _keep(q, segment)
    visible = _visible(bias, allowed)
    scores = scores if bias is None else scores + bias
    scores = scores if visible is None else scores.masked_fill(~visible, NEGATIVE_INFINITY)
    maximum = largest_score(scores.detach(), None if a.sinks is None else a.sinks.detach())
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    if a.sinks is not None:
        total = total + torch.exp(a.sinks[:, None, None] - maximum)
    nothing = total == 0.0
    total = total.masked_fill(nothing, 1.0)
    if keep is not None:
        weights = weights * keep * kept_scale(a.dropout_p)
    lse = (maximum + total.log()).masked_fill(nothing, NEGATIVE_INFINITY)
    return torch.matmul(weights, v) / total, lse.squeeze(-1)


def _runs(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours among `rows` together: the place of the first, its row, and how many follow one another."""
    for _, run in itertools.groupby(enumerate(rows), lambda placed: placed[1] - placed[0]):
        (place, row), *others = run
        yield place, row, 1 + len(others)


def _all_weights(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, arguments: AttentionArguments
) -> torch.Tensor:
    """The weights of all heads and rows, where the whole call is one segment."""
    whole = _whole(query, arguments)
    scores = _scores(query.float(), _float_heads(key, query.shape[1]), whole)
    return scores.values.sub_(_as_shift(lse)).exp_().to(query.dtype)


def _as_shift(lse: torch.Tensor) -> torch.Tensor:
    """What to subtract from a row's scores: nothing is left of a row that may attend to nothing."""
    infinity = -NEGATIVE_INFINITY
    return lse.nan_to_num(nan=float("nan"), posinf=infinity, neginf=infinity)[..., None]


def _choose_heads(arguments: AttentionArguments, heads: torch.Tensor) -> AttentionArguments:
    def take(tensor: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.index_select(dim, heads)

    return arguments._replace(
        mask=take(arguments.mask, 1),
        bias=take(arguments.bias, 1),
        relative_bias=take(arguments.relative_bias, 0),
        alibi_slopes=take(arguments.alibi_slopes, 1),
        head_scales=take(arguments.head_scales, 0),
    )


class _Segment(NamedTuple):
    """A dense problem: some queries of neighbouring sequences of equal lengths, and the keys that these may attend to.

    Tensors of the whole call come as (batch, heads, sequence, head_dim), packed ones with a batch of one.

    Attributes:
        arguments: of the whole call.
        batch: the sequences.
        query_tokens, key_tokens: where all of their queries and keys lie along the whole call's sequence dimension.
        queries, keys: which of them, counted within each sequence.
        offset: what a query's own position is beyond its number.
        prefix: keys that the limit to the right does not concern.
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
        """Numbers of sequences, queries and keys."""
        return _size(self.batch), _size(self.queries), _size(self.keys)

    @property
    def limited(self) -> bool:
        """Whether a query's position says which keys it may attend to."""
        a = self.arguments
        return a.right != UNBOUNDED or a.left != UNBOUNDED or a.chunk > 0

    def of_queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """This segment's part of the queries, or what is laid out like them, as a view with its own batch."""
        return self._part(tensor, self.query_tokens, self.queries)

    def of_keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """This segment's part of the keys, or what is laid out like them, as a view with its own batch."""
        return self._part(tensor, self.key_tokens, self.keys)

    def of_scores(self, tensor: torch.Tensor) -> torch.Tensor:
        """This segment's part of a (batch, heads, queries, keys) tensor, in which dimensions of size one broadcast."""
        return _cut_dim(_cut_dim(_cut_dim(tensor, 0, self.batch), 2, self.queries), 3, self.keys)

    def by_queries(self, rows: int) -> Iterator[_Segment]:
        """`rows` queries at a time, with the keys that the limits leave them."""
        for start in range(self.queries.start, self.queries.stop, rows):
            queries = slice(start, min(start + rows, self.queries.stop))
            yield self._replace(queries=queries, keys=self._reach(queries))

    def by_sequences(self, count: int) -> Iterator[_Segment]:
        """`count` sequences at a time."""
        for start in range(self.batch.start, self.batch.stop, count):
            batch = slice(start, min(start + count, self.batch.stop))
            if not self.arguments.packed:
                yield self._replace(batch=batch)
                continue
            first, last = start - self.batch.start, batch.stop - self.batch.start
            m, n = _size(self.query_tokens) // _size(self.batch), _size(self.key_tokens) // _size(self.batch)
            query_tokens = slice(self.query_tokens.start + first * m, self.query_tokens.start + last * m)
            key_tokens = slice(self.key_tokens.start + first * n, self.key_tokens.start + last * n)
            yield self._replace(batch=batch, query_tokens=query_tokens, key_tokens=key_tokens)

    def distance(self, device: torch.device) -> torch.Tensor:
        """(queries, keys): how far each key lies after each query's own position."""
        queries = torch.arange(self.queries.start + self.offset, self.queries.stop + self.offset, device=device)
        return torch.arange(self.keys.start, self.keys.stop, device=device) - queries[:, None]

    def bias(self, device: torch.device) -> torch.Tensor | None:
        """What is added to the scores before any is masked, in float32; 4-D, broadcasting to them, or None."""
        a = self.arguments
        parts = [] if a.bias is None else [self.of_scores(a.bias).float()]
        if a.alibi_slopes is not None:
            slopes = _cut_dim(a.alibi_slopes, 0, self.batch)
            parts.append(self.distance(device).abs() * -slopes[:, :, None, None])
        if a.relative_bias is not None:
            reach = a.relative_bias.shape[1] // 2
            place = self.distance(device).clamp(-reach, reach) + reach
            parts.append(a.relative_bias.float()[None, :, place])
        return functools.reduce(torch.add, parts) if parts else None

    def allowed(self, device: torch.device) -> torch.Tensor | None:
        """Which keys each query may attend to by mask and position; 4-D, or None where all may."""
        a, queries, keys = self.arguments, self.queries, self.keys
        conditions = [] if a.mask is None else [self.of_scores(a.mask)]
        nearest, farthest = keys.start - (queries.stop - 1 + self.offset), keys.stop - 1 - queries.start - self.offset
        right = a.right != UNBOUNDED and farthest > a.right
        left = a.left != UNBOUNDED and nearest < -a.left
        # The diagonal of each query's own position.
        own = queries.start + self.offset - keys.start
        if right:
            near = torch.ones(_size(queries), _size(keys), dtype=torch.bool, device=device).tril_(own + a.right)
            if self.prefix:
                near[:, : max(0, self.prefix - keys.start)] = True
            conditions.append(near[None, None])
        if left:
            far = torch.ones(_size(queries), _size(keys), dtype=torch.bool, device=device).triu_(own - a.left)
            conditions.append(far[None, None])
        if a.chunk:
            key = torch.arange(keys.start, keys.stop, device=device)
            query = torch.arange(queries.start + self.offset, queries.stop + self.offset, device=device)
            conditions.append((key // a.chunk == query[:, None] // a.chunk)[None, None])
        return functools.reduce(torch.logical_and, conditions) if conditions else None

    def visible(self, device: torch.device) -> torch.Tensor | None:
        """Which keys each query sees by mask, position and bias; 4-D, or None where all."""
        return _visible(self.bias(device), self.allowed(device))

    def _part(self, tensor: torch.Tensor, tokens: slice, within: slice) -> torch.Tensor:
        if not self.arguments.packed:
            return tensor[self.batch, :, within]
        count = _size(self.batch)
        if count == 1:
            return tensor.narrow(2, tokens.start + within.start, _size(within))
        each = tensor[0].narrow(1, tokens.start, _size(tokens)).unflatten(1, (count, _size(tokens) // count))
        return each.transpose(0, 1)[:, :, within]

    def _reach(self, queries: slice) -> slice:
        """The keys that some of the `queries` may attend to by position."""
        a, low, high = self.arguments, self.keys.start, self.keys.stop
        first, last = queries.start + self.offset, queries.stop - 1 + self.offset
        if a.right != UNBOUNDED:
            high = min(high, max(last + a.right + 1, self.prefix))
        if a.left != UNBOUNDED:
            low = max(low, first - a.left)
        if a.chunk:
            low, high = max(low, first // a.chunk * a.chunk), min(high, (last // a.chunk + 1) * a.chunk)
        low = min(low, self.keys.stop)
        return slice(low, max(low, high))


def _size(part: slice) -> int:
    return part.stop - part.start


def _cut_dim(tensor: torch.Tensor, dim: int, cut: slice) -> torch.Tensor:
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, cut.start, _size(cut))


def _as_dense(tensor: torch.Tensor) -> torch.Tensor:
    """A packed (total_tokens, heads, head_dim) tensor as a dense one with a batch of one."""
    return tensor.transpose(0, 1)[None] if tensor.dim() == 3 else tensor


def _dense_rows(lse: torch.Tensor) -> torch.Tensor:
    """A packed (heads, total_tokens) log-sum-exp as a dense one with a batch of one."""
    return lse[None] if lse.dim() == 2 else lse


def _segments(query: torch.Tensor, key: torch.Tensor, arguments: AttentionArguments) -> Iterator[_Segment]:
    """The call as dense problems, neighbours of equal lengths together."""
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
            yield _Segment(
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


def _whole(query: torch.Tensor, arguments: AttentionArguments) -> _Segment:
    """A dense call without lengths as one segment."""
    m, n = arguments.max_seqlen_q, arguments.max_seqlen_k
    offset = n - m if arguments.bottom_right else 0
    everything = slice(0, 0)
    return _Segment(
        arguments, slice(0, query.shape[0]), everything, everything, slice(0, m), slice(0, n), offset, prefix=0
    )


def _is_one_flash_call(arguments: AttentionArguments) -> bool:
    """Whether one call of flash attention, without a mask, is the whole of a call that fits it."""
    a = arguments
    if (
        a.cu_seqlens_q is not None
        or a.key_lengths is not None
        or a.mask is not None
        or a.bias is not None
        or a.relative_bias is not None
        or a.alibi_slopes is not None
        or a.left != UNBOUNDED
        or a.chunk
        or a.prefix_lengths is not None
    ):
        return False
    # Its causal mask begins at the top left. Blocks leave out what lies beyond the diagonal of long sequences, and keys
    # that no query may see.
    m, n = a.max_seqlen_q, a.max_seqlen_k
    return a.right == UNBOUNDED or (a.right == 0 and m < 2 * FLASH_ROWS and (m == n or (m > n and not a.bottom_right)))


def _with_sequence_outside(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A (batch, heads, sequence, head_dim) tensor in memory as `empty_gradient(like)` is, copied only if it must be."""
    _, heads, sequence, head_dim = tensor.shape
    as_it_should = (sequence * heads * head_dim, head_dim, heads * head_dim, 1)
    stride_batch, _, stride_sequence, _ = like.stride()
    if tensor.stride() == as_it_should and stride_sequence <= stride_batch:
        return tensor
    return empty_output(like, tensor).copy_(tensor)


def _fits_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: AttentionArguments) -> bool:
    """Whether PyTorch's CPU flash attention computes this call."""
    a = arguments
    return (
        q.is_cpu
        and not (a.softcap or a.dropout_p)
        # It multiplies what it has masked by the scale.
        and a.scale > 0.0
        and a.head_scales is None
        and a.sinks is None
        and q.shape[-1] == v.shape[-1]
        # It reads neighbouring elements whatever the last stride says.
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and q.numel() > 0
        and k.numel() > 0
    )


def _flash_blocks(segment: _Segment, heads: int) -> Iterator[_Segment]:
    """Flash attention computes every score of up to 512 keys, masked or not; blocks leave out what limits exclude.

    Where a bias has to be formed for it, blocks keep that small.
    """
    a, (_, m, n) = segment.arguments, segment.shape
    rows = FLASH_ROWS if segment.limited and m >= 2 * FLASH_ROWS else m
    if a.alibi_slopes is not None or a.relative_bias is not None:
        rows = min(rows, max(EXPLICIT_ROWS, SCORE_ELEMENTS // max(1, heads * n)))
    return segment.by_queries(rows)


def _forward_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, segment: _Segment
) -> None:
    for block in _flash_blocks(segment, q.shape[1]):
        block_output, block_lse = block.of_queries(output), block.of_queries(lse)
        if block.keys.start == block.keys.stop:
            block_output.zero_()
            block_lse.fill_(NEGATIVE_INFINITY)
            continue
        causal, additive = _flash_mask(block, q.device)
        part = block.of_queries(q), block.of_keys(k), block.of_keys(v)
        result, result_lse = _flash_forward(*part, 0.0, causal, attn_mask=additive, scale=block.arguments.scale)
        # It has 0 for a query that may attend to nothing: a bias need not be read again where there is none.
        if additive is not None and not (result_lse.isfinite() & (result_lse != 0)).all():
            result_lse = result_lse.masked_fill((additive == NEGATIVE_INFINITY).all(-1), NEGATIVE_INFINITY)
        block_output.copy_(result)
        block_lse.copy_(result_lse)


def _backward_flash(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    segment: _Segment,
) -> None:
    """Gradients of q, k and v are written to `grads`, which are zeros here."""
    for block in _flash_blocks(segment, q.shape[1]):
        if block.keys.start == block.keys.stop:
            continue
        causal, additive = _flash_mask(block, q.device)
        block_lse = block.of_queries(lse)
        if additive is not None:
            block_lse = block_lse.masked_fill(block_lse == NEGATIVE_INFINITY, 0.0)
        dq, dk, dv = _flash_backward(
            block.of_queries(do),
            block.of_queries(q),
            block.of_keys(k),
            block.of_keys(v),
            block.of_queries(o),
            block_lse,
            0.0,
            causal,
            attn_mask=additive,
            scale=block.arguments.scale,
        )
        block.of_queries(grads[0]).copy_(dq)
        block.of_keys(grads[1]).add_(dk)
        block.of_keys(grads[2]).add_(dv)


def _flash_mask(block: _Segment, device: torch.device) -> tuple[bool, torch.Tensor | None]:
    """Flash attention's is_causal and additive mask for this block."""
    a = block.arguments
    additive = block.bias(device)
    plain = a.mask is None and additive is None and a.left == UNBOUNDED and not (a.chunk or block.prefix)
    if plain and a.right == 0 and block.queries.start + block.offset == block.keys.start == 0:
        return True, None
    allowed = block.allowed(device)
    if allowed is not None:
        additive = torch.zeros((), dtype=torch.float32) if additive is None else additive
        additive = torch.where(allowed, additive, NEGATIVE_INFINITY)
    return False, additive


@dataclass(frozen=True)
class _Scores:
    """Scores of a segment in float32, masked ones -inf.

    Attributes:
        values: (batch, heads, queries, keys).
        products: of queries and keys, before any scale.
        softcap_slope: derivative of the softcap, where there is one.
        keep: which weights dropout keeps, where there is dropout.
    """

    values: torch.Tensor
    products: torch.Tensor | None
    softcap_slope: torch.Tensor | None
    keep: torch.Tensor | None


def _scores(q: torch.Tensor, k: torch.Tensor, segment: _Segment) -> _Scores:
    """`q` and `k` are the segment's, with equal numbers of heads."""
    a = segment.arguments
    values = torch.matmul(q, k.transpose(-1, -2))
    products, slope = None, None
    if a.head_scales is not None:
        products = values
        values = values * (a.scale * a.head_scales[:, None, None])
    else:
        values.mul_(a.scale)
    if a.softcap:
        capped = torch.tanh(values / a.softcap)
        values, slope = capped * a.softcap, 1.0 - capped * capped
    bias, allowed = segment.bias(q.device), segment.allowed(q.device)
    if bias is not None:
        values += bias
    visible = _visible(bias, allowed)
    if visible is not None:
        values.masked_fill_(~visible, NEGATIVE_INFINITY)
    return _Scores(values, products, slope, _keep(q, segment))


def _visible(bias: torch.Tensor | None, allowed: torch.Tensor | None) -> torch.Tensor | None:
    """Which keys each query sees: a bias of -inf hides one as a mask does, even where the score is NaN."""
    if bias is None:
        return allowed
    shown = bias != NEGATIVE_INFINITY
    return shown if allowed is None else shown & allowed


def _keep(q: torch.Tensor, segment: _Segment) -> torch.Tensor | None:
    a = segment.arguments
    if a.seed is None:
        return None
    seed, offset = seed_words(a.seed)
    heads = q.shape[1]
    first, device = segment.batch.start * heads, q.device
    # NumPy draws on a CPU, and knows no tensors that transforms have wrapped.
    with torch._C._DisableFuncTorch():
        keep = dropout_keep(
            seed,
            offset,
            a.dropout_p,
            torch.arange(first, first + q.shape[0] * heads, device=device),
            torch.arange(segment.queries.start, segment.queries.stop, device=device),
            torch.arange(segment.keys.start, segment.keys.stop, device=device),
        )
    return keep.unflatten(0, (q.shape[0], heads))


def _explicit_segments(segment: _Segment, q: torch.Tensor) -> Iterator[_Segment]:
    """As many sequences at a time as have few enough scores to stay in the cache."""
    _, m, n = segment.shape
    return segment.by_sequences(max(1, _score_elements(q) // max(1, q.shape[1] * m * n)))


def _explicit_blocks(segment: _Segment, q: torch.Tensor) -> Iterator[_Segment]:
    sequences, _, n = segment.shape
    rows = max(EXPLICIT_ROWS, _score_elements(q) // max(1, sequences * q.shape[1] * n))
    return segment.by_queries(min(rows, FLASH_ROWS) if segment.limited else rows)


def _score_elements(tensor: torch.Tensor) -> int:
    return SCORE_ELEMENTS_IN_CACHE if tensor.device.type == "cpu" else SCORE_ELEMENTS


def _forward_explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    segment: _Segment,
    careful: bool,
) -> None:
    """`careful`: there are values that are not finite, of which rows that may not see them must not hear."""
    a, heads = segment.arguments, q.shape[1]
    for sequences in _explicit_segments(segment, q):
        k_all, v_all = (_float_heads(sequences.of_keys(tensor), heads) for tensor in (k, v))
        for block in _explicit_blocks(sequences, q):
            scores = _scores(block.of_queries(q).float(), k_all[:, :, block.keys], block)
            maximum = largest_score(scores.values, a.sinks)
            weights = scores.values.sub_(maximum).exp_()
            total = weights.sum(-1, keepdim=True)
            if a.sinks is not None:
                total = total + torch.exp(a.sinks[:, None, None] - maximum)
            if scores.keep is not None:
                weights = weights * scores.keep * kept_scale(a.dropout_p)
            visible = block.visible(q.device) if careful else None
            result = product_of_visible(weights, v_all[:, :, block.keys], visible) / total.masked_fill(
                total == 0.0, 1.0
            )
            block.of_queries(output).copy_(result)
            block.of_queries(lse).copy_((maximum + total.log()).squeeze(-1))


def product_of_visible(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """``weights @ values`` to which what is not `visible` adds nothing, not even where a value is infinite or NaN."""
    product = torch.matmul(weights, values)
    if visible is None:
        return product
    strange = ~values.isfinite()
    finite = torch.matmul(weights.masked_fill(~visible, 0.0), values.masked_fill(strange, 0.0))
    sees_strange = torch.matmul(visible.float().expand(weights.shape), strange.float()) > 0.0
    return torch.where(sees_strange, product, finite)


def largest_score(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """The largest logit of each row, 0 where there is none, to subtract before exponentials."""
    if scores.shape[-1] == 0:
        maximum = scores.new_full((*scores.shape[:-1], 1), NEGATIVE_INFINITY)
    else:
        maximum = scores.amax(-1, keepdim=True)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks[:, None, None])
    return maximum.masked_fill(maximum == NEGATIVE_INFINITY, 0.0)


def _backward_explicit(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    segment: _Segment,
    sums: Learned[torch.Tensor | None],
    careful: bool,
) -> None:
    """Gradients of q, k and v are written to `grads`; those of learned arguments are added to `sums`.

    `careful`: not everything is finite, and what a row may not see must not matter to it.
    """
    a, heads = segment.arguments, q.shape[1]
    for sequences in _explicit_segments(segment, q):
        k_all, v_all = (_float_heads(sequences.of_keys(tensor), heads) for tensor in (k, v))
        dk, dv = torch.zeros_like(k_all), torch.zeros_like(v_all)
        for block in _explicit_blocks(sequences, q):
            q_rows, do_rows, k_block = (
                block.of_queries(q).float(),
                block.of_queries(do).float(),
                k_all[:, :, block.keys],
            )
            row_lse = block.of_queries(lse)[..., None]
            delta = (do_rows * block.of_queries(o)).sum(-1, keepdim=True)
            if dlse is not None:
                delta = delta - block.of_queries(dlse)[..., None]
            scores = _scores(q_rows, k_block, block)
            weights = scores.values.sub_(row_lse.masked_fill(row_lse == NEGATIVE_INFINITY, -NEGATIVE_INFINITY)).exp_()
            visible = block.visible(q.device) if careful else None
            if visible is not None:
                weights.masked_fill_(~visible, 0.0)
            dscores = torch.matmul(do_rows, v_all[:, :, block.keys].transpose(-1, -2))
            dropped = weights
            if scores.keep is not None:
                dropped = weights * scores.keep * kept_scale(a.dropout_p)
                dscores.mul_(scores.keep).mul_(kept_scale(a.dropout_p))
            seen_by = None if visible is None else visible.transpose(-1, -2)
            dv[:, :, block.keys] += product_of_visible(dropped.transpose(-1, -2), do_rows, seen_by)
            dscores.sub_(delta).mul_(weights)
            if visible is not None:
                dscores.masked_fill_(~visible, 0.0)
            _add_learned(sums, dscores, delta, row_lse, block)
            if scores.softcap_slope is not None:
                dscores.mul_(scores.softcap_slope)
            if sums.head_scales is not None and scores.products is not None:
                sums.head_scales.add_((dscores * scores.products).sum((0, 2, 3)), alpha=a.scale)
            scale = a.scale if a.head_scales is None else a.scale * a.head_scales[:, None, None]
            block.of_queries(grads[0]).copy_(product_of_visible(dscores, k_block, visible).mul_(scale))
            dk[:, :, block.keys] += product_of_visible(dscores.transpose(-1, -2), q_rows * scale, seen_by)
        group = heads // k.shape[1]
        sequences.of_keys(grads[1]).copy_(_sum_groups(dk, group))
        sequences.of_keys(grads[2]).copy_(_sum_groups(dv, group))


def _add_learned(
    sums: Learned[torch.Tensor | None],
    dscores: torch.Tensor,
    delta: torch.Tensor,
    row_lse: torch.Tensor,
    block: _Segment,
) -> None:
    """Add to `sums` what the gradient of biased scores gives the biases and sinks."""
    a = block.arguments
    if sums.bias is not None:
        target = block.of_scores(sums.bias)
        target += dscores.sum_to_size(target.shape)
    if sums.relative is not None:
        _add_by_distance(sums.relative, dscores, block.distance(dscores.device))
    if sums.alibi_slopes is not None:
        target = _cut_dim(sums.alibi_slopes, 0, block.batch)
        target -= (dscores * block.distance(dscores.device).abs()).sum((-1, -2)).sum_to_size(target.shape)
    if sums.sinks is not None and a.sinks is not None:
        sums.sinks.sub_((torch.exp(a.sinks[:, None, None] - row_lse) * delta).sum((0, 2, 3)))


def _add_by_distance(total: torch.Tensor, dscores: torch.Tensor, distance: torch.Tensor) -> None:
    """Add (batch, heads, rows, keys) to (heads, 2 * reach + 1) by the keys' distance (rows, keys)."""
    reach = total.shape[1] // 2
    place = (distance.clamp(-reach, reach) + reach).flatten()
    total.index_add_(1, place, dscores.sum(0).flatten(1))


def _float_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A key or value in float32, with one head for every query head."""
    group = heads // tensor.shape[1]
    return tensor.float() if group == 1 else tensor.float().repeat_interleave(group, 1)


def _sum_groups(grad: torch.Tensor, group: int) -> torch.Tensor:
    """Add up the gradients of the query heads that share a key/value head."""
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)
