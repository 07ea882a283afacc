"""A call of every operator at a real size, with its reference, for all tests of this folder.

`CALLS` has them by name. Attention of many tokens, with all its features, is in test_attention.py: a reference of
the whole call would not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import reference
import torch
import torch.nn.functional as F
from einops import rearrange
from fastformer_kernels.plans import Plan, forced_plan
from gpu.judging import SEED, Call, Function
from gpu.making import Maker
from torch import Tensor

from fastformer import ops
from fastformer.ops.dropout import apply_dropout_, draw_seed

MakeCall = Callable[[Maker], Call]
VOCABULARY = 128_256  # Llama 3's


def dropout_scale(rows: int, columns: int, dropout_p: float, device: torch.device) -> Tensor:
    """Draw the factors, 0 or 1 / (1 - p), of the next call's dropout of a matrix, with the seed the call would draw."""
    return apply_dropout_(torch.ones(rows, columns, device=device), draw_seed(device), dropout_p)


# --- Softmax ----------------------------------------------------------------------------------------------------------


def _softmax(make: Maker, shape: tuple[int, ...], dim: int = -1, log: bool = False) -> Call:
    operator, pytorch = (ops.log_softmax, F.log_softmax) if log else (ops.softmax, F.softmax)
    return Call(
        lambda x: operator(x, dim),
        partial(reference.softmax, dim=dim, log=log),
        [make.normal(*shape, scale=3.0)],
        pytorch=lambda x: pytorch(x, dim),
        exponent=30.0,  # the difference of two scores
    )


def _masked_softmax(make: Maker) -> Call:
    heads, queries, keys = make.size(16, 2), make.size(1000, 5), make.size(2005, 9)
    options: dict[str, Any] = {"mask": make.booleans(1, 1, 1, keys, share=0.7), "scale": 0.5}
    exact = partial(reference.softmax, dim=-1, causal_offset=keys - queries, **options)
    tensors = [make.normal(1, heads, queries, keys, scale=3.0)]
    return Call(lambda x: ops.softmax(x, causal=True, **options), exact, tensors, exponent=30.0)


# --- Norms ------------------------------------------------------------------------------------------------------------


def _norm(make: Maker, rows: int, columns: int, centered: bool) -> Call:
    x = make.normal(rows, columns, scale=2.0).add_(1.0)
    if not centered:
        return Call(
            lambda x, w: ops.rms_norm(x, (columns,), w, 1e-5),
            lambda x, w: reference.rms_norm(x, w, 1e-5),
            [x, make.normal(columns)],
            pytorch=lambda x, w: F.rms_norm(x, (columns,), w, 1e-5),
        )
    return Call(
        lambda x, w, b: ops.layer_norm(x, (columns,), w, b, 1e-5),
        lambda x, w, b: reference.layer_norm(x, w, b, 1e-5),
        [x, make.normal(columns), make.normal(columns)],
        pytorch=lambda x, w, b: F.layer_norm(x, (columns,), w, b, 1e-5),
    )


def _norm_of_a_sum(make: Maker, columns: int) -> Call:
    """A norm after a projection's bias, dropout and the residual."""
    rows, dropout_p = make.size(8192, 7), 0.25

    def operator(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor) -> Any:
        norm = partial(ops.layer_norm, residual=residual, input_bias=input_bias, dropout_p=dropout_p)
        return norm(x, (columns,), weight, bias, 1e-5)

    def plain(norm: Function, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor) -> Any:
        torch.manual_seed(SEED)
        kept = dropout_scale(rows, columns, dropout_p, x.device).to(x.dtype)
        total = residual + (x + input_bias) * kept
        return norm(total, weight, bias), total

    return Call(
        operator,
        partial(plain, lambda total, weight, bias: reference.layer_norm(total, weight, bias, 1e-5)),
        [make.normal(rows, columns), make.normal(rows, columns), *(make.normal(columns) for _ in range(3))],
        pytorch=partial(plain, lambda total, weight, bias: F.layer_norm(total, (columns,), weight, bias, 1e-5)),
        random=True,
    )


