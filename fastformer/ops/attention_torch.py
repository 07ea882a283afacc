"""Attention in PyTorch: on a CPU its own flash attention wherever that can express the call, an explicit one elsewhere.

A call is cut into segments, each a dense (batch, heads, sequence, head_dim) problem without padding: one per packed
sequence, one per sequence with a key length, or the whole. The explicit path works in float32 on a few query rows at a
time, so that scores for all queries are never held at once; its backward recomputes them from the log-sum-exp.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

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

SCORE_ELEMENTS = 1 << 22
NEGATIVE_INFINITY = float("-inf")
_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@without_autocast
def attention_forward_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; see `fastformer.attention`."""
    output, lse = empty_output(query, value), empty_lse(query)
    for segment in _segments(query, key, arguments):
        q, k, v = segment.queries(query), segment.keys(key), segment.keys(value)
        forward = _forward_flash if segment.fits_flash(q, k, v) else _forward_explicit
        segment_output, segment_lse = forward(q, k, v, segment)
        segment.queries(output).copy_(segment_output)
        segment.rows(lse).copy_(segment_lse)
    return output, lse


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
    """Gradients of checked arguments; those of learned ones that are not `needed` are empty."""
    grad_query, grad_key, grad_value = (empty_gradient(tensor).zero_() for tensor in (query, key, value))
    learned = arguments.learned
    sums = Learned(
        *(
            torch.zeros_like(tensor, dtype=torch.float32) if wanted and tensor is not None else None
            for tensor, wanted in zip(learned, needed, strict=True)
        )
    )
    for segment in _segments(query, key, arguments):
        q, k, v = segment.queries(query), segment.keys(key), segment.keys(value)
        o, do = segment.queries(output), segment.queries(grad_output)
        row_lse = segment.rows(lse)
        dlse = None if grad_lse is None else segment.rows(grad_lse)
        if segment.fits_flash(q, k, v) and dlse is None and sums.bias is None:
            grads = _backward_flash(do, q, k, v, o, row_lse, segment)
        else:
            grads = _backward_explicit(do, dlse, q, k, v, o, row_lse, segment, sums)
        segment.queries(grad_query).copy_(grads[0])
        segment.keys(grad_key).copy_(grads[1])
        segment.keys(grad_value).copy_(grads[2])
    return AttentionGradients(
        grad_query,
        grad_key,
        grad_value,
        *(
            query.new_empty(0) if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, learned, strict=True)
        ),
    )


