"""An attention problem, and the calls of Fastformer and of each peer that solve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer.benchmarking.calls import Call, Function, compiled
from fastformer.benchmarking.inputs import maker
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Peer
from fastformer.ops import BlockMask, alibi_slopes, attention, scaled_dot_product_attention
from fastformer.ops.attention.block_mask import MaskFunction
from fastformer.ops.attention.packed_mask import masks_as_given

MAX_DISTANCE = 128
"""The largest distance with its own relative bias; all larger distances share one."""

FLEX = "FlexAttention"
BLOCK_MASK = f"{OURS}, block mask"
DENSE_MASK = f"{OURS}, dense mask"
MASK_OF_BYTES = f"{OURS}, dense mask that is not packed"


@dataclass(frozen=True)
class Attention:
    """Self-attention of random tokens, with the options that Transformers use.

    Attributes:
        batch, heads, sequence, head_dim: the shape of the query.
        dtype, device: the dtype and the device of all tensors.
        backward: whether gradients are computed.
        kv_heads: heads of key and value; None for the same number as the query has.
        causal: whether keys after the query's own position are masked.
        window: the number of keys before its own position that a query may attend to. Later keys are masked too.
        alibi: whether scores have a penalty that grows with the distance.
        bias: whether a bias (heads, sequence, sequence) with a gradient is added to the scores.
        relative_bias: whether a bias (heads, distances) with a gradient is added, by the distance of key and query.
        sinks: whether each head has a logit with a gradient that takes part in the softmax and has no value.
        softcap: the softcap of the scores.
        dropout_p: the dropout of the weights.
        lengths: lengths of the sequences without padding; the longest is `sequence`. None if nothing is padding.
        packed: whether peers that can take packed sequences get them without padding.
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
    relative_bias: bool = False
    sinks: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    lengths: tuple[int, ...] | None = None
    packed: bool = False

    @property
    def flop(self) -> float:
        """The operations of the matrix products over the pairs that may attend.

        Half of all pairs may attend if attention is causal. The forward has two products. The backward has five, with
        one recomputation of the scores: it counts as 2.5 forwards, as in the FlashAttention papers.
        """
        lengths = self.lengths or (self.sequence,) * self.batch
        if self.window is None:
            pairs = sum(length**2 for length in lengths) * (0.5 if self.causal else 1.0)
        else:
            pairs = sum(min(query + 1, self.window + 1) for length in lengths for query in range(length))
        return 4 * self.heads * self.head_dim * pairs * (3.5 if self.backward else 1.0)

    @property
    def learned(self) -> bool:
        """Whether the attention has learned parameters."""
        return self.bias or self.relative_bias or self.sinks

    @property
    def group(self) -> int:
        """The number of query heads for each key/value head."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def real(self) -> Tensor:
        """A (batch, sequence) boolean mask of the tokens that are not padding."""
        lengths = torch.tensor(self.lengths or (self.sequence,) * self.batch, device=self.device)
        return torch.arange(self.sequence, device=self.device) < lengths[:, None]


def peers(call: Attention, flex: bool) -> dict[str, Peer]:
    """All peers that can compute `call`, by name.

    Args:
        call: the attention to compute.
        flex: whether to include FlexAttention, which takes seconds to compile.
    """
    found = {
        OURS: Peer(partial(_call, call, _fastformer)),
        "PyTorch eager": Peer(partial(_call, call, _eager, False)),
    }
    if call.softcap is None and not call.sinks:
        found |= _sdpa_peers(call)
    if flex:
        found |= {name: peer for name, peer in compiled_peers(call).items() if name == FLEX}
    dense_or_packed = call.packed or call.lengths is None
    if dense_or_packed and not call.learned:
        found["flash-attn"] = Peer(partial(_call, call, _flash_attn), packages=("flash_attn",), devices=("cuda",))
    if dense_or_packed and call.softcap is None and not call.alibi and not call.relative_bias and not call.sinks:
        found["xFormers"] = Peer(partial(_call, call, _xformers), packages=("xformers",), devices=("cuda",))
    return found


def compiled_peers(call: Attention) -> dict[str, Peer]:
    """The peers that take seconds to compile."""
    found = {}
    if not call.dropout_p and not call.sinks:
        # FlexAttention's backward has no implementation for a CPU.
        devices = ("cuda",) if call.backward else ()
        found[FLEX] = Peer(partial(_call, call, _flex), devices=devices, compiled=True)
    found["torch.compile"] = Peer(partial(_call, call, _compiled_eager, False), compiled=True)
    return found


def with_block_mask(call: Attention) -> Peer:
    """Our attention with a block mask, for a call with no option except `causal`, `window`, `lengths`, `packed`."""
    return Peer(partial(_call, call, _block_mask))


def with_dense_mask(call: Attention, packed: bool) -> Peer:
    """Our attention with a boolean tensor for `causal` and `window`, which is packed to bits or read as it is."""
    return Peer(partial(_call, call, partial(_dense_mask, packed=packed), False))


def twin(call: Attention) -> Peer:
    """Our `scaled_dot_product_attention`, for a call with no option except `causal`."""
    return Peer(partial(_call, call, _twin))


def comparable(call: Attention) -> Callable[[Tensor], Tensor]:
    """Return a function that selects the comparable part of a result. If there is padding: the other tokens, packed."""
    real = call.real

    def select(tensor: Tensor) -> Tensor:
        if call.lengths is None:
            return tensor
        dense = tensor.shape[:2] == real.shape
        return tensor[real] if dense else tensor.reshape(-1, *tensor.shape[-2:])

    return select


def of_first_heads(call: Attention, results: Sequence[Tensor]) -> list[Tensor]:
    """Select the part of a peer's output and gradients that belongs to the query heads of the first key/value head.

    Padding tokens are left out.
    """
    select = comparable(call)
    heads = [call.group, call.group, 1, 1]  # heads of the output, and of the gradients of query, key and value
    tokens = [select(each)[..., :number, :] for each, number in zip(results, heads, strict=False)]
    return [*tokens, *(each[: call.group] for each in results[len(heads) :])]


def exact_first_heads(call: Attention) -> list[Tensor]:
    """Compute in float32, by the formula, what `of_first_heads` selects from correct results."""
    asked = _call(replace(call, packed=False), _no_attention)
    heads = [call.group, 1, 1]
    tokens = [each[:, :, :number] for each, number in zip(asked.inputs, heads, strict=False)]
    learned = [None if each is None else each[: call.group] for each in asked.inputs[len(heads) :]]
    inputs = [
        None if each is None else each.detach().float().requires_grad_(call.backward) for each in (*tokens, *learned)
    ]
    gradients = None if asked.gradients is None else [asked.gradients[0][:, :, : call.group].float()]
    added = _added(replace(call, dtype=torch.float32))
    if added is not None:
        added = added[:, : call.group] if added.dim() == 4 else added
    results = Call(_formula(call, added), inputs, gradients)()
    few = replace(call, heads=call.group, kv_heads=1)
    return of_first_heads(few, results)


def _sdpa_peers(call: Attention) -> dict[str, Peer]:
    """The backends of `scaled_dot_product_attention`. A backend that refuses a call on a GPU is reported as failed."""
    learned_or_random = bool(call.dropout_p) or call.learned
    devices: dict[str, tuple[SDPBackend, tuple[str, ...]]] = {
        "SDPA math": (SDPBackend.MATH, ()),
        "SDPA flash": (SDPBackend.FLASH_ATTENTION, ("cuda",) if learned_or_random else ()),
        "SDPA memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
        "SDPA cuDNN": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    }
    found = {
        name: Peer(partial(_call, call, partial(_sdpa, backend), False), devices=where)
        for name, (backend, where) in devices.items()
    }
    if call.packed:
        found["SDPA, one sequence at a time"] = Peer(partial(_call, call, _sdpa_one_by_one))
        found["PyTorch varlen_attn"] = Peer(partial(_call, call, _varlen), devices=("cuda",))
    return found


def _call(call: Attention, make_function: Callable[[Attention], Function], packs: bool = True) -> Call:
    """Make the call of a function of query, key, value, bias, relative bias and sinks.

    Query, key and value are (batch, sequence, heads, head_dim), or packed (tokens, heads, head_dim). The other three
    are None if `call` has none.

    Args:
        call: the attention to compute.
        make_function: makes the function, with the masks that a training run would make once.
        packs: whether the function accepts packed sequences.
    """
    make = maker(call.dtype, call.device)
    tokens = _real_tokens(call)

    def draw(heads: int) -> Tensor:
        dense = make.normal(call.batch, call.sequence, heads, call.head_dim, grad=False)
        if tokens is None:
            return dense
        # Padding is zero: it does not influence the compared results, and no gradient comes from it.
        return dense.flatten(0, 1)[tokens] if call.packed and packs else dense * call.real[:, :, None, None]

    kv_heads = call.kv_heads or call.heads
    query_key_value = [draw(heads) for heads in (call.heads, kv_heads, kv_heads)]
    gradient = draw(call.heads)
    learned = [
        make.normal(call.heads, *shape, grad=False) if wanted else None
        for wanted, shape in (
            (call.bias, (call.sequence, call.sequence)),
            (call.relative_bias, (2 * MAX_DISTANCE + 1,)),
            (call.sinks, ()),
        )
    ]
    inputs = [None if each is None else each.requires_grad_(call.backward) for each in (*query_key_value, *learned)]
    return Call(make_function(call), inputs, [gradient] if call.backward else None)


def _real_tokens(call: Attention) -> Tensor | None:
    """The positions, in the flattened batch, of the tokens that are not padding; None if there is no padding."""
    if call.lengths is None:
        return None
    places = [place * call.sequence + torch.arange(length) for place, length in enumerate(call.lengths)]
    return torch.cat(places).to(call.device)


def _no_attention(call: Attention) -> Function:
    """Make a function that computes nothing, for a call whose inputs are used but whose result is not."""
    return lambda *inputs: None


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32)


def _fastformer(call: Attention) -> Function:
    options: dict[str, Any] = {
        "causal": call.causal,
        "alignment": "top_left",  # padding does not change a query's position
        "window": None if call.window is None else (call.window, None),
        "alibi_slopes": alibi_slopes(call.heads).to(call.device) if call.alibi else None,
        "softcap": call.softcap,
        "dropout_p": call.dropout_p,
    }
    if call.packed and call.lengths is not None:
        offsets, longest = _cu_seqlens(call.lengths, call.device), max(call.lengths)

        def of_packed(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Any:
            return attention(query, key, value, cu_seqlens_q=offsets, max_seqlen_q=longest, **options)

        return of_packed
    if call.lengths is not None:
        options["key_lengths"] = torch.tensor(call.lengths, dtype=torch.int32, device=call.device)

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        output = attention(query, key, value, bias=bias, relative_bias=relative_bias, sinks=sinks, **options)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    return function


def _twin(call: Attention) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=call.causal).transpose(1, 2)

    return function


def _distances(call: Attention) -> Tensor:
    """The (sequence, sequence) distances from key to query, positive if the query comes after the key."""
    place = torch.arange(call.sequence, device=call.device)
    return place[:, None] - place


def _mask(call: Attention) -> Tensor | None:
    """A boolean mask of the pairs that may attend, broadcastable to (batch, heads, sequence, sequence); None: all."""
    mask = None
    if call.causal:
        mask = _distances(call) >= 0
    if call.window is not None:
        distance = _distances(call)
        mask = (distance >= 0) & (distance <= call.window)
    if call.lengths is not None:
        real = call.real[:, None, None, :]
        mask = real if mask is None else real & mask
    return mask


def _added(call: Attention) -> Tensor | None:
    """The tensor (batch or 1, heads or 1, sequence, sequence) that mask and ALiBi together add to the scores."""
    mask = _mask(call)
    if not call.alibi:
        zero = torch.zeros((), dtype=call.dtype, device=call.device)
        return None if mask is None else zero.masked_fill(~mask, float("-inf"))
    slopes = alibi_slopes(call.heads).to(call.device)
    added = (-slopes[:, None, None] * _distances(call).abs()).to(call.dtype)[None]
    return added if mask is None else added.masked_fill(~mask, float("-inf"))


def _places(call: Attention) -> Tensor:
    """The (sequence, sequence) indices of each pair of query and key in a table of relative biases."""
    return (-_distances(call)).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE


def _relative(places: Tensor, relative_bias: Tensor) -> Tensor:
    """The bias (heads, sequence, sequence) that a table of relative biases gives, computed as in T5."""
    return F.embedding(places, relative_bias.t()).permute(2, 0, 1).contiguous()


def _eager(call: Attention) -> Function:
    """Make the formula, operation by operation, as models without a fused attention compute it."""
    return _formula(call, _added(call))


def _compiled_eager(call: Attention) -> Function:
    return compiled(_eager(call))


def _formula(call: Attention, added: Tensor | None) -> Function:
    """Make the formula of attention, for any number of heads.

    Args:
        call: the attention to compute.
        added: a tensor that is added to the scores.
    """
    places = _places(call) if call.relative_bias else None

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if call.group > 1:
            key, value = (each.repeat_interleave(call.group, 1) for each in (key, value))
        scores = query @ key.transpose(2, 3) * call.head_dim**-0.5
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        relative = None if places is None or relative_bias is None else _relative(places, relative_bias)
        for part in (added, bias, relative):
            scores = scores if part is None else scores + part
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = weights if sinks is None else weights[..., :-1]
        if call.dropout_p:
            weights = F.dropout(weights, call.dropout_p)
        return (weights @ value).transpose(1, 2)

    return function


def _sdpa(backend: SDPBackend, call: Attention) -> Function:
    causal = call.causal and call.window is None and not call.alibi and call.lengths is None
    mask = None if causal else (_added(call) if call.alibi else _mask(call))
    places = _places(call) if call.relative_bias else None
    grouped = call.kv_heads is not None

    def function(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, relative_bias: Tensor | None, _: None
    ) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if places is not None and relative_bias is not None:
            bias = _relative(places, relative_bias)
        added = mask if bias is None else bias[None]
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(
                query, key, value, added, call.dropout_p, is_causal=causal, enable_gqa=grouped
            )
        return output.transpose(1, 2)

    return function


def _sdpa_one_by_one(call: Attention) -> Function:
    """Make attention of packed sequences with one call for each sequence."""
    lengths = list(call.lengths or ())

    def function(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Tensor:
        parts = zip(*(each.transpose(0, 1)[None].split(lengths, 2) for each in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=call.causal) for q, k, v in parts]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return function


def _varlen(call: Attention) -> Function:
    """Make PyTorch's attention for packed sequences, which calls its build of FlashAttention-2."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = call.lengths or (call.sequence,) * call.batch
    offsets, longest = _cu_seqlens(lengths, call.device), max(lengths)
    window = (-1, 0) if call.causal else (-1, -1)

    def function(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Any:
        return varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=window)

    return function


