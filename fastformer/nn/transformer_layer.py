"""One layer of an encoder or a decoder with torch.nn's names: attention blocks and a feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.nn.feed_forward import ACTIVATIONS, Activation
from fastformer.nn.multihead_attention import MultiheadAttention, as_numbers
from fastformer.nn.normalization import LayerNorm, RMSNorm
from fastformer.nn.plain import dropout_p, is_own, is_plain, is_plain_linear
from fastformer.ops.feed_forward import feed_forward

Block = Callable[[torch.Tensor], torch.Tensor]


class _TransformerLayer(nn.Module):
    """The base of both kinds of layer: the parts, and the fused steps between them.

    Dropout and the addition of the residual follow every block. Both are fused into the next norm or, if none follows,
    into the feed-forward network's second matrix product. If a user has replaced a part (by a projection with LoRA, a
    norm, a dropout) or put a hook on it, it is called as PyTorch's layers call it, in separate steps.
    """

    # The names of the attention blocks, in order.
    _attentions: tuple[str, ...]

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
        # Not super(): PyTorch's own layer, which is a base of both layers here, would build its own parts.
        nn.Module.__init__(self)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        for name in self._attentions:
            self.add_module(name, MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **factory))
        self.linear1 = nn.Linear(d_model, dim_feedforward, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **factory)
        self.norm_first = norm_first
        blocks = range(1, len(self._attentions) + 2)
        for block in blocks:
            self.add_module(f"norm{block}", LayerNorm(d_model, eps=layer_norm_eps, **factory))
        for block in blocks:
            self.add_module(f"dropout{block}", nn.Dropout(dropout))
        self.activation = _activation(activation)
        # PyTorch's encoder reads this number, and passes nested tensors to layers where it is not 0.
        self.activation_relu_or_gelu = 0

    def _run_blocks(self, x: torch.Tensor, attentions: list[Block]) -> torch.Tensor:
        """Run the attention blocks in order, then the feed-forward block, each with dropout, residual and norm."""
        blocks = range(1, len(attentions) + 2)
        norms = [self.get_submodule(f"norm{block}") for block in blocks]
        dropouts = [self.get_submodule(f"dropout{block}") for block in blocks]
        if not self.norm_first:
            for block, dropout, norm in zip([*attentions, self._feed_forward], dropouts, norms, strict=True):
                x = _add_and_normalize(block(x), x, dropout, norm)
            return x
        hidden = norms[0](x)
        for attend, dropout, norm in zip(attentions, dropouts[:-1], norms[1:], strict=True):
            hidden, x = _add_and_normalize_with_sum(attend(hidden), x, dropout, norm)
        return self._feed_forward(hidden, residual=x)

    def _feed_forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Run the feed-forward block; with `residual`, also its dropout and the addition."""
        up, down, name = self.linear1, self.linear2, _fused_name(self.activation)
        dropout = self.get_submodule(f"dropout{len(self._attentions) + 1}")
        hidden_p, output_p = dropout_p(self.dropout), dropout_p(dropout) if residual is not None else 0.0
        if name is None or hidden_p is None or output_p is None or not is_plain_linear(up, down):
            output = down(self.dropout(self.activation(up(hidden))))
            return output if residual is None else residual + dropout(output)
        return feed_forward(
            hidden,
            up.weight,
            down.weight,
            up.bias,
            down.bias,
            activation=name,
            hidden_dropout_p=hidden_p,
            output_dropout_p=output_p,
            residual=residual,
        )


