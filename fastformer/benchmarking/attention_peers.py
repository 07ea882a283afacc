"""One attention, as Fastformer and each of its peers is asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer.benchmarking.calls import Function, compiled, forward, forward_backward
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Peer
from fastformer.benchmarking.timing import Run
from fastformer.ops import alibi_slopes, attention, scaled_dot_product_attention


@dataclass(frozen=True)
class Attention:
    """Self-attention of random tokens, and what a Transformer adds to it.

    Attributes:
        batch, heads, sequence, head_dim: of the query; `kv_heads`: of key and value, None: as many.
        causal: no key after the query's own position. window: and none further before it than this.
        alibi: a penalty of the distance. bias: (heads, sequence, sequence), added, with a gradient.
        softcap: of the scores. dropout_p: of the weights.
        lengths: of the sequences without their padding, the longest `sequence`; None: all full.
        packed: whoever can takes the sequences without padding.
        dtype, device, backward: of all tensors; whether gradients are computed.
    """

    batch: int
    heads: int
    sequence: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    backward: bool
    kv_heads: int | None = None
    causal: bool = False
    window: int | None = None
    alibi: bool = False
    bias: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    lengths: tuple[int, ...] | None = None
    packed: bool = False

    @property
    def flop(self) -> float:
        """Of the two products of the forward, five with the backward's, over the pairs that may attend.

        Half of them are causal; the recomputation of the weights counts once: 2.5 forwards for a backward, as in the
        FlashAttention papers.
        """
        lengths = self.lengths or (self.sequence,) * self.batch
        if self.window is None:
            pairs = sum(length**2 for length in lengths) * (0.5 if self.causal else 1.0)
        else:
            pairs = sum(min(query + 1, self.window + 1) for length in lengths for query in range(length))
        return 4 * self.heads * self.head_dim * pairs * (3.5 if self.backward else 1.0)

    @property
    def real(self) -> Tensor:
        """(batch, sequence) boolean: what is not padding."""
        lengths = torch.tensor(self.lengths or (self.sequence,) * self.batch, device=self.device)
        return torch.arange(self.sequence, device=self.device) < lengths[:, None]


def peers(call: Attention, flex: bool) -> dict[str, Peer]:
    """Everybody who can compute `call`, and where.

    Args:
        flex: whether FlexAttention takes part, which takes seconds to compile.
    """
    found = {
        OURS: Peer(partial(_run, call, _fastformer)),
        "PyTorch eager": Peer(partial(_run, call, _eager, False)),
    }
    if call.softcap is None:
        found |= _sdpa_peers(call)
    if flex and not call.dropout_p:
        # Its backward has no implementation for a CPU.
        devices = ("cuda",) if call.backward else ()
        found["FlexAttention"] = Peer(partial(_run, call, _flex), devices=devices, compiled=True)
    if not call.bias and (call.packed or call.lengths is None):
        found["flash-attn"] = Peer(partial(_run, call, _flash_attn), packages=("flash_attn",), devices=("cuda",))
    if call.softcap is None and not call.alibi and (call.packed or call.lengths is None):
        found["xFormers"] = Peer(partial(_run, call, _xformers), packages=("xformers",), devices=("cuda",))
    return found


def twin(call: Attention) -> Peer:
    """Our `scaled_dot_product_attention`, for a call that asks for nothing but `causal`."""
    return Peer(partial(_run, call, _twin))


def comparable(call: Attention) -> Callable[[Tensor], Tensor]:
    """Picks what must be equal of a result's tensor: the real tokens, packed, where some are padding."""
    real = call.real

    def select(tensor: Tensor) -> Tensor:
        if call.lengths is None:
            return tensor
        dense = tensor.shape[:2] == real.shape
        return tensor[real] if dense else tensor.reshape(-1, *tensor.shape[-2:])

    return select