# --- Positions --------------------------------------------------------------------------------------------------------


def _turned(cos: Tensor, sin: Tensor, interleaved: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rotate the pairs of each tensor in its own dtype."""
    turned, pairs = [], cos.shape[-1]
    features = "(pairs two)" if interleaved else "(two pairs)"
    for x in tensors:
        a, b = rearrange(x[..., : 2 * pairs], f"... {features} -> two ... pairs", two=2)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        rotated = rearrange([a * c - b * s, b * c + a * s], f"two ... pairs -> ... {features}")
        turned.append(torch.cat([rotated, x[..., 2 * pairs :]], -1))
    return tuple(turned)


def _rotary(make: Maker, interleaved: bool) -> Call:
    batch, sequence, head_dim = make.size(4, 2), make.size(4099, 9), make.size(128, 16)
    frequencies = ops.rotary_frequencies(head_dim // 2 if interleaved else head_dim)
    cos, sin = ops.rotary_table(frequencies, sequence, device=make.device)
    heads = make.size(16, 4), make.size(4, 2)
    return Call(
        lambda query, key: ops.rotary(query, key, cos, sin, interleaved=interleaved),
        partial(_turned, cos, sin, interleaved),
        [make.normal(batch, sequence, h, head_dim).transpose(1, 2) for h in heads],
    )


def _embedding(make: Maker) -> Call:
    batch, sequence, hidden = make.size(16, 2), make.size(512, 9), make.size(768, 20)
    words = make.size(50_000, 30)
    ids, types = make.integers(words, batch, sequence), make.integers(2, batch, sequence)
    positions = torch.arange(sequence, device=make.device).expand(batch, sequence)

    def operator(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        embed = partial(ops.transformer_embedding, token_type_ids=types, eps=1e-5)
        return embed(ids, word, position, token_type, weight, bias)

    def exact(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tables: list[Tensor | None] = [word, position, token_type]
        return reference.transformer_embedding([ids, positions, types], tables, weight, bias, 1e-5, None, 0.0)

    norm = [make.normal(hidden) for _ in range(2)]
    return Call(operator, exact, [*(make.normal(rows, hidden) for rows in (words, sequence, 2)), *norm])


# --- Feed-forward -----------------------------------------------------------------------------------------------------


def _feed_forward(make: Maker, activation: str, gated: bool, plan: Plan, dropout_p: float = 0.0) -> Call:
    tokens, features, intermediate = make.size(4100, 21), make.size(768, 20), make.size(3072, 37)
    shapes = [(tokens, features), (intermediate, features), (features, intermediate), (intermediate,), (features,)]
    shapes += [(intermediate, features), (intermediate,)] if gated else []
    # Weights are scaled so that products keep their variance; biases and tokens are standard normal.
    tensors = [
        make.normal(*shape, scale=shape[1] ** -0.5 if number in (1, 2, 5) else 1.0)
        for number, shape in enumerate(shapes)
    ]
    residual = make.normal(tokens, features)

    def operator(*given: Tensor) -> Tensor:
        *weights, added = given
        weights += [] if gated else [None, None]
        dropout = {"hidden_dropout_p": dropout_p, "output_dropout_p": dropout_p}
        with forced_plan(plan):
            return ops.feed_forward(*weights, activation, residual=added, **dropout)

    def exact(*given: Tensor) -> Tensor:
        *weights, added = given
        weights += [] if gated else [None, None]
        scales: list[Any] = [1.0, 1.0]
        if dropout_p:
            torch.manual_seed(SEED)
            scales = [dropout_scale(tokens, columns, dropout_p, make.device) for columns in (intermediate, features)]
        return reference.feed_forward(*weights, activation, added, *(torch.as_tensor(s).to(added) for s in scales))

    return Call(operator, exact, [*tensors, residual], random=dropout_p > 0.0)


# --- Losses -----------------------------------------------------------------------------------------------------------


def _cross_entropy(make: Maker, options: dict[str, Any]) -> Call:
    rows, classes = make.size(300, 7), make.size(VOCABULARY, 300)
    target = make.integers(classes, rows)
    target[::5] = -100

    def exact(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return reference.cross_entropy(wide, target, reduction="none", **options).to(logits.dtype)

    return Call(
        lambda logits: ops.cross_entropy(logits, target, reduction="none", **options),
        exact,
        [make.normal(rows, classes, scale=3.0)],
        exponent=30.0,
    )


def _linear_cross_entropy(make: Maker, reduction: str) -> Call:
    """A linear cross-entropy of several chunks of rows."""
    rows, features, classes = make.size(300, 21), make.size(256, 16), make.size(VOCABULARY, 70)
    target = make.integers(classes, rows)
    target[::4] = -100
    budget = make.size(128 * VOCABULARY * 2, 8 * 70 * 4)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = x @ weight.T + bias
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, target, reduction=reduction)

    return Call(
        lambda x, weight, bias: ops.linear_cross_entropy(
            x, weight, target, bias, reduction=reduction, memory_budget=budget
        ),
        exact,
        [make.normal(rows, features), make.normal(classes, features, scale=features**-0.5), make.normal(classes)],
        exponent=15.0,
    )


# --- Attention and its parts ------------------------------------------------------------------------------------------


def _attention(make: Maker, features: Callable[[Maker, int, int], dict[str, Any]], head_dim: int = 64) -> Call:
    queries, keys = make.size(1030, 21), make.size(1155, 26)
    heads, head_dim = make.size(4, 2), make.size(head_dim, 8)
    options = features(make, heads, keys)
    return Call(
        lambda query, key, value: ops.attention(query, key, value, return_lse=True, **options),
        lambda query, key, value: reference.attention(query, key, value, **options),
        [make.normal(2, size, h, head_dim).transpose(1, 2) for size, h in ((queries, heads), (keys, 1), (keys, 1))],
        exponent=15.0,
    )


def _packed_attention(make: Maker) -> Call:
    lengths = [make.size(700, 9), 1, 0, make.size(1090, 20), make.size(129, 7)]
    ends, total = make.ends(lengths), sum(lengths)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        outputs = [
            reference.attention(*(part.transpose(0, 1)[None] for part in three), causal=True)[0][0].transpose(0, 1)
            for three in parts
            if len(three[0])
        ]
        return torch.cat(outputs)

    return Call(
        lambda query, key, value: ops.attention(
            query, key, value, causal=True, cu_seqlens_q=ends, max_seqlen_q=max(lengths)
        ),
        exact,
        [make.normal(total, heads, make.size(64, 8)) for heads in (4, 2, 2)],
        exponent=15.0,
    )


def _merge(make: Maker) -> Call:
    parts, rows, head_dim = 4, make.size(65_537, 7), make.size(128, 20)

    def exact(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        weights = lses.softmax(0)[..., None]
        return (outputs * weights).sum(0).to(outputs.dtype), lses.logsumexp(0)

    tensors = [make.normal(parts, rows, head_dim)]
    return Call(ops.merge_attention, exact, tensors, [make.normal(parts, rows)], exponent=10.0)


def _weights(make: Maker) -> Call:
    batch, heads, tokens, head_dim = 1, make.size(4, 2), make.size(8195, 30), make.size(64, 8)
    first = tokens - make.size(64, 5)
    query, key = (make.normal(batch, heads, tokens, head_dim).bfloat16().float() for _ in range(2))
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=make.device).triu_(1)[first:]

    def scores(query: Tensor, key: Tensor) -> Tensor:
        products = query[:, :, first:] @ key.transpose(-1, -2) * head_dim**-0.5
        return products.masked_fill(later, float("-inf"))

    lse = torch.zeros(batch, heads, tokens, device=make.device)
    lse[:, :, first:] = scores(query.double(), key.double()).logsumexp(-1).float()
    return Call(
        lambda query, key: ops.attention_weights(query, key, lse, causal=True, rows=range(first, tokens)),
        lambda query, key: scores(query, key).softmax(-1),
        [query, key],
        backward=False,
        exponent=15.0,
    )


# --- Decoding ---------------------------------------------------------------------------------------------------------


def paged(caches: list[Tensor], page_size: int, order: Tensor) -> list[Tensor]:
    """Move contiguous caches (batch, kv_heads, capacity, head_dim) into pages, each at its place in `order`."""
    moved = []
    for cache in caches:
        in_order = rearrange(cache, "batch heads (pages slot) dim -> (batch pages) slot heads dim", slot=page_size)
        scattered = torch.empty_like(in_order)
        scattered[order.flatten()] = in_order
        moved.append(scattered)
    return moved


def page_order(make: Maker, batch: int, capacity: int, page_size: int | None) -> Tensor:
    """Return the page numbers (batch, pages of a sequence) in random order; unpaged, each sequence is one page."""
    pages = capacity // (page_size or capacity)
    order = torch.randperm(batch * pages, generator=make.random, device=make.device)
    return order.view(batch, pages)


def _decode(
    make: Maker,
    queries: int,
    page_size: int | None = None,
    head_dim: int = 128,
    splits: int | None = None,
    features: Callable[[Maker, int], dict[str, Any]] = lambda make, heads: {},
) -> Call:
    capacity, kv_heads, heads, head_dim = make.size(32_768, 32), 2, make.size(8, 4), make.size(head_dim, 8)
    lengths = make.tensor([capacity, capacity // 3 + 1, queries], torch.int32)
    given = features(make, heads)
    query = make.normal(3, heads, queries, head_dim)
    caches = [make.normal(3, kv_heads, capacity, dim) for dim in (head_dim, min(head_dim, 512))]
    order = page_order(make, 3, capacity, page_size)
    table = None if page_size is None else order.int()

    def operator(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if page_size is not None:
            key, value = paged([key, value], page_size, order)
        options = {"lengths": lengths, "block_table": table, "splits": splits, "return_lse": True}
        return ops.decode_attention(query, key, value, **options, **given)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return reference.attention(query, key, value, key_lengths=lengths, causal=True, **given)

    return Call(operator, exact, [query, *caches], backward=False, exponent=15.0)


def _append(make: Maker, tokens: int, page_size: int | None) -> Call:
    """An append, whose results are the rotated query and the caches with the new tokens, in contiguous order."""
    batch, kv_heads, heads, head_dim = 3, 2, make.size(8, 4), make.size(128, 8)
    capacity = make.size(4096, 32)
    lengths = make.tensor([0, capacity // 2, capacity - tokens], torch.int32)
    cos, sin = ops.rotary_table(ops.rotary_frequencies(head_dim), capacity, device=make.device)
    places = lengths[:, None].long() + torch.arange(tokens, device=make.device)
    batches = torch.arange(batch, device=make.device)[:, None]
    order = page_order(make, batch, capacity, page_size)
    table = None if page_size is None else order.int()

    def operator(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Any:
        written = [cache.clone() for cache in caches]
        if page_size is not None:
            written = paged(written, page_size, order)
        options = {"lengths": lengths, "block_table": table, "query": query, "cos": cos, "sin": sin}
        rotated = ops.append_to_cache(key, value, *written, **options)
        if page_size is not None:
            contiguous = "batch pages slot heads dim -> batch heads (pages slot) dim"
            written = [rearrange(cache[order], contiguous) for cache in written]
        return rotated, *written

    def exact(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Any:
        written = [cache.clone() for cache in caches]
        query, key = _turned(cos[places][:, None], sin[places][:, None], False, query, key)
        for cache, new in zip(written, (key, value), strict=True):
            cache[batches, :, places] = new.transpose(1, 2)
        return query, *written

    new = [make.normal(batch, h, tokens, head_dim) for h in (heads, kv_heads, kv_heads)]
    caches = [make.normal(batch, kv_heads, capacity, head_dim) for _ in range(2)]
    return Call(operator, exact, [*new, *caches], backward=False)


CALLS: dict[str, MakeCall] = {
    "softmax": lambda make: _softmax(make, (make.size(8192, 5), make.size(1000, 33))),
    "softmax of long rows": lambda make: _softmax(make, (make.size(300, 3), make.size(100_003, 17_000))),
    "softmax of few long rows": lambda make: _softmax(make, (make.size(8, 2), make.size(50_257, 16_401))),
    "log_softmax of few long rows": lambda make: _softmax(make, (7, make.size(131_072, 16_400)), log=True),
    "softmax of columns": lambda make: _softmax(make, (make.size(32, 2), make.size(4096, 9), make.size(96, 5)), dim=1),
    "log_softmax": lambda make: _softmax(make, (make.size(2048, 5), make.size(32_000, 33)), log=True),
    "masked causal softmax": _masked_softmax,
    "layer_norm": lambda make: _norm(make, make.size(16_384, 9), make.size(768, 24), centered=True),
    "layer_norm of odd rows": lambda make: _norm(make, make.size(5_000, 9), make.size(4_095, 515), centered=True),
    "layer_norm of wide rows": lambda make: _norm(make, make.size(1_000, 2), make.size(16_384, 8_200), centered=True),
    "layer_norm of long rows": lambda make: _norm(make, make.size(600, 2), make.size(65_536, 20_000), centered=True),
    "rms_norm": lambda make: _norm(make, make.size(8192, 9), make.size(4096, 24), centered=False),
    "rms_norm of odd rows": lambda make: _norm(make, make.size(4097, 9), make.size(5003, 23), centered=False),
    "layer_norm of a sum": lambda make: _norm_of_a_sum(make, make.size(1024, 24)),
    "rotary": lambda make: _rotary(make, interleaved=False),
    "interleaved rotary": lambda make: _rotary(make, interleaved=True),
    "embedding": _embedding,
    "fused feed_forward": lambda make: _feed_forward(make, "gelu", gated=False, plan="fused"),
    "library feed_forward": lambda make: _feed_forward(make, "gelu_tanh", gated=False, plan="library"),
    "fused gated feed_forward": lambda make: _feed_forward(make, "silu", gated=True, plan="fused"),
    "library gated feed_forward": lambda make: _feed_forward(make, "gelu", gated=True, plan="library"),
    "feed_forward with dropout": lambda make: _feed_forward(make, "relu", gated=False, plan="fused", dropout_p=0.25),
    "cross_entropy": lambda make: _cross_entropy(make, {}),
    "regularised cross_entropy": lambda make: _cross_entropy(
        make, {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 20.0}
    ),
    "linear_cross_entropy": lambda make: _linear_cross_entropy(make, "sum"),
    "linear_cross_entropy of rows": lambda make: _linear_cross_entropy(make, "none"),
    "attention": lambda make: _attention(make, lambda make, heads, keys: {}),
    "causal attention": lambda make: _attention(make, lambda make, heads, keys: {"causal": True}, head_dim=128),
    "attention with a mask": lambda make: _attention(
        make, lambda make, heads, keys: {"mask": make.booleans(2, 1, 1, keys, share=0.6), "softcap": 10.0}
    ),
    "packed attention": _packed_attention,
    "merge_attention": _merge,
    "attention_weights": _weights,
    "decode_attention": lambda make: _decode(make, queries=1),
    "paged decode_attention": lambda make: _decode(make, queries=1, page_size=make.size(16, 8)),
    "paged decode_attention of several": lambda make: _decode(
        make, queries=4, page_size=make.size(256, 8), head_dim=64
    ),
    "paged decode_attention of wide keys": lambda make: _decode(
        make, queries=2, page_size=make.size(16, 8), head_dim=576
    ),
    "decode_attention with a window": lambda make: _decode(
        make,
        queries=3,
        head_dim=80,
        splits=7,
        features=lambda make, heads: {"window": (make.size(1000, 9), None), "softcap": 20.0},
    ),
    "decode_attention with sinks": lambda make: _decode(
        make,
        queries=1,
        head_dim=192,
        features=lambda make, heads: {"sinks": make.normal(heads), "alibi_slopes": make.normal(heads).abs() * 0.01},
    ),
    "append_to_cache": lambda make: _append(make, tokens=1, page_size=None),
    "paged append_to_cache": lambda make: _append(make, tokens=make.size(130, 5), page_size=make.size(16, 8)),
}
