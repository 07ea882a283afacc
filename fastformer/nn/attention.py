"""Multi-head attention as a module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastformer.ops.attention import attention
from fastformer.ops.softmax import softmax


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on Fastformer's operator: same constructor, state_dict and forward.

    It differs from PyTorch where PyTorch's answer is NaN or a guess:

    - A query that may attend to nothing gives the output projection of zeros, and zero weights (PyTorch: NaN).
    - ``is_causal=True`` is a condition, not a hint: it holds together with `attn_mask`, which may also be None.

    ``need_weights=True``, the default as in PyTorch, forms the weights of every query with every key;
    ``need_weights=False`` does not.
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
        """Attend.

        Args:
            query: (queries, batch, embed_dim), or (batch, queries, embed_dim) if `batch_first`; unbatched (queries,
                embed_dim).
            key, value: likewise with the number of keys, `kdim` and `vdim`.
            key_padding_mask: (batch, keys); unbatched (keys,). Boolean, True = ignore this key, or floating, added to
                the scores.
            need_weights: also return the attention weights.
            attn_mask: (queries, keys) or (batch * num_heads, queries, keys). Boolean, True = may not attend, or
                floating, added to the scores.
            average_attn_weights: return the weights' mean over the heads instead of each head's.
            is_causal: no key after the query's own position.

        Returns:
            The output, in `query`'s layout, and the weights (batch, queries, keys), or (batch, num_heads, queries,
            keys) without averaging, or None.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is accepted.
        """
        batched = query.dim() == 3
        self_attention = query is key and key is value
        query, key, value = (
            self._batch_first(name, tensor, batched)
            for name, tensor in (("query", query), ("key", key), ("value", value))
        )
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        per_head = attn_mask is not None and attn_mask.dim() == 3
        masks = [
            _allowed("key_padding_mask", key_padding_mask, (batch, 1, 1, keys), [(batch, keys)]),
            _allowed(
                "attn_mask",
                attn_mask,
                (batch if per_head else 1, self.num_heads if per_head else 1, queries, keys),
                [(queries, keys), (batch * self.num_heads, queries, keys)],
            ),
        ]
        if is_causal and (need_weights or self.bias_k is not None or self.add_zero_attn):
            masks.append(torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril())
            is_causal = False
        q, k, v = self._project(query, key, value, self_attention)
        k, v, extra = self._with_extra_keys(k, v)
        mask, bias = _boolean_and_additive(masks, extra)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.dropout(_attention_weights(q, k, mask, bias), dropout_p)
            output = weights @ v
        else:
            output = attention(
                q, k, v, mask=mask, bias=bias, causal=is_causal, alignment="top_left", dropout_p=dropout_p
            )
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch_first(self, name: str, tensor: torch.Tensor, batched: bool) -> torch.Tensor:
        """`tensor` as (batch, sequence, features)."""
        features = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}[name]
        if tensor.dim() != (3 if batched else 2) or tensor.shape[-1] != features:
            accepted = "3-D (batched) or all three 2-D (unbatched)" if name == "query" else "of query's dimensions"
            raise ValueError(f"{name} must be {accepted}, with {features} features; got shape {tuple(tensor.shape)}")
        if not batched:
            return tensor.unsqueeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, self_attention: bool
    ) -> tuple[torch.Tensor, ...]:
        if self_attention and self.in_proj_weight is not None:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0]:
            raise ValueError(
                "query, key and value must have the same batch size, key and value the same length; got (batch, "
                f"sequence) {tuple(query.shape[:2])}, {tuple(key.shape[:2])} and {tuple(value.shape[:2])}"
            )
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _with_extra_keys(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Append the learned (`add_bias_kv`) and the zero (`add_zero_attn`) key and value; returns their number too."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            row = (key.shape[0], 1, self.embed_dim)
            key = torch.cat([key, self.bias_k.to(key.dtype).expand(row)], dim=1)
            value = torch.cat([value, self.bias_v.to(value.dtype).expand(row)], dim=1)
            extra += 1
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
            extra += 1
        return key, value, extra


def _allowed(
    name: str, mask: torch.Tensor | None, view: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> torch.Tensor | None:
    """PyTorch's mask as (batch, heads, queries, keys): boolean with True = may attend, or additive."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean (True = ignore) or floating (added to the scores); got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {tuple(mask.shape)}")
    mask = mask.reshape(view)
    return ~mask if mask.dtype == torch.bool else mask


def _boolean_and_additive(
    masks: list[torch.Tensor | None], extra_keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """All boolean masks in one, all additive ones in one; the extra keys, which no mask knows, may be attended to."""
    boolean, additive = None, None
    for mask in masks:
        if mask is None:
            continue
        if extra_keys:
            mask = F.pad(mask, (0, extra_keys), value=mask.dtype == torch.bool)
        if mask.dtype == torch.bool:
            boolean = mask if boolean is None else boolean & mask
        else:
            additive = mask if additive is None else additive + mask
    return boolean, additive


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return softmax(scores)
