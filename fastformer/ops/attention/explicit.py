"""Attention by explicit scores, in float32, a few rows at a time, for calls that CPU flash attention cannot express.

The scores of all queries are never held at once; the backward computes them again from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from fastformer_kernels.attention.arguments import Learned
from fastformer_kernels.dropout_numbers import kept_scale

from fastformer.ops.attention.dropout import dropout_keep
from fastformer.ops.attention.flash import is_finite
from fastformer.ops.attention.segments import NEGATIVE_INFINITY, Segment, cut_dim, visible_by, widened
from fastformer.ops.checks import can_be_read
from fastformer.ops.dropout import seed_words

_SCORE_ELEMENTS = 1 << 22
_SCORE_ELEMENTS_IN_CACHE = 1 << 18
_LEAST_ROWS = 64
_ROWS_WITHIN_LIMITS = 128


def explicit_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    segment: Segment,
    careful: bool,
) -> None:
    """Write output and log-sum-exp of a segment.

    `careful` is for values that are not finite: they must not affect rows that may not see them.
    """
    a, heads = segment.arguments, q.shape[1]
    for sequences in _explicit_segments(segment, q):
        k_all, v_all = (float_heads(sequences.of_keys(tensor), heads) for tensor in (k, v))
        for block in _explicit_blocks(sequences, q):
            scores = scores_of(block.of_queries(q).float(), k_all[:, :, block.keys], block)
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


def explicit_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
    segment: Segment,
    sums: Learned[torch.Tensor | None],
    careful: bool,
) -> None:
    """Write the gradients of q, k and v to `grads` and add those of learned arguments to `sums`.

    `careful` is for inputs that are not finite: they must not affect rows that may not see them.
    """
    a, heads = segment.arguments, q.shape[1]
    for sequences in _explicit_segments(segment, q):
        k_all, v_all = (float_heads(sequences.of_keys(tensor), heads) for tensor in (k, v))
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
            scores = scores_of(q_rows, k_block, block)
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
            if scores.before_mod is not None:
                changed: Any = torch.func.vjp(block.change, scores.before_mod)
                dscores = changed[1](dscores)[0].masked_fill(dscores == 0.0, 0.0)
            if scores.softcap_slope is not None:
                dscores.mul_(scores.softcap_slope)
            if sums.head_scales is not None and scores.products is not None:
                products = scores.products if visible is None else scores.products.masked_fill(~visible, 0.0)
                sums.head_scales.add_((dscores * products).sum((0, 2, 3)), alpha=a.scale)
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
    block: Segment,
) -> None:
    """Add to `sums` the gradients of the biases and sinks, from the gradient of the biased scores."""
    a = block.arguments
    if sums.bias is not None:
        target = block.of_scores(sums.bias)
        target += dscores.sum_to_size(target.shape)
    if sums.relative is not None:
        _add_by_distance(sums.relative, dscores, block.distance(dscores.device))
    if sums.alibi_slopes is not None:
        target = cut_dim(sums.alibi_slopes, 0, block.batch)
        target -= (dscores * block.distance(dscores.device).abs()).sum((-1, -2)).sum_to_size(target.shape)
    if sums.sinks is not None and a.sinks is not None:
        sums.sinks.sub_((torch.exp(a.sinks[:, None, None] - row_lse) * delta).sum((0, 2, 3)))


def _add_by_distance(total: torch.Tensor, dscores: torch.Tensor, distance: torch.Tensor) -> None:
    """Add (batch, heads, rows, keys) to (heads, 2 * reach + 1) at the keys' distances (rows, keys)."""
    reach = total.shape[1] // 2
    place = (distance.clamp(-reach, reach) + reach).flatten()
    total.index_add_(1, place, dscores.sum(0).flatten(1))


