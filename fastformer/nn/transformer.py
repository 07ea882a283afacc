"""The encoder of "Attention Is All You Need" with torch.nn's names."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.feed_forward import ACTIVATIONS, Activation, is_plain_linear
from fastformer.nn.normalization import LayerNorm
from fastformer.ops.feed_forward import feed_forward


class TransformerEncoderLayer(nn.Module):
    """`torch.nn.TransformerEncoderLayer` on Fastformer's operators: same constructor, state_dict and forward.

    Args:
        d_model: features of the input.
        nhead: attention heads.
        dim_feedforward: features between the two feed-forward projections.
        dropout: of attention weights, activations and both blocks' outputs, in training.
        activation: "relu", "gelu" or any callable. ReLU, GELU (either form) and SiLU run fused into the projections;
            another callable, or dropout between the projections, runs as separate steps.
        layer_norm_eps: of both norms.
        batch_first: (batch, sequence, d_model) instead of (sequence, batch, d_model).
        norm_first: normalise before each block instead of after.
        bias: of projections and norms.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=batch_first, **factory)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **factory)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, **factory)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = _activation(activation)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Encode.

        Args:
            src: (sequence, batch, d_model), (batch, sequence, d_model) if `batch_first`, or (sequence, d_model).
            src_mask: (sequence, sequence) or (batch * nhead, sequence, sequence); boolean, True = may not attend, or
                floating, added to the scores.
            src_key_padding_mask: (batch, sequence); boolean, True = padding, or floating.
            is_causal: nobody attends to later positions, whether `src_mask` says so too or not.

        Returns:
            The same shape as `src`.
        """
        if self.norm_first:
            attended = self._attend(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            normalised, src = self.norm2(attended, residual=src)
            return src + self._feed_forward(normalised)
        attended = self._attend(src, src_mask, src_key_padding_mask, is_causal)
        src, _ = self.norm1(attended, residual=src)
        src, _ = self.norm2(self._feed_forward(src), residual=src)
        return src

    def _attend(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        output, _ = self.self_attn(src, src, src, key_padding_mask, False, mask, is_causal=is_causal)
        return self.dropout1(output)

    def _feed_forward(self, src: torch.Tensor) -> torch.Tensor:
        name = _fused_name(self.activation)
        drops = self.training and self.dropout.p > 0.0
        if name is None or drops or not is_plain_linear(self.linear1, self.linear2):
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(src)))))
        up, down = self.linear1, self.linear2
        return self.dropout2(feed_forward(src, up.weight, down.weight, up.bias, down.bias, activation=name))


class TransformerEncoder(nn.Module):
    """`torch.nn.TransformerEncoder`: a stack of clones of one layer. Same constructor, state_dict and forward.

    Args:
        encoder_layer: the layer to clone; the clones start with equal parameters.
        num_layers: how many.
        norm: applied to the last layer's output.
        enable_nested_tensor, mask_check: accepted as in PyTorch. They permit a faster way through padding there, which
            zeroes the output at padding in evaluation; here padding is always masked and its output is undefined.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """Encode `src`; masks as in `TransformerEncoderLayer`, for every layer.

        ``is_causal=None`` means False: a causal `mask` is applied as the mask it is. (PyTorch compares it with a causal
        one, which waits for the GPU.)
        """
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return src if self.norm is None else self.norm(src)


def _activation(activation: str | Activation) -> Activation:
    if not isinstance(activation, str):
        return activation
    if activation not in ("relu", "gelu"):
        raise ValueError(f"activation must be 'relu', 'gelu' or a callable; got {activation!r}")
    return ACTIVATIONS[activation]


def _fused_name(activation: Activation) -> str | None:
    """The operator's name for `activation`, or None if it has none."""
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if isinstance(activation, nn.ReLU):
        return "relu"
    if isinstance(activation, nn.SiLU):
        return "silu"
    return next((name for name, function in ACTIVATIONS.items() if function is activation), None)