def _sdpa_peers(call: Attention) -> dict[str, Peer]:
    """Each of `scaled_dot_product_attention`'s backends; what one refuses on a GPU, the results say."""
    learned_or_random = bool(call.dropout_p) or call.bias
    devices: dict[str, tuple[SDPBackend, tuple[str, ...]]] = {
        "SDPA math": (SDPBackend.MATH, ()),
        "SDPA flash": (SDPBackend.FLASH_ATTENTION, ("cuda",) if learned_or_random else ()),
        "SDPA memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
        "SDPA cuDNN": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    }
    found = {
        name: Peer(partial(_run, call, partial(_sdpa, backend), False), devices=where)
        for name, (backend, where) in devices.items()
    }
    if call.packed:
        found["SDPA, one sequence at a time"] = Peer(partial(_run, call, _sdpa_one_by_one))
    return found


def _run(call: Attention, make: Callable[[Attention], Function], packs: bool = True) -> Run:
    """The run of a function of query, key and value: (batch, sequence, heads, head_dim), or packed (tokens, ...).

    Args:
        make: makes it, with the masks and biases that a training run would make once.
        packs: whether it takes packed sequences packed.
    """
    random = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        shape = (call.batch, call.sequence, heads, call.head_dim)
        dense = torch.randn(shape, generator=random).to(call.device, call.dtype)
        if call.lengths is not None:
            # Nothing of the padding reaches what is compared, and no gradient comes from it.
            dense = dense * call.real[:, :, None, None]
        return dense[call.real] if call.packed and packs else dense

    kv_heads = call.kv_heads or call.heads
    inputs = [draw(heads).requires_grad_(call.backward) for heads in (call.heads, kv_heads, kv_heads)]
    gradient = draw(call.heads)
    if call.bias:
        bias = torch.randn(call.heads, call.sequence, call.sequence, generator=random)
        inputs.append(bias.to(call.device, call.dtype).requires_grad_(call.backward))
    function = make(call)
    return forward_backward(function, inputs, [gradient]) if call.backward else forward(function, inputs)


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32)


def _fastformer(call: Attention) -> Function:
    options: dict[str, Any] = {
        "causal": call.causal,
        "alignment": "top_left",  # a query's position is its own, whatever is padding
        "window": None if call.window is None else (call.window, None),
        "alibi_slopes": alibi_slopes(call.heads).to(call.device) if call.alibi else None,
        "softcap": call.softcap,
        "dropout_p": call.dropout_p,
    }
    if call.packed and call.lengths is not None:
        offsets, longest = _cu_seqlens(call.lengths, call.device), max(call.lengths)
        return partial(attention, cu_seqlens_q=offsets, max_seqlen_q=longest, **options)
    if call.lengths is not None:
        options["key_lengths"] = torch.tensor(call.lengths, dtype=torch.int32, device=call.device)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        output = attention(query, key, value, bias=bias, **options)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    return function


def _twin(call: Attention) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=call.causal).transpose(1, 2)

    return function


def _mask(call: Attention) -> Tensor | None:
    """Boolean, who may attend to whom, broadcastable to (batch, heads, sequence, sequence); None: all to all."""
    place = torch.arange(call.sequence, device=call.device)
    distance = place[:, None] - place
    mask = None
    if call.causal:
        mask = distance >= 0
    if call.window is not None:
        mask = (distance >= 0) & (distance <= call.window)
    if call.lengths is not None:
        real = call.real[:, None, None, :]
        mask = real if mask is None else real & mask
    return mask


def _added(call: Attention) -> Tensor | None:
    """What the mask and ALiBi add to the scores, (batch or 1, heads or 1, sequence, sequence)."""
    mask = _mask(call)
    if not call.alibi:
        zero = torch.zeros((), dtype=call.dtype, device=call.device)
        return None if mask is None else zero.masked_fill(~mask, float("-inf"))
    place = torch.arange(call.sequence, device=call.device)
    slopes = alibi_slopes(call.heads).to(call.device)
    added = (-slopes[:, None, None] * (place[:, None] - place).abs()).to(call.dtype)[None]
    return added if mask is None else added.masked_fill(~mask, float("-inf"))


def _eager(call: Attention) -> Function:
    """The formula, operation by operation, as models without a fused attention have it."""
    added = _added(call)
    groups = call.heads // (call.kv_heads or call.heads)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if groups > 1:
            key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        scores = query @ key.transpose(2, 3) * call.head_dim**-0.5
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        for part in (added, bias):
            scores = scores if part is None else scores + part
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        if call.dropout_p:
            weights = F.dropout(weights, call.dropout_p)
        return (weights @ value).transpose(1, 2)

    return function