def _explicit_segments(segment: Segment, q: torch.Tensor) -> Iterator[Segment]:
    """Group sequences so that the scores of a group fit in the CPU's cache."""
    _, m, n = segment.shape
    return segment.by_sequences(max(1, _score_elements(q) // max(1, q.shape[1] * m * n)))


def _explicit_blocks(segment: Segment, q: torch.Tensor) -> Iterator[Segment]:
    sequences, _, n = segment.shape
    rows = max(_LEAST_ROWS, _score_elements(q) // max(1, sequences * q.shape[1] * n))
    return segment.by_queries(min(rows, _ROWS_WITHIN_LIMITS) if segment.limited else rows)


def _score_elements(tensor: torch.Tensor) -> int:
    return _SCORE_ELEMENTS_IN_CACHE if tensor.device.type == "cpu" else _SCORE_ELEMENTS


@dataclass(frozen=True)
class _Scores:
    """Scores of a segment in float32; masked scores are -inf.

    Attributes:
        values: (batch, heads, queries, keys).
        products: queries times keys, before any scale; only with a scale for each head.
        softcap_slope: derivative of the softcap; None without a softcap.
        before_mod: the scores that the call's `ScoreMod` took; None without it.
        keep: which weights dropout keeps; None without dropout.
    """

    values: torch.Tensor
    products: torch.Tensor | None
    softcap_slope: torch.Tensor | None
    before_mod: torch.Tensor | None
    keep: torch.Tensor | None


def scores_of(q: torch.Tensor, k: torch.Tensor, segment: Segment) -> _Scores:
    """Compute the scores of the segment's `q` and `k`, which have equal numbers of heads."""
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
    before_mod = None
    if a.score_mod is not None:
        before_mod, values = values, segment.change(values).clone()
    bias, allowed = segment.bias(q.device), segment.allowed(q.device)
    if bias is not None:
        values += bias
    visible = visible_by(bias, allowed)
    if visible is not None:
        values.masked_fill_(~visible, NEGATIVE_INFINITY)
    return _Scores(values, products, slope, before_mod, kept_by_dropout(q, segment))


def kept_by_dropout(q: torch.Tensor, segment: Segment) -> torch.Tensor | None:
    a = segment.arguments
    if a.seed is None:
        return None
    seed, offset = seed_words(a.seed)
    heads = q.shape[1]
    first, device = segment.batch.start * heads, q.device
    # NumPy draws the numbers on a CPU and cannot read tensors that torch.func's transforms have wrapped.
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


def product_of_visible(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return ``weights @ values``; invisible values add nothing, not even if they are infinite or NaN."""
    product = torch.matmul(weights, values)
    if visible is None:
        return product
    strange = ~values.isfinite()
    finite = torch.matmul(weights.masked_fill(~visible, 0.0), values.masked_fill(strange, 0.0))
    sees_strange = torch.matmul(visible.float().expand(weights.shape), strange.float()) > 0.0
    return torch.where(sees_strange, product, finite)


def scores_of_seen(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return ``q @ k.T``. Scores that are not `visible` must not be used, and their NaN reaches no derivative."""
    if visible is None or not _is_strange(q, k):
        return torch.matmul(q, k.transpose(-1, -2))
    return torch.einsum("...nd,...nkd->...nk", q, _seen_by_each(k, visible))


def values_of_seen(weights: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return ``weights @ v``. Values that are not `visible` add nothing, and their NaN reaches no derivative."""
    if visible is None or not _is_strange(weights, v):
        return torch.matmul(weights, v)
    return torch.einsum("...nk,...nkd->...nd", weights, _seen_by_each(v, visible))


def _is_strange(*tensors: torch.Tensor) -> bool:
    """True if a readable tensor on a CPU has an infinite or NaN element."""
    return any(tensor.is_cpu and can_be_read(tensor) and not is_finite(tensor) for tensor in tensors)


def _seen_by_each(keys: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Copy keys or values for each query, (..., queries, keys, dim), with zeros for those it does not see.

    This takes much memory. Matrix products cannot be used: their derivatives add zero times NaN to the sums.
    """
    return torch.where(visible[..., None], rearrange(keys, "... keys dim -> ... 1 keys dim"), 0.0)


def largest_score(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return the largest logit of each row, to subtract before exponentials; 0 for a row without a finite logit."""
    if scores.shape[-1] == 0:
        maximum = scores.new_full((*scores.shape[:-1], 1), NEGATIVE_INFINITY)
    else:
        maximum = scores.amax(-1, keepdim=True)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks[:, None, None])
    return maximum.masked_fill(maximum == NEGATIVE_INFINITY, 0.0)


def float_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Widen a key or value to float32 (float64 stays) and repeat its heads to match the query heads."""
    group = heads // tensor.shape[1]
    wide = widened(tensor)
    return wide if group == 1 else repeat(wide, "batch kv_heads ... -> batch (kv_heads group) ...", group=group)


def _sum_groups(grad: torch.Tensor, group: int) -> torch.Tensor:
    """Add up the gradients of the query heads that share a key/value head."""
    return grad if group == 1 else reduce(grad, "batch (kv_heads group) ... -> batch kv_heads ...", "sum", group=group)
