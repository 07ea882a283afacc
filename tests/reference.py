"""The references: plain float64 implementations, which every operator is compared with."""

from __future__ import annotations

import torch
from einops import rearrange, repeat


def softmax(
    input: torch.Tensor,
    dim: int,
    *,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    causal_offset: int | None = None,
    log: bool = False,
) -> torch.Tensor:
    """The reference of softmax, in its input's dtype: float64 to judge, a lower one to measure PyTorch's own error."""
    scores = input * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if causal_offset is not None:
        last = dim % input.dim() == input.dim() - 1
        queries, keys = input.shape[-2 if last else -1], input.shape[dim]
        columns, rows = (torch.arange(size, device=input.device) for size in (keys, queries))
        later = columns[None, :] > rows[:, None] + causal_offset
        scores = scores.masked_fill(later if last else later.T, float("-inf"))
    empty = (scores == float("-inf")).all(dim, keepdim=True)
    function = torch.log_softmax if log else torch.softmax
    result = function(scores.masked_fill(empty, 0.0), dim)
    return result.masked_fill(empty | (scores == float("-inf")), float("-inf") if log else 0.0)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    alignment: str = "bottom_right",
    scale: float | torch.Tensor | None = None,
    softcap: float | None = None,
    relative_bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    chunk: int | None = None,
    prefix_lengths: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    key_lengths: torch.Tensor | None = None,
    part: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of attention, in its inputs' dtype: float64 to judge, a lower one to measure PyTorch's own error.

    `keep` says which weights dropout keeps. `part` is (first, total): `query` holds only some of the `total` queries,
    from number `first` on. Returns the output and the log-sum-exp.
    """
    if key_lengths is not None or prefix_lengths is not None:
        lengths = [key.shape[2]] * len(query) if key_lengths is None else key_lengths.tolist()
        parts = [
            _attention(
                query[b : b + 1],
                key[b : b + 1, :, :length],
                value[b : b + 1, :, :length],
                mask=_cut(mask, b, length),
                bias=_cut(bias, b, length),
                causal=causal,
                window=window,
                alignment=alignment,
                scale=scale,
                softcap=softcap,
                relative_bias=relative_bias,
                alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b],
                sinks=sinks,
                chunk=chunk,
                prefix=0 if prefix_lengths is None else int(prefix_lengths[b]),
                keep=_cut(keep, b, length),
                dropout_p=dropout_p,
                part=part,
            )
            for b, length in enumerate(lengths)
        ]
        return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts])
    return _attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        alignment=alignment,
        scale=scale,
        softcap=softcap,
        relative_bias=relative_bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        chunk=chunk,
        prefix=0,
        keep=keep,
        dropout_p=dropout_p,
        part=part,
    )


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None],
    alignment: str,
    scale: float | torch.Tensor | None,
    softcap: float | None,
    relative_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    chunk: int | None,
    prefix: int,
    keep: torch.Tensor | None,
    dropout_p: float,
    part: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the log-sum-exp of sequences of one length."""
    queries, keys, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (repeat(x, "batch kv_heads ... -> batch (kv_heads group) ...", group=group) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (
        query
        @ key.transpose(-1, -2)
        * (scale[:, None, None].to(query.dtype) if isinstance(scale, torch.Tensor) else scale)
    )
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    first, all_queries = part or (0, queries)
    first += keys - all_queries if alignment == "bottom_right" else 0
    key_position = torch.arange(keys, device=query.device)
    query_position = torch.arange(queries, device=query.device) + first
    distance = key_position - query_position[:, None]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if relative_bias is not None:
        reach = relative_bias.shape[1] // 2
        scores = scores + relative_bias[:, distance.clamp(-reach, reach) + reach]
    if bias is not None:
        scores = scores + bias
    allowed = torch.ones_like(distance, dtype=torch.bool) if mask is None else mask
    left, right = window
    if causal:
        right = 0
    if left is not None:
        allowed = allowed & (distance >= -left)
    if right is not None:
        allowed = allowed & ((distance <= right) | (key_position < prefix))
    if chunk is not None:
        allowed = allowed & (key_position // chunk == query_position[:, None] // chunk)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)], -1)
    if scores.shape[-1] == 0:
        return scores @ value, query.new_full(query.shape[:-1], float("-inf"))
    maximum = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = (weights / total)[..., :keys]
    if keep is not None:
        weights = weights * keep / (1.0 - dropout_p)
    lse = (maximum + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return weights @ value, lse


def _cut(tensor: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.expand((1,) * (4 - tensor.dim()) + tuple(tensor.shape)) if tensor.dim() < 4 else tensor
    tensor = tensor if tensor.shape[0] == 1 else tensor[batch : batch + 1]
    return tensor if tensor.shape[-1] == 1 else tensor[..., :length]


def philox(counter: tuple[int, int, int, int], key: int) -> list[int]:
    """Return the words of Philox-4x32-10 (Salmon et al., SC 2011), computed in plain integers."""
    c, k = list(counter), [key % 2**32, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def dropout_keep(seed: int, offset: int, dropout_p: float, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """A (batch, heads, queries, keys) mask of the weights that attention dropout keeps."""
    batch, heads, queries, keys = shape
    groups = (keys + 3) // 4
    words = [
        word
        for row in range(batch * heads)
        for query in range(queries)
        for group in range(groups)
        for word in philox((group, query, row, offset % 2**32), seed)
    ]
    keep = torch.tensor(words, dtype=torch.int64) >= round(dropout_p * 2**32)
    return keep.view(batch, heads, queries, 4 * groups)[..., :keys]


def matrix_dropout_keep(seed: int, offset: int, dropout_p: float, rows: int, columns: int) -> torch.Tensor:
    """A (rows, columns) mask of the elements that dropout of a matrix keeps."""
    threshold = round(dropout_p * 2**32)
    words = [
        [philox((c // 4, row % 2**32, row >> 32, offset % 2**32), seed)[c % 4] for c in range(columns)]
        for row in range(rows)
    ]
    return torch.tensor(words) >= threshold


def layer_norm(input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = input.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rms_norm(input: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = input.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def rotary(input: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn each pair of `input` (..., tokens, head_dim) by its angle; `angles` (..., tokens, pairs) are float64."""
    pairs = angles.shape[-1]
    turning, rest = input[..., : 2 * pairs].double(), input[..., 2 * pairs :].double()
    features = "(pairs two)" if interleaved else "(two pairs)"
    x, y = rearrange(turning, f"... {features} -> two ... pairs", two=2)
    cos, sin = angles.cos(), angles.sin()
    turned = rearrange([x * cos - y * sin, x * sin + y * cos], f"two ... pairs -> ... {features}")
    return torch.cat([turned, rest], -1)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The reference for logits (rows, classes), in their dtype: float64 to judge, a lower one for PyTorch's error."""
    classes = logits.shape[1]
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    w = z.new_ones(classes) if class_weight is None else class_weight.to(z.dtype)
    counts = target != ignore_index
    column = target.where(counts, torch.zeros_like(target))
    target_weight = w[column] * counts
    log_probabilities = z.log_softmax(1)
    losses = -target_weight * (1 - label_smoothing) * log_probabilities.gather(1, column[:, None]).squeeze(1)
    losses = losses - label_smoothing / classes * (log_probabilities * w).sum(1) * counts
    losses = losses + z_loss * target_weight * z.logsumexp(1) ** 2
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / target_weight.sum()}[reduction]


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def feed_forward(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
    hidden_scale: torch.Tensor | float = 1.0,
    output_scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The reference of feed-forward, in its inputs' dtype: float64 to judge, a lower one for PyTorch's own error.

    The scales are the factors of dropout: 0 or 1 / (1 - p).
    """

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x @ weight.T if bias is None else x @ weight.T + bias

    act = ACTIVATIONS[activation]
    up = linear(input, up_weight, up_bias)
    hidden = act(up) if gate_weight is None else act(linear(input, gate_weight, gate_bias)) * up
    output = linear(hidden * hidden_scale, down_weight, down_bias) * output_scale
    return output if residual is None else output + residual


def transformer_embedding(
    ids: list[torch.Tensor | None],
    tables: list[torch.Tensor | None],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """The reference of the input block, in its tables' dtype: float64 to judge, a lower one for PyTorch's own error."""
    total = sum(table[indices] for table, indices in zip(tables, ids, strict=True) if table is not None)
    output = torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return output if keep is None else output * keep.view(output.shape) / (1.0 - dropout_p)