@without_autocast
def attention_weights_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    heads: torch.Tensor,
    query_rows: torch.Tensor,
    arguments: AttentionArguments,
) -> torch.Tensor:
    """Weights (batch, chosen heads, chosen rows, keys); see `fastformer.attention_weights`."""
    weights = query.new_zeros(arguments.batch(query), len(heads), len(query_rows), arguments.max_seqlen_k)
    chosen = _choose_heads(arguments, heads)
    for segment in _segments(query, key, chosen):
        q, k = segment.queries(query)[:, heads], segment.keys(key)
        k = k[:, heads // (query.shape[1] // key.shape[1])].float()
        row_lse = segment.rows(lse)[:, heads, :, None]
        row_lse = row_lse.masked_fill(row_lse == NEGATIVE_INFINITY, -NEGATIVE_INFINITY)
        m, n = q.shape[2], k.shape[2]
        for place, row in enumerate(query_rows.tolist()):
            if row < m:
                at = slice(row, row + 1)
                scores = _scores(q[:, :, at].float(), k, at, m, segment)
                weights[segment.batch, :, place, :n] = torch.exp(scores.values - row_lse[:, :, at]).squeeze(2)
    return weights


def _choose_heads(arguments: AttentionArguments, heads: torch.Tensor) -> AttentionArguments:
    def take(tensor: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.index_select(dim, heads)

    return replace(
        arguments,
        mask=take(arguments.mask, 1),
        bias=take(arguments.bias, 1),
        relative_bias=take(arguments.relative_bias, 0),
        alibi_slopes=take(arguments.alibi_slopes, 1),
        head_scales=take(arguments.head_scales, 0),
    )


@dataclass(frozen=True)
class _Segment:
    """Consecutive sequences of equal lengths: where they lie in the whole call's tensors, and its arguments for them.

    Attributes:
        arguments: mask, bias, slopes and the rest, cut to this segment.
        batch: the sequences.
        query_tokens, key_tokens: positions along the sequence (dense) or the token dimension (packed).
        prefix: keys that the limit to the right does not concern.
    """

    arguments: AttentionArguments
    batch: slice
    query_tokens: slice
    key_tokens: slice
    prefix: int

    def queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """This segment's part of a query-shaped tensor, as a (batch, heads, sequence, head_dim) view."""
        return self._cut(tensor, self.query_tokens)

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """This segment's part of a key-shaped tensor, as a (batch, heads, sequence, head_dim) view."""
        return self._cut(tensor, self.key_tokens)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This segment's part of a log-sum-exp, as a (batch, heads, queries) view."""
        return tensor[:, self.query_tokens][None] if self.arguments.packed else tensor[self.batch]

    def _cut(self, tensor: torch.Tensor, tokens: slice) -> torch.Tensor:
        if self.arguments.packed:
            return rearrange(tensor[tokens], "sequence heads head_dim -> 1 heads sequence head_dim")
        return tensor[self.batch, :, tokens]

    def fits_flash(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether PyTorch's CPU flash attention computes this segment."""
        a = self.arguments
        return (
            q.device.type == "cpu"
            and not (a.softcap or a.dropout_p)
            and a.alibi_slopes is None
            and a.relative_bias is None
            and a.head_scales is None
            and a.sinks is None
            and q.shape[-1] == v.shape[-1]
            # It reads neighbouring elements whatever the last stride says.
            and all(t.stride(-1) == 1 and t.numel() > 0 for t in (q, k, v))
        )


def _segments(query: torch.Tensor, key: torch.Tensor, arguments: AttentionArguments) -> Iterator[_Segment]:
    if query.numel() == 0:
        return
    batch = arguments.batch(query)
    prefixes = [0] * batch if arguments.prefix_lengths is None else arguments.prefix_lengths.tolist()
    if arguments.cu_seqlens_q is not None and arguments.cu_seqlens_k is not None:
        q_bounds = _boundaries("cu_seqlens_q", arguments.cu_seqlens_q, query.shape[0], arguments.max_seqlen_q)
        k_bounds = _boundaries("cu_seqlens_k", arguments.cu_seqlens_k, key.shape[0], arguments.max_seqlen_k)
        for index in range(batch):
            yield _segment(
                arguments,
                slice(index, index + 1),
                slice(*q_bounds[index : index + 2]),
                slice(*k_bounds[index : index + 2]),
                prefixes[index],
            )
    elif arguments.key_lengths is not None or arguments.prefix_lengths is not None:
        lengths = [key.shape[2]] * batch if arguments.key_lengths is None else arguments.key_lengths.tolist()
        for index, length in enumerate(lengths):
            queries = slice(0, query.shape[2])
            yield _segment(arguments, slice(index, index + 1), queries, slice(0, length), prefixes[index])
    else:
        yield _segment(arguments, slice(0, batch), slice(0, query.shape[2]), slice(0, key.shape[2]), 0)


def _boundaries(name: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must rise from 0 to the number of tokens, {total}; got {bounds}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen} where {name} has a sequence of {max(lengths)}")
    return bounds


def _segment(
    arguments: AttentionArguments, batch: slice, query_tokens: slice, key_tokens: slice, prefix: int
) -> _Segment:
    queries = slice(0, query_tokens.stop - query_tokens.start)
    keys = slice(0, key_tokens.stop - key_tokens.start)
    cut = replace(
        arguments,
        mask=_cut_broadcast(arguments.mask, batch, queries, keys),
        bias=_cut_broadcast(arguments.bias, batch, queries, keys),
        alibi_slopes=None if arguments.alibi_slopes is None else _cut_dim(arguments.alibi_slopes, 0, batch),
    )
    return _Segment(cut, batch, query_tokens, key_tokens, prefix)


def _cut_broadcast(tensor: torch.Tensor | None, batch: slice, queries: slice, keys: slice) -> torch.Tensor | None:
    """Cut a (batch, heads, queries, keys) tensor, leaving dimensions of size one to broadcast."""
    if tensor is None:
        return None
    return _cut_dim(_cut_dim(_cut_dim(tensor, 0, batch), 2, queries), 3, keys)


def _cut_dim(tensor: torch.Tensor, dim: int, cut: slice) -> torch.Tensor:
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, cut.start, cut.stop - cut.start)


def _forward_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: _Segment
) -> tuple[torch.Tensor, torch.Tensor]:
    causal, additive = _flash_mask(q, k, segment)
    output, lse = _flash_forward(q, k, v, 0.0, causal, attn_mask=additive, scale=segment.arguments.scale)
    if additive is not None:
        lse = lse.masked_fill((additive == NEGATIVE_INFINITY).all(-1), NEGATIVE_INFINITY)
    return output, lse


def _backward_flash(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    segment: _Segment,
) -> tuple[torch.Tensor, ...]:
    causal, additive = _flash_mask(q, k, segment)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if additive is not None:
        lse = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0)
    dq, dk, dv = _flash_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=additive, scale=segment.arguments.scale)
    return dq, _sum_groups(dk, group), _sum_groups(dv, group)


