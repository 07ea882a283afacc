"""Attention in PyTorch: by its CPU flash attention where that can express the call, else by explicit scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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
from fastformer_kernels.dropout_numbers import kept_scale

from fastformer.ops.attention.explicit import (
    explicit_backward,
    explicit_forward,
    float_heads,
    kept_by_dropout,
    largest_score,
    scores_of,
    scores_of_seen,
    values_of_seen,
)
from fastformer.ops.attention.flash import fits_flash, flash_backward, flash_forward, hides_nan, is_finite
from fastformer.ops.attention.segments import (
    NEGATIVE_INFINITY,
    Segment,
    as_dense,
    dense_rows,
    segments,
    size,
    visible_by,
    whole_as_segment,
    widened,
)
from fastformer.ops.autocast import without_autocast


@without_autocast
def attention_forward_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp; see `fastformer.attention`."""
    if fits_flash(query, key, value, arguments) and not hides_nan(query, key, arguments):
        output, lse = flash_forward(query, key, value, arguments)
        # A non-finite output may come from a value that no query may see.
        if _shows_all(arguments) or is_finite(output):
            return output, lse
    output, lse = empty_output(query, value), empty_lse(query)
    dense = as_dense(query), as_dense(key), as_dense(value), as_dense(output)
    careful = query.is_cpu and not is_finite(value)
    for segment in segments(query, key, arguments):
        explicit_forward(*dense, dense_rows(lse), segment, careful)
    return output, lse


def _shows_all(arguments: AttentionArguments) -> bool:
    """Whether every query sees every key, as far as this is known without reading tensors."""
    a = arguments
    return (
        a.right == a.left == UNBOUNDED
        and a.mask is None
        and a.query_lists is None
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
    """Gradients of checked arguments; None for learned arguments that are not `needed`."""
    bias_learns = needed.bias or needed.relative or needed.alibi_slopes
    if grad_lse is None and not bias_learns and fits_flash(query, key, value, arguments):
        tensors = (grad_output, query, key, value, output, lse)
        gradients = flash_backward(*tensors, arguments)
        # A non-finite element would reach the gradients of all rows, masked or not.
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
    q, k, v, o, do = (as_dense(tensor) for tensor in (query, key, value, output, grad_output))
    grads = [as_dense(grad) for grad in (grad_query, grad_key, grad_value)]
    rows, grad_rows = dense_rows(lse), None if grad_lse is None else dense_rows(grad_lse)
    careful = query.is_cpu and not all(is_finite(tensor) for tensor in (query, key, value, grad_output))
    for segment in segments(query, key, arguments):
        explicit_backward(do, grad_rows, q, k, v, o, rows, grads, segment, sums, careful)
    return AttentionGradients(
        grad_query,
        grad_key,
        grad_value,
        *(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, learned, strict=True)
        ),
    )


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
    dense_query, dense_key, rows = as_dense(query), as_dense(key), dense_rows(lse)
    for segment in segments(query, key, chosen):
        q = segment.of_queries(dense_query)[:, heads]
        k = segment.of_keys(dense_key)[:, kv_heads].float()
        row_lse = _as_shift(segment.of_queries(rows)[:, heads])
        for place, row, length in runs:
            at = slice(row, min(row + length, q.shape[2]))
            if row < at.stop:
                values = scores_of(q[:, :, at].float(), k, segment._replace(queries=at)).values
                target = weights[segment.batch, :, place : place + size(at), segment.keys]
                target.copy_(values.sub_(row_lse[:, :, at]).exp_())
    return weights


@without_autocast
def attention_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `attention_forward_torch` returns, by differentiable functions; this holds all scores at once."""
    heads, q, k, v = query.shape[1], *map(as_dense, (query, key, value))
    outputs, lses = [], []
    for segment in segments(query, key, arguments):
        k_part, v_part = (float_heads(segment.of_keys(tensor), heads) for tensor in (k, v))
        output, lse = _attend(widened(segment.of_queries(q)), k_part, v_part, segment)
        outputs.append(_joined(output.to(query.dtype), arguments.packed, "sequences heads tokens head_dim"))
        lses.append(_joined(lse, arguments.packed, "sequences heads tokens"))
    if not outputs:
        return empty_output(query, value).zero_(), empty_lse(query)
    if arguments.packed:
        return torch.cat(outputs), torch.cat(lses, 1)
    return torch.cat(outputs), torch.cat(lses)


def _joined(part: torch.Tensor, packed: bool, names: str) -> torch.Tensor:
    """Bring a segment's part of the output or log-sum-exp into the layout of the call's tensors."""
    if not packed:
        return part
    target = "(sequences tokens) heads head_dim" if "head_dim" in names else "heads (sequences tokens)"
    return rearrange(part, f"{names} -> {target}")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one segment, from its own tensors with equal numbers of heads."""
    a = segment.arguments
    bias, allowed, keep = segment.bias(q.device), segment.allowed(q.device), kept_by_dropout(q, segment)
    visible = visible_by(bias, allowed)
    scores = scores_of_seen(q, k, visible) * a.scale
    if a.head_scales is not None:
        scores = scores * a.head_scales[:, None, None]
    if a.softcap:
        scores = torch.tanh(scores / a.softcap) * a.softcap
    scores = segment.change(scores)
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
    return values_of_seen(weights, v, visible) / total, lse.squeeze(-1)


def _runs(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield runs of consecutive rows in `rows`: the index of the first in `rows`, its row, and the run's length."""
    for _, run in itertools.groupby(enumerate(rows), lambda placed: placed[1] - placed[0]):
        (place, row), *others = run
        yield place, row, 1 + len(others)


def _all_weights(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, arguments: AttentionArguments
) -> torch.Tensor:
    """The weights of all heads and rows, for a call that is one segment."""
    whole = whole_as_segment(query, arguments)
    scores = scores_of(query.float(), float_heads(key, query.shape[1]), whole)
    return scores.values.sub_(_as_shift(lse)).exp_().to(query.dtype)


def _as_shift(lse: torch.Tensor) -> torch.Tensor:
    """The number to subtract from each row's scores; for a row that may attend to nothing all weights become zero."""
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