def _sdpa(backend: SDPBackend, call: Attention) -> Function:
    causal = call.causal and call.window is None and not call.alibi and call.lengths is None
    mask = None if causal else (_added(call) if call.alibi else _mask(call))
    grouped = call.kv_heads is not None

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        added = mask if bias is None else bias[None]
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(
                query, key, value, added, call.dropout_p, is_causal=causal, enable_gqa=grouped
            )
        return output.transpose(1, 2)

    return function


def _sdpa_one_by_one(call: Attention) -> Function:
    """Packed sequences, each in a call of its own."""
    lengths = list(call.lengths or ())

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(each.transpose(0, 1)[None].split(lengths, 2) for each in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=call.causal) for q, k, v in parts]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return function


def _flex(call: Attention) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = alibi_slopes(call.heads).to(call.device)
    lengths = torch.tensor(call.lengths or (), dtype=torch.int64, device=call.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=call.device), lengths)
    packed = call.packed and call.lengths is not None

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        may = query >= key if call.causal or call.window is not None else query >= 0
        if call.window is not None:
            may = may & (query - key <= call.window)
        if packed:
            return may & (document[query] == document[key])
        return may if call.lengths is None else may & (key < lengths[batch])

    sequence = len(document) if packed else call.sequence
    masked = call.causal or call.window is not None or call.lengths is not None
    batch = call.batch if call.lengths is not None and not packed else None
    block_mask = create_block_mask(may_attend, batch, None, sequence, sequence, call.device) if masked else None
    attend = compiled(flex_attention)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        def change(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if call.softcap is not None:
                score = call.softcap * torch.tanh(score / call.softcap)
            if call.alibi:
                score = score - slopes[head] * (q - k).abs()
            return score if bias is None else score + bias[head, q, k]

        changes = call.softcap is not None or call.alibi or call.bias
        dense = [(each[None] if packed else each).transpose(1, 2) for each in (query, key, value)]
        output = attend(
            *dense,
            score_mod=change if changes else None,
            block_mask=block_mask,
            enable_gqa=call.kv_heads is not None,
        ).transpose(1, 2)
        return output[0] if packed else output

    return function


def _flash_attn(call: Attention) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {
        "dropout_p": call.dropout_p,
        "causal": call.causal,
        "window_size": (-1, -1) if call.window is None else (call.window, 0),
        "softcap": call.softcap or 0.0,
        "alibi_slopes": alibi_slopes(call.heads).to(call.device) if call.alibi else None,
    }
    if not call.packed or call.lengths is None:
        return partial(flash_attn_func, **options)
    offsets, longest = _cu_seqlens(call.lengths, call.device), max(call.lengths)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attn_varlen_func(query, key, value, offsets, offsets, longest, longest, **options)

    return function


def _xformers(call: Attention) -> Function:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    packed = call.packed and call.lengths is not None
    groups = call.heads // (call.kv_heads or call.heads)
    mask = attn_bias.LowerTriangularMask() if call.causal else None
    if call.window is not None:
        # Its window counts the query's own position too.
        mask = attn_bias.LowerTriangularFromBottomRightMask().make_local_attention(call.window + 1)
    if packed:
        mask = attn_bias.BlockDiagonalMask.from_seqlens(list(call.lengths or ()))
        mask = mask.make_causal() if call.causal else mask

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        dense = [each[None] if packed else each for each in (query, key, value)]
        if groups > 1:  # (batch, sequence, kv_heads, heads of each, head_dim)
            dense[0] = dense[0].unflatten(2, (-1, groups))
            dense[1:] = [each[:, :, :, None].expand(-1, -1, -1, groups, -1) for each in dense[1:]]
        added = mask if bias is None else bias.expand(call.batch, -1, -1, -1)
        output = memory_efficient_attention(*dense, attn_bias=added, p=call.dropout_p)
        output = output.flatten(2, 3) if groups > 1 else output
        return output[0] if packed else output

    return function
