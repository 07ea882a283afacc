"""Stacks of Transformer layers, and an encoder with a decoder ("Attention Is All You Need"), with torch.nn's names."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.nn.feed_forward import Activation
from fastformer.nn.multihead_attention import as_numbers
from fastformer.nn.normalization import LayerNorm
from fastformer.nn.plain import is_plain
from fastformer.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer, reads_masks


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: a stack of clones of one layer. Same constructor, state_dict, forward and outputs.

    It differs in two ways. In evaluation without gradients PyTorch sets the output at padding to zero; here the output
    is the same in training and evaluation, and undefined at padding. Nested tensors are neither made nor accepted.

    Args:
        encoder_layer: the layer to clone; the clones start with equal parameters.
        num_layers: the number of layers.
        norm: applied to the last layer's output.
        enable_nested_tensor, mask_check: accepted as in PyTorch, where they control nested tensors.

    >>> layer = fastformer.nn.TransformerEncoderLayer(d_model=64, nhead=8)
    >>> fastformer.nn.TransformerEncoder(layer, num_layers=2)(torch.randn(10, 2, 64)).shape
    torch.Size([10, 2, 64])
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # PyTorch would warn for every layer here that it cannot make nested tensors for it.
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """Encode `src`; masks are as in `TransformerEncoderLayer`, for every layer.

        ``is_causal=None`` means False: a causal `mask` is applied like any other mask. (PyTorch compares it with a
        causal one, which waits for the GPU and breaks a compiled graph.) Layers that a user has changed are called as
        PyTorch's encoder calls them: with masks as numbers. Those with their own forward are also told whether the mask
        is causal.
        """
        if not all(is_plain(layer, TransformerEncoderLayer) for layer in self.layers):
            mask = as_numbers("mask", mask, src.dtype)
            src_key_padding_mask = as_numbers("src_key_padding_mask", src_key_padding_mask, src.dtype)
        if is_causal is None and not all(reads_masks(layer, TransformerEncoderLayer) for layer in self.layers):
            is_causal = _is_causal(mask)
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: a stack of clones of one layer. Same constructor, state_dict, forward and outputs.

    Args:
        decoder_layer: the layer to clone; the clones start with equal parameters.
        num_layers: the number of layers.
        norm: applied to the last layer's output.

    >>> layer = fastformer.nn.TransformerDecoderLayer(d_model=64, nhead=8)
    >>> decoder = fastformer.nn.TransformerDecoder(layer, num_layers=2)
    >>> decoder(torch.randn(7, 2, 64), torch.randn(10, 2, 64), tgt_is_causal=True).shape
    torch.Size([7, 2, 64])
    """

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Decode `tgt`; arguments are as in `TransformerDecoderLayer`, for every layer.

        ``tgt_is_causal=None`` means False: a causal `tgt_mask` is applied like any other mask. Layers with their own
        forward are told whether it is causal, as in PyTorch's decoder.
        """
        if tgt_is_causal is None and not all(reads_masks(layer, TransformerDecoderLayer) for layer in self.layers):
            tgt_is_causal = _is_causal(tgt_mask)
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` on Fastformer's operators: same constructor, state_dict, forward and outputs.

    An encoder and a decoder (Vaswani et al. 2017), each with a final norm. For a target whose source is all padding
    PyTorch gives NaN; here the output stays finite, since attention to nothing adds zero.

    Args:
        d_model: the number of features of source and target.
        nhead: the number of attention heads.
        num_encoder_layers, num_decoder_layers: the numbers of layers of each kind.
        dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias: as in
            `TransformerEncoderLayer`, for all layers.
        custom_encoder, custom_decoder: called instead of those that the other arguments describe.
        device, dtype: of the parameters.

    >>> model = fastformer.nn.Transformer(d_model=64, nhead=8, num_encoder_layers=2, num_decoder_layers=2)
    >>> source, target = torch.randn(10, 2, 64), torch.randn(7, 2, 64)
    >>> model(source, target, tgt_mask=model.generate_square_subsequent_mask(7), tgt_is_causal=True).shape
    torch.Size([7, 2, 64])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first)
        if custom_encoder is None:
            custom_encoder = TransformerEncoder(
                TransformerEncoderLayer(*layer, **factory),
                num_encoder_layers,
                LayerNorm(d_model, eps=layer_norm_eps, **factory),
            )
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(
                TransformerDecoderLayer(*layer, **factory),
                num_decoder_layers,
                LayerNorm(d_model, eps=layer_norm_eps, **factory),
            )
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    def forward(
        self,
        src: torch.Tensor,
        tgt: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Encode `src` and decode `tgt`.

        Args:
            src: (source, batch, d_model), (batch, source, d_model) if `batch_first`, or (source, d_model).
            tgt: likewise with the target's length.
            src_mask: (source, source) or (batch * nhead, source, source); boolean, True = may not attend, or floating,
                added to the scores.
            tgt_mask, memory_mask: likewise, (target, target) and (target, source).
            src_key_padding_mask: (batch, source), unbatched (source,); boolean, True = padding, or floating.
            tgt_key_padding_mask, memory_key_padding_mask: likewise, (batch, target) and (batch, source).
            src_is_causal, tgt_is_causal, memory_is_causal: no query attends to later positions, counted from the first,
                even if the mask allows it. Attention then skips the work for those positions.

        Returns:
            The same shape as `tgt`.

        Raises:
            TypeError, ValueError: the message names the argument, what was given and what is accepted.
        """
        batch_dim = 0 if self.batch_first else 1
        if src.dim() == 3 and tgt.dim() == 3 and src.shape[batch_dim] != tgt.shape[batch_dim]:
            raise ValueError(
                f"src and tgt must have the same batch size, dimension {batch_dim}; got shapes {tuple(src.shape)} and "
                f"{tuple(tgt.shape)}"
            )
        for name, tensor in (("src", src), ("tgt", tgt)):
            if tensor.shape[-1] != self.d_model:
                raise ValueError(f"{name} must have d_model = {self.d_model} features; got shape {tuple(tensor.shape)}")
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )


def _is_causal(mask: torch.Tensor | None) -> bool:
    """Whether `mask` equals that of `generate_square_subsequent_mask` in its dtype; waits for a GPU, like PyTorch."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask, torch.full_like(mask, -math.inf).triu_(1))