def _predicate(call: Attention) -> tuple[MaskFunction, int | None, int]:
    """Who may attend to whom, as a function of indices, with its batch (None: the same for all) and its sequence.

    Packed sequences are one sequence of documents.
    """
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

    batch = call.batch if call.lengths is not None and not packed else None
    return may_attend, batch, len(document) if packed else call.sequence


def _dense_mask(call: Attention, packed: bool) -> Function:
    mask = _mask(call)

    def function(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        with nullcontext() if packed else masks_as_given():
            output = attention(query, key, value, mask=mask)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    return function


def _block_mask(call: Attention) -> Function:
    """Our attention with a block mask made of FlexAttention's function."""
    may_attend, batch, sequence = _predicate(call)
    mask = BlockMask.from_function(may_attend, batch, None, sequence, sequence, device=call.device)

    def function(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Tensor:
        packed = query.dim() == 3
        query, key, value = ((each[None] if packed else each).transpose(1, 2) for each in (query, key, value))
        output = attention(query, key, value, mask=mask)
        assert isinstance(output, Tensor)
        output = output.transpose(1, 2)
        return output[0] if packed else output

    return function


def _flex(call: Attention) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = alibi_slopes(call.heads).to(call.device)
    packed = call.packed and call.lengths is not None
    may_attend, batch, sequence = _predicate(call)
    masked = call.causal or call.window is not None or call.lengths is not None
    block_mask = create_block_mask(may_attend, batch, None, sequence, sequence, call.device) if masked else None
    attend = compiled(flex_attention)

    def function(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, relative_bias: Tensor | None, _: None
    ) -> Tensor:
        def change(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if call.softcap is not None:
                score = call.softcap * torch.tanh(score / call.softcap)
            if call.alibi:
                score = score - slopes[head] * (q - k).abs()
            if relative_bias is not None:
                score = score + relative_bias[head, (k - q).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]
            return score if bias is None else score + bias[head, q, k]

        changes = call.softcap is not None or call.alibi or call.bias or call.relative_bias
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
        return lambda query, key, value, *_: flash_attn_func(query, key, value, **options)
    offsets, longest = _cu_seqlens(call.lengths, call.device), max(call.lengths)

    def function(query: Tensor, key: Tensor, value: Tensor, *_: None) -> Tensor:
        return flash_attn_varlen_func(query, key, value, offsets, offsets, longest, longest, **options)

    return function


def _xformers(call: Attention) -> Function:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    packed = call.packed and call.lengths is not None
    groups = call.group
    mask = attn_bias.LowerTriangularMask() if call.causal else None
    if call.window is not None:
        # The window of xFormers counts the query's own position too.
        mask = attn_bias.LowerTriangularFromBottomRightMask().make_local_attention(call.window + 1)
    if packed:
        mask = attn_bias.BlockDiagonalMask.from_seqlens(list(call.lengths or ()))
        mask = mask.make_causal() if call.causal else mask

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *_: None) -> Tensor:
        dense = [each[None] if packed else each for each in (query, key, value)]
        if groups > 1:  # (batch, sequence, kv_heads, heads of each, head_dim)
            dense[0] = dense[0].unflatten(2, (-1, groups))
            dense[1:] = [each[:, :, :, None].expand(-1, -1, -1, groups, -1) for each in dense[1:]]
        added = mask if bias is None else bias.expand(call.batch, -1, -1, -1)
        output = memory_efficient_attention(*dense, attn_bias=added, p=call.dropout_p)
        output = output.flatten(2, 3) if groups > 1 else output
        return output[0] if packed else output

    return function
