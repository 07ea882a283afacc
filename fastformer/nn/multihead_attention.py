"""Multi-head attention as a module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastformer.ops.attention.attention import attention
from fastformer.ops.attention.explicit import values_of_seen
from fastformer.ops.attention.segments import visible_by
from fastformer.ops.checks import FLOATING_DTYPES
from fastformer.ops.softmax import softmax


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on Fastformer's operator: same constructor, state_dict, forward and outputs.

    Scores of all queries and keys are held only if weights are requested. The projections are matrix products that read
    and write tensors in the given layout: neither layout is copied into the other.

    It differs from PyTorch only where PyTorch gives NaN, an error or a guess:

    - A query that may attend to nothing gives the output projection of zeros, zero weights and zero gradients
      (PyTorch: NaN).
    - ``is_causal=True`` is a condition, not a hint: it applies together with `attn_mask`, which may also be None
      (PyTorch requires a mask, and on some of its paths ignores it). Every position may attend to the keys of
      `add_bias_kv` and `add_zero_attn`.
    - The two masks may have different dtypes, and a floating mask may have another dtype than the input.
    - `out_proj` is called as a module, so that a replacement (LoRA, quantisation) and hooks take effect.
    - Nested tensors and float64 are refused with an error.

    Args:
        embed_dim: the number of features of the query and the output; a multiple of `num_heads`.
        num_heads: the number of attention heads, each with ``embed_dim / num_heads`` features, at most 512.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value to those projected.
        add_zero_attn: append one key and value of zeros.
        kdim, vdim: the numbers of features of key and value; by default `embed_dim`.
        batch_first: (batch, sequence, features) instead of (sequence, batch, features).
        device, dtype: of the parameters.

    Source: Vaswani et al. 2017, section 3.2.2.

    >>> attention = fastformer.nn.MultiheadAttention(embed_dim=64, num_heads=8, batch_first=True)
    >>> tokens = torch.randn(2, 10, 64)
    >>> output, weights = attention(tokens, tokens, tokens, is_causal=True)
    >>> output.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention.

        Args:
            query: (queries, batch, embed_dim), or (batch, queries, embed_dim) if `batch_first`; unbatched (queries,
                embed_dim).
            key, value: likewise, with the number of keys and `kdim` or `vdim` features.
            key_padding_mask: (batch, keys); unbatched (keys,). Boolean, True = ignore this key, or floating, added to
                the scores.
            need_weights: also return the attention weights, which takes memory for every query with every key. The
                output still comes from the fused operator, unless dropout is active. With dropout, as in PyTorch, the
                returned weights are those that made the output, and dropped ones are zero.
            attn_mask: (queries, keys) or (batch * num_heads, queries, keys). Boolean, True = may not attend, or
                floating, added to the scores.
            average_attn_weights: return the weights' mean over the heads instead of each head's.
            is_causal: no query attends to a key after its own position; positions count from the first.

        Returns:
            The output, in `query`'s layout, and the weights, or None if they are not needed. The weights are (batch,
            queries, keys), or (batch, num_heads, queries, keys) without averaging. Their keys include those that
            `add_bias_kv` and `add_zero_attn` append.

        Raises:
            TypeError, ValueError: the message names the argument, what was given and what is accepted.
        """
        self._check(query, key, value)
        batched = query.dim() == 3
        q, k, v = (self._split_heads(projected) for projected in self._project(query, key, value))
        (batch, _, queries, _), keys = q.shape, k.shape[2]
        padding = _as_scores("key_padding_mask", key_padding_mask, [(batch, keys) if batched else (keys,)], batch)
        scores = _as_scores("attn_mask", attn_mask, [(queries, keys), (batch * self.num_heads, queries, keys)], batch)
        k, v = self._with_extra_keys(k, v)
        extra = k.shape[2] - keys
        if is_causal and extra:
            scores, is_causal = _with_causal(scores, q, keys), False
        mask, bias = _mask_and_bias(padding, scores, extra, q.dtype)
        dropout_p = self.dropout if self.training else 0.0
        weights = _attention_weights(q, k, mask, bias, is_causal) if need_weights else None
        if weights is None or not dropout_p:
            attended = attention(
                q, k, v, mask=mask, bias=bias, causal=is_causal, alignment="top_left", dropout_p=dropout_p
            )
            assert isinstance(attended, torch.Tensor)
        else:
            weights = F.dropout(weights, dropout_p)
            # Only a CPU checks for NaN in values that a row does not see.
            visible = _visible(mask, bias, is_causal, weights) if v.is_cpu else None
            attended = values_of_seen(weights, v, visible)
        output = self.out_proj(self._merge_heads(attended, batched))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return output, weights

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        features = (self.embed_dim, self.kdim, self.vdim)
        for name, tensor, size in zip(("query", "key", "value"), (query, key, value), features, strict=True):
            if tensor.is_nested:
                raise TypeError(f"{name} must be a dense tensor, with padding in key_padding_mask; got a nested tensor")
            if query.dim() not in (2, 3) or tensor.dim() != query.dim() or tensor.shape[-1] != size:
                accepted = "3-D (batched) or all three 2-D (unbatched)" if name == "query" else "of query's dimensions"
                raise ValueError(f"{name} must be {accepted}, with {size} features; got shape {tuple(tensor.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and key.shape[batch_dim] != query.shape[batch_dim]):
            raise ValueError(
                "query, key and value must have the same batch size, key and value the same length; got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, with one matrix product for each group of equal inputs."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
        if weight is not None and key is value:
            q_weight, kv_weight = weight.tensor_split([self.embed_dim])
            kv_bias = None if bias is None else bias[self.embed_dim :]
            return F.linear(query, q_weight, q_bias), *F.linear(key, kv_weight, kv_bias).chunk(2, dim=-1)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q_weight, k_weight, v_weight = separate if weight is None else weight.chunk(3)
        return F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Split a projection in the inputs' layout into (batch, heads, sequence, head_dim).

        This and `_merge_heads` run in every call. einops would take twice the time on the host.
        """
        heads = projected.unflatten(-1, (self.num_heads, -1))
        if heads.dim() == 3:  # (sequence, heads, head_dim)
            return heads.transpose(0, 1).unsqueeze(0)
        # (batch, sequence, heads, head_dim), or (sequence, batch, heads, head_dim).
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _merge_heads(self, heads: torch.Tensor, batched: bool) -> torch.Tensor:
        """Invert `_split_heads`: (batch, heads, sequence, head_dim) becomes the inputs' layout, with merged heads."""
        if not batched:
            return heads.squeeze(0).transpose(0, 1).flatten(1)
        return (heads.transpose(1, 2) if self.batch_first else heads.permute(2, 0, 1, 3)).flatten(2)

    def _with_extra_keys(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the learned (`add_bias_kv`) and the zero (`add_zero_attn`) key and value."""
        if self.bias_k is not None and self.bias_v is not None:
            key, value = (
                torch.cat([x, learned.view(self.num_heads, 1, -1).to(x.dtype).expand(x.shape[0], -1, -1, -1)], dim=2)
                for x, learned in ((key, self.bias_k), (value, self.bias_v))
            )
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        return key, value


def _as_scores(name: str, mask: torch.Tensor | None, shapes: list[tuple[int, ...]], batch: int) -> torch.Tensor | None:
    """Shape PyTorch's mask, which has one of `shapes`, as (batch or 1, heads or 1, queries or 1, keys)."""
    if mask is None:
        return None
    _check_dtype(name, mask)
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {tuple(mask.shape)}")
    if name == "key_padding_mask":
        return mask.reshape(batch, 1, 1, mask.shape[-1])
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, -1))


def _check_dtype(name: str, mask: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{name} must be boolean (True = ignore), float32, float16 or bfloat16 (added to the scores); "
            f"got {mask.dtype}"
        )


def as_numbers(name: str, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn a mask into numbers to add to scores, as torch.nn's encoder and its layers pass it on."""
    if mask is None:
        return None
    _check_dtype(name, mask)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask


def _with_causal(mask: torch.Tensor | None, query: torch.Tensor, keys: int) -> torch.Tensor:
    """Combine PyTorch's 4-D `mask`, if any, with a causal mask."""
    later = torch.ones(query.shape[2], keys, dtype=torch.bool, device=query.device).triu(1)
    if mask is None:
        return later[None, None]
    return mask | later if mask.dtype == torch.bool else mask.masked_fill(later, float("-inf"))


def _mask_and_bias(
    padding: torch.Tensor | None, scores: torch.Tensor | None, extra_keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Turn PyTorch's 4-D masks into the operator's mask (True = may attend) and bias.

    The extra keys, which the given masks do not cover, may be attended to.
    """
    if extra_keys:
        padding, scores = (None if mask is None else F.pad(mask, (0, extra_keys)) for mask in (padding, scores))
    if padding is not None and scores is not None and padding.dtype == scores.dtype == torch.bool:
        # One boolean mask for both would have the product of their sizes; a mask and a bias have only the sum.
        scores = torch.zeros_like(scores, dtype=dtype).masked_fill_(scores, float("-inf"))
    mask, bias = None, None
    for given in (padding, scores):
        if given is None:
            continue
        if given.dtype == torch.bool:
            mask = ~given
        else:
            bias = given if bias is None else bias + given
    return mask, bias


def _visible(
    mask: torch.Tensor | None, bias: torch.Tensor | None, causal: bool, weights: torch.Tensor
) -> torch.Tensor | None:
    """The keys that each query sees, boolean, broadcasting to `weights`; None for all keys."""
    visible = visible_by(bias, mask)
    if not causal:
        return visible
    earlier = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    return earlier if visible is None else visible & earlier


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    # Scale before the product, which could overflow in float16.
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    if mask is not None and bias is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    return softmax(scores, mask=mask if bias is None else bias, causal=causal, alignment="top_left")