class TransformerEncoderLayer(_TransformerLayer, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on Fastformer's operators: same constructor, state_dict, forward and outputs.

    Self-attention and a feed-forward network, each with dropout, residual and norm. Only fused operators run between
    the matrix products: attention, the activation with its product, and each residual with its norm.

    It differs from PyTorch only where PyTorch gives NaN or an error; see `MultiheadAttention`.

    Args:
        d_model: the number of features of the input.
        nhead: the number of attention heads.
        dim_feedforward: the number of features between the two feed-forward projections.
        dropout: probability for attention weights, activations and both blocks' outputs, in training.
        activation: "relu", "gelu" or any callable. ReLU, GELU (either form) and SiLU, as functions or modules, are
            fused into the projections; another callable runs as a separate step.
        layer_norm_eps: the epsilon of both norms.
        batch_first: (batch, sequence, d_model) instead of (sequence, batch, d_model).
        norm_first: normalise before each block (Xiong et al. 2020) instead of after (Vaswani et al. 2017).
        bias: whether projections and norms have biases.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation.

    >>> layer = fastformer.nn.TransformerEncoderLayer(d_model=64, nhead=8, batch_first=True)
    >>> padding = torch.arange(10) >= torch.tensor([[10], [7]])
    >>> layer(torch.randn(2, 10, 64), src_key_padding_mask=padding).shape
    torch.Size([2, 10, 64])
    """

    _attentions = ("self_attn",)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Encode `src`.

        Args:
            src: (sequence, batch, d_model), (batch, sequence, d_model) if `batch_first`, or (sequence, d_model).
            src_mask: (sequence, sequence) or (batch * nhead, sequence, sequence); boolean, True = may not attend, or
                floating, added to the scores.
            src_key_padding_mask: (batch, sequence), unbatched (sequence,); boolean, True = padding, or floating.
            is_causal: no query attends to later positions, even if `src_mask` allows it. Attention then skips the work
                for those positions; a causal `src_mask` alone is applied like any other mask.

        Returns:
            The same shape as `src`.
        """

        if _replaces_a_block(self, TransformerEncoderLayer):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        if not is_plain(self.self_attn, MultiheadAttention):
            src_mask = as_numbers("src_mask", src_mask, src.dtype)
            src_key_padding_mask = as_numbers("src_key_padding_mask", src_key_padding_mask, src.dtype)

        def attend(x: torch.Tensor) -> torch.Tensor:
            return _attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        return self._run_blocks(src, [attend])


class TransformerDecoderLayer(_TransformerLayer, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on Fastformer's operators: same constructor, state_dict, forward and outputs.

    Self-attention, attention to an encoder's output and a feed-forward network, each with dropout, residual and norm.
    It is fused like `TransformerEncoderLayer` and takes the same arguments.

    >>> layer = fastformer.nn.TransformerDecoderLayer(d_model=64, nhead=8, batch_first=True)
    >>> memory, target = torch.randn(2, 10, 64), torch.randn(2, 7, 64)
    >>> layer(target, memory, tgt_is_causal=True).shape
    torch.Size([2, 7, 64])
    """

    _attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Decode `tgt`.

        Args:
            tgt: (target, batch, d_model), (batch, target, d_model) if `batch_first`, or (target, d_model).
            memory: the encoder's output; likewise, with the source's length.
            tgt_mask: (target, target) or (batch * nhead, target, target); boolean, True = may not attend, or floating,
                added to the scores.
            memory_mask: likewise, (target, source) or (batch * nhead, target, source).
            tgt_key_padding_mask: (batch, target), unbatched (target,); boolean, True = padding, or floating.
            memory_key_padding_mask: likewise, (batch, source), unbatched (source,).
            tgt_is_causal, memory_is_causal: no query attends to later positions, counted from the first, even if the
                mask allows it.

        Returns:
            The same shape as `tgt`.
        """

        if _replaces_a_block(self, TransformerDecoderLayer):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)

        def attend(x: torch.Tensor) -> torch.Tensor:
            return _attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_to_memory(x: torch.Tensor) -> torch.Tensor:
            return _attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        return self._run_blocks(tgt, [attend, attend_to_memory])


def _attend(
    attention: nn.Module,
    query: torch.Tensor,
    source: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """Call an attention, which a user may have replaced, with the argument names that PyTorch's layers use."""
    return attention(
        query, source, source, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False
    )[0]


def _add_and_normalize(
    output: torch.Tensor, residual: torch.Tensor, dropout: nn.Module, norm: nn.Module
) -> torch.Tensor:
    """Return ``residual + dropout(output)``, normalised."""
    p = dropout_p(dropout)
    if p is None or not is_plain(norm, LayerNorm, RMSNorm):
        return norm(residual + dropout(output))
    return norm(output, residual, dropout_p=p, return_sum=False)


def _add_and_normalize_with_sum(
    output: torch.Tensor, residual: torch.Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``residual + dropout(output)``, both normalised and not."""
    p = dropout_p(dropout)
    if p is None or not is_plain(norm, LayerNorm, RMSNorm):
        total = residual + dropout(output)
        return norm(total), total
    return norm(output, residual, dropout_p=p)


def _replaces_a_block(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a subclass of one of the layers has its own method for a block, with the name that PyTorch uses.

    If so, the layer runs PyTorch's forward, which calls these methods.
    """
    blocks = [name for name in ("_sa_block", "_mha_block", "_ff_block") if hasattr(kind, name)]
    return not all(_has_method_of(kind, layer, name) for name in blocks)


def reads_masks(layer: nn.Module, kind: type[_TransformerLayer]) -> bool:
    """Whether `layer` and its attentions run our own forwards, which read a mask even if it is declared causal."""
    if not _has_method_of(kind, layer, "forward") or _replaces_a_block(layer, kind):
        return False
    attentions = [layer.get_submodule(name) for name in kind._attentions]
    return all(_has_method_of(MultiheadAttention, attention, "forward") for attention in attentions)


def _has_method_of(kind: type[nn.Module], module: nn.Module, name: str) -> bool:
    """Whether a method is the one of `kind`, compared by classes, since torch.compile does not support `__func__`."""
    return getattr(type(module), name, None) is getattr(kind, name) and name not in vars(module)


def _activation(activation: str | Activation) -> Activation:
    if not isinstance(activation, str):
        return activation
    if activation not in ("relu", "gelu"):
        raise ValueError(f"activation must be 'relu', 'gelu' or a callable; got {activation!r}")
    return ACTIVATIONS[activation]


def _fused_name(activation: Activation) -> str | None:
    """The operator's name for `activation`, or None if it has none."""
    if isinstance(activation, nn.Module):
        if not is_own(activation):
            return None
        if type(activation) is nn.GELU:
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(activation))
    return next((name for name, function in ACTIVATIONS.items() if function is activation), None)