def _sum_groups(grad: torch.Tensor, group: int) -> torch.Tensor:
    """Add up the gradients of the query heads that share a key/value head."""
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)


def _flash_mask(q: torch.Tensor, k: torch.Tensor, segment: _Segment) -> tuple[bool, torch.Tensor | None]:
    """Flash attention's is_causal and additive mask for this segment."""
    m, n, arguments = q.shape[2], k.shape[2], segment.arguments
    top_left = m == n or not arguments.bottom_right
    plain = arguments.mask is None and arguments.bias is None and arguments.left == UNBOUNDED
    if plain and not (arguments.chunk or segment.prefix) and arguments.right == 0 and top_left:
        return True, None
    allowed = _allowed(segment, slice(0, m), m, n, q.device)
    additive = arguments.bias
    if allowed is not None:
        additive = torch.zeros((), dtype=torch.float32) if additive is None else additive
        additive = torch.where(allowed, additive, NEGATIVE_INFINITY)
    return False, None if additive is None else additive.float()


def _distance(arguments: AttentionArguments, rows: slice, m: int, n: int, device: torch.device) -> torch.Tensor:
    """(rows, n): how far each key lies after each query's own position."""
    offset = n - m if arguments.bottom_right else 0
    queries = torch.arange(rows.start + offset, rows.stop + offset, device=device)
    return torch.arange(n, device=device) - queries[:, None]


def _allowed(segment: _Segment, rows: slice, m: int, n: int, device: torch.device) -> torch.Tensor | None:
    """Which keys the queries in `rows` may attend to by mask and position; 4-D, or None where all may."""
    arguments = segment.arguments
    conditions = [] if arguments.mask is None else [_cut_dim(arguments.mask, 2, rows)]
    if arguments.right != UNBOUNDED or arguments.left != UNBOUNDED or arguments.chunk:
        distance = _distance(arguments, rows, m, n, device)[None, None]
        key = torch.arange(n, device=device)
        if arguments.right != UNBOUNDED:
            conditions.append((distance <= arguments.right) | (key < segment.prefix))
        if arguments.left != UNBOUNDED:
            conditions.append(distance >= -arguments.left)
        if arguments.chunk:
            conditions.append(key // arguments.chunk == (key - distance) // arguments.chunk)
    return functools.reduce(torch.logical_and, conditions) if conditions else None


@dataclass(frozen=True)
class _Scores:
    """Scores of some query rows against every key of a segment, in float32, masked ones -inf.

    Attributes:
        values: (batch, heads, rows, keys).
        products: of queries and keys, before any scale.
        softcap_slope: derivative of the softcap, where there is one.
        keep: which weights dropout keeps, where there is dropout.
    """

    values: torch.Tensor
    products: torch.Tensor | None
    softcap_slope: torch.Tensor | None
    keep: torch.Tensor | None


def _scores(q: torch.Tensor, k: torch.Tensor, rows: slice, m: int, segment: _Segment) -> _Scores:
    a, n = segment.arguments, k.shape[2]
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
    if a.alibi_slopes is not None:
        distance = _distance(a, rows, m, n, q.device).abs()
        values = values - a.alibi_slopes[:, :, None, None] * distance
    if a.bias is not None:
        values = values + _cut_dim(a.bias, 2, rows).float()
    if a.relative_bias is not None:
        reach = a.relative_bias.shape[1] // 2
        place = _distance(a, rows, m, n, q.device).clamp(-reach, reach) + reach
        values = values + a.relative_bias.float()[:, place]
    allowed = _allowed(segment, rows, m, n, q.device)
    if allowed is not None:
        values = values.masked_fill(~allowed, NEGATIVE_INFINITY)
    return _Scores(values, products, slope, _keep(q, n, rows, segment))


def _keep(q: torch.Tensor, n: int, rows: slice, segment: _Segment) -> torch.Tensor | None:
    a = segment.arguments
    if a.seed is None:
        return None
    seed, offset = a.seed.tolist()
    heads = q.shape[1]
    first, device = segment.batch.start * heads, q.device
    keep = dropout_keep(
        seed,
        offset,
        a.dropout_p,
        torch.arange(first, first + q.shape[0] * heads, device=device),
        torch.arange(rows.start, rows.stop, device=device),
        torch.arange(n, device=device),
    )
    return keep.unflatten(0, (q.shape[0], heads))


def _row_chunks(q: torch.Tensor, n: int) -> Iterator[slice]:
    batch, heads, m, _ = q.shape
    rows = max(1, SCORE_ELEMENTS // max(1, batch * heads * n))
    for start in range(0, m, rows):
        yield slice(start, min(start + rows, m))


def _forward_explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: _Segment
) -> tuple[torch.Tensor, torch.Tensor]:
    a, m, n = segment.arguments, q.shape[2], k.shape[2]
    k, v = _float_heads(k, q.shape[1]), _float_heads(v, q.shape[1])
    output, lse = empty_output(q, v), empty_lse(q)
    for rows in _row_chunks(q, n):
        scores = _scores(q[:, :, rows].float(), k, rows, m, segment)
        maximum = _maximum(scores.values, a.sinks)
        weights = torch.exp(scores.values - maximum)
        total = weights.sum(-1, keepdim=True)
        if a.sinks is not None:
            total = total + torch.exp(a.sinks[:, None, None] - maximum)
        if scores.keep is not None:
            weights = weights * scores.keep / (1.0 - a.dropout_p)
        output[:, :, rows] = torch.matmul(weights, v) / total.masked_fill(total == 0.0, 1.0)
        lse[:, :, rows] = (maximum + total.log()).squeeze(-1)
    return output, lse


def _maximum(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
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
    segment: _Segment,
    sums: Learned[torch.Tensor | None],
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v; those of learned arguments are added to `sums`."""
    a, m, n, group = segment.arguments, q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = _float_heads(k, q.shape[1]), _float_heads(v, q.shape[1])
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _row_chunks(q, n):
        q_rows, do_rows = q[:, :, rows].float(), do[:, :, rows].float()
        row_lse = lse[:, :, rows, None]
        delta = (do_rows * o[:, :, rows].float()).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, rows, None]
        scores = _scores(q_rows, k, rows, m, segment)
        weights = torch.exp(scores.values - row_lse.masked_fill(row_lse == NEGATIVE_INFINITY, -NEGATIVE_INFINITY))
        dweights = torch.matmul(do_rows, v.transpose(-1, -2))
        dropped = weights
        if scores.keep is not None:
            dropped = weights * scores.keep / (1.0 - a.dropout_p)
            dweights = dweights * scores.keep / (1.0 - a.dropout_p)
        dv += torch.matmul(dropped.transpose(-1, -2), do_rows)
        dscores = weights * (dweights - delta)
        if sums.bias is not None:
            target = _cut_broadcast(sums.bias, segment.batch, slice(0, m), slice(0, n))
            assert target is not None
            target = _cut_dim(target, 2, rows)
            target += dscores.sum_to_size(target.shape)
        distance = _distance(a, rows, m, n, q.device)
        if sums.relative is not None:
            _add_by_distance(sums.relative, dscores, distance)
        if sums.alibi_slopes is not None:
            target = _cut_dim(sums.alibi_slopes, 0, segment.batch)
            target -= (dscores * distance.abs()).sum((-1, -2)).sum_to_size(target.shape)
        if sums.sinks is not None and a.sinks is not None:
            sums.sinks.sub_((torch.exp(a.sinks[:, None, None] - row_lse) * delta).sum((0, 2, 3)))
        if scores.softcap_slope is not None:
            dscores = dscores * scores.softcap_slope
        if sums.head_scales is not None and scores.products is not None:
            sums.head_scales.add_((dscores * scores.products).sum((0, 2, 3)), alpha=a.scale)
        scale = a.scale if a.head_scales is None else a.scale * a.head_scales[:, None, None]
        dscores = dscores * scale
        dq[:, :, rows] = torch.matmul(dscores, k)
        dk += torch.matmul(dscores.transpose(-1, -2), q_rows)
    return dq, _sum_groups(dk, group), _sum_groups(dv, group)


def _add_by_distance(total: torch.Tensor, dscores: torch.Tensor, distance: torch.Tensor) -> None:
    """Add (batch, heads, rows, keys) to (heads, 2 * reach + 1) by the keys' distance (rows, keys)."""
    reach = total.shape[1] // 2
    place = (distance.clamp(-reach, reach) + reach).flatten()
    total.index_add_(1, place, dscores.sum(0).flatten(1))


def _float_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A key or value in float32, with one head for every query head."""
    return tensor.float().repeat_interleave(heads // tensor.shape[1], 1)
