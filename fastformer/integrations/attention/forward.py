"""The attention function of ``attn_implementation="fastformer"``, from a transformers model's call to our operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import _active_collector

from fastformer.integrations.attention import on_cpu, on_gpu
from fastformer.integrations.attention.mask import AttentionMask, MaskStructure, elements_of
from fastformer.integrations.attention.paged_cache import updated_pages
from fastformer.integrations.attention.sdpa import Sdpa, sdpa_backends
from fastformer.ops import attention, attention_weights
from fastformer.ops.packing import packed_sequences

# Arguments that models pass to their attention function although others use them: outputs, losses, caches, routers.
NOT_FOR_ATTENTION = frozenset(
    {
        "cache",
        "cache_position",
        "ignore_index",
        "labels",
        "logits_indices",
        "logits_processor_args",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",  # already used for the mask
        "read_index",
        "return_dict",
        "seq_idx",
        "shift_labels",
        "use_cache",
        "write_index",
    }
)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    max_length_q: int | None = None,
    max_length_k: int | dict[str, int] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | dict[str, int] | None = None,
    output_attentions: bool | None = None,
    deterministic: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer of a transformers model.

    Args:
        module: the layer. Dropout is active only if it is in training; its `is_causal` is the argument's default.
        query: (batch, heads, queries, head_dim); key, value: (batch, kv_heads, keys, head_dim).
        attention_mask: an `AttentionMask`, or 4-D: boolean, True = may attend, or floating, added to the scores. If it
            is given, `is_causal` and `sliding_window` are ignored.
        scaling, softcap, dropout: as `fastformer.attention`'s scale, softcap and dropout_p.
        sliding_window: the number of keys up to its own position that a query sees; without `is_causal` as many after.
        s_aux: (heads,), sinks. sinks: (batch, heads, queries, n), logits of each query that have no value.
        position_bias: broadcasts to (batch, heads, queries, keys), added to the scores, differentiable.
        indices: (batch, queries, n), the only keys that each query may see. block_indices: (batch, groups, queries, n),
            the only blocks of keys that the queries of each group of heads may see; negative entries are ignored.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: boundaries of the sequences in a packed batch.
        max_seqlen_q, max_seqlen_k: the last two in continuous batching before transformers 5.19.
        output_attentions: return the weights too, recomputed, before dropout and not differentiable.
        deterministic: whether gradients must be the same in every run.

    On a CPU without a chosen backend, the model's own SDPA runs instead if our operator would skip too little work to
    be faster. With dropout SDPA always runs there, and the pattern is then PyTorch's. On a GPU SDPA runs where
    `fastformer tune` measured that it is faster.

    Returns:
        The output, (batch, queries, heads, value_head_dim), and the weights, (batch, heads, queries, keys), or None.

    Raises:
        TypeError: an unknown argument. ValueError: an argument that cannot be combined with the others.
    """
    _check_understood(module, others)
    if deterministic and not torch.are_deterministic_algorithms_enabled():
        raise ValueError("deterministic=True needs torch.use_deterministic_algorithms(True)")
    if isinstance(cu_seq_lens_k, dict) or max_seqlen_q is not None:
        paged = {**others, "cu_seq_lens_k": cu_seq_lens_k}
        paged |= {"max_length_k": max_length_k} if max_seqlen_k is None else {"max_seqlen_k": max_seqlen_k}
        key, value, cu_seq_lens_k, max_length_k = updated_pages(module, key, value, paged)
        # Those releases make a mask that ignores the cache.
        max_length_q, attention_mask = max_length_q or max_seqlen_q, None
    batch = max(tensor.shape[0] for tensor in (query, key, value))
    query, key, value = (_of_batch(tensor, batch) for tensor in (query, key, value))
    queries, keys = query.shape[2], key.shape[2]
    structure = _structure(module, attention_mask, is_causal, sliding_window, (batch, 1, queries, keys))
    weights_wanted = _weights_wanted(output_attentions)
    dropout_p = dropout if module.training else 0.0
    if not weights_wanted and not any(
        given is not None for given in (softcap, s_aux, sinks, indices, block_indices, cu_seq_lens_q)
    ):
        choice = on_gpu.choose(structure, query, key, value, position_bias, dropout_p) or on_cpu.choose(
            structure, attention_mask, query, key, position_bias, dropout_p
        )
        if isinstance(choice, Sdpa):
            mask, causal, cudnn = choice
            with sdpa_backends(cudnn):
                return sdpa_attention_forward(
                    module, query, key, value, mask, dropout_p, scaling, is_causal=causal, position_bias=position_bias
                )
        structure = choice
    by_row = weights_wanted or any(given is not None for given in (position_bias, indices, block_indices, sinks))
    boundaries = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if (
        structure is not None
        and structure.block_mask is not None
        and any(given is not None for given in (indices, block_indices, cu_seq_lens_q))
    ):
        structure = None  # nothing can be combined with a block mask but its elements
    structure, allowed = _within_sequences(structure, boundaries, by_row, (batch, queries, keys))
    arguments = {"mask": elements_of(attention_mask)} if structure is None else structure.arguments()
    for selected in (allowed, *_selected(module, query, keys, indices, block_indices)):
        arguments["mask"] = _both(arguments["mask"], selected)
    arguments |= {"scale": scaling, "softcap": softcap, "bias": position_bias}
    packed = structure is not None and structure.is_packed
    tensors = [tensor.transpose(1, 2).flatten(0, 1) if packed else tensor for tensor in (query, key, value)]
    output, lse = attention(*tensors, **arguments, sinks=s_aux, dropout_p=dropout_p, return_lse=True)
    if packed:
        return output.unflatten(0, (batch, queries)), None
    output = output.transpose(1, 2)
    weights = _weights(query, key, lse, arguments) if weights_wanted else None
    if sinks is not None:
        share = torch.sigmoid(lse - sinks.float().logsumexp(-1))
        output = (output * share.transpose(1, 2)[..., None]).to(output.dtype)
        weights = None if weights is None else (weights * share[..., None]).to(weights.dtype)
    return output.contiguous(), weights


def _check_understood(module: torch.nn.Module, others: dict[str, Any]) -> None:
    if unknown := sorted(name for name in set(others) - NOT_FOR_ATTENTION if others[name] is not None):
        raise TypeError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which attn_implementation="
            f'"fastformer" does not know; use "eager" or "sdpa"'
        )


def _of_batch(tensor: Tensor, batch: int) -> Tensor:
    """Repeat without a copy a tensor that serves every sequence, as learned queries do."""
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def _structure(
    module: torch.nn.Module,
    mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    shape: tuple[int, int, int, int],
) -> MaskStructure | None:
    """Return who may attend to whom, without a dense mask; None if only the mask's elements define it."""
    if mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        reach = None if sliding_window is None else sliding_window - 1
        return MaskStructure(causal=bool(causal), window=(reach, reach))
    return mask.structure if isinstance(mask, AttentionMask) and tuple(mask.shape) == shape else None


def _within_sequences(
    structure: MaskStructure | None, boundaries: tuple[Any, ...], by_row: bool, shape: tuple[int, int, int]
) -> tuple[MaskStructure | None, Tensor | None]:
    """Limit attention to the sequences of a packed batch: by the structure, or else by a mask to be combined with it.

    Args:
        structure: who may attend to whom, so far.
        boundaries: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k; the first is None in a batch of rows.
        by_row: whether something else is laid out by row, which packed sequences are not.
        shape: batch, queries, keys.
    """
    if structure is not None and structure.is_packed:
        return (None if by_row else structure), None
    if boundaries[0] is None:
        return structure, None
    if structure is None or structure.key_mask is not None or structure.key_lengths is not None or by_row:
        return structure, _same_sequence(boundaries[0], *shape)
    return _packed(structure, *boundaries), None


def _selected(
    module: torch.nn.Module, query: Tensor, keys: int, indices: Tensor | None, block_indices: Tensor | None
) -> Iterator[Tensor]:
    """Yield a boolean mask for each selection of keys that the call makes."""
    if indices is not None:
        yield _chosen(indices, keys)[:, None]
    if block_indices is not None:
        indexer: Any = module.indexer
        yield _chosen_blocks(block_indices, indexer.block_size, query.shape[1], keys)


def _packed(
    structure: MaskStructure, cu_seqlens_q: Tensor, cu_seqlens_k: Any, max_length_q: int | None, max_length_k: Any
) -> MaskStructure:
    """Limit `structure` to the sequences that the boundaries define."""
    if max_length_q is None:
        raise ValueError("cu_seq_lens_q needs max_length_q, the length of the longest sequence")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    return replace(
        structure,
        alignment="bottom_right",
        cu_seqlens_q=cu_seqlens_q.int(),
        cu_seqlens_k=cu_seqlens_k.int(),
        max_seqlen_q=int(max_length_q),
        max_seqlen_k=int(max_length_q if max_length_k is None else max_length_k),
    )


def _same_sequence(cu_seqlens: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Make a (batch, 1, queries, keys) boolean mask, True between tokens of one sequence of a packed batch."""
    if queries != keys:
        raise ValueError(
            "cu_seq_lens_q of sequences with a cache cannot be combined with attention_mask, output_attentions, "
            "position_bias, sinks, indices or block_indices, which are laid out by row"
        )
    sequence = packed_sequences(cu_seqlens, batch * queries).view(batch, queries)
    return (sequence[:, :, None] == sequence[:, None, :])[:, None]


def _chosen(indices: Tensor, size: int) -> Tensor:
    """Make a (..., size) boolean mask, True at `indices` (..., n); negative indices are ignored."""
    marks = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter_(-1, indices.long().masked_fill(indices < 0, size), True)[..., :size]


def _chosen_blocks(indices: Tensor, block_size: int, heads: int, keys: int) -> Tensor:
    """Make a boolean (batch, heads, queries, keys) mask, True in blocks at `indices` (batch, groups, queries, n)."""
    blocks = _chosen(indices, -(-keys // block_size)).repeat_interleave(block_size, -1)[..., :keys]
    return blocks.repeat_interleave(heads // indices.shape[1], 1)


def _both(mask: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """Combine two masks: the first is boolean or additive, the second is boolean."""
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))


def _weights_wanted(output_attentions: bool | None) -> bool:
    """Whether the weights are needed: the call requests them, or the model collects its layers' outputs."""
    if output_attentions or torch.compiler.is_compiling():
        return bool(output_attentions)
    return any("attentions" in name for name in _active_collector.get() or ())


def _weights(query: Tensor, key: Tensor, lse: Tensor, arguments: dict[str, Any]) -> Tensor:
    weights = attention_weights(query, key, lse.detach(), **arguments)
    return _WithoutGradient.apply(weights, query, key) if torch.is_grad_enabled() else weights


class _WithoutGradient(torch.autograd.Function):
    """A function whose backward raises an error: recomputed weights would give a loss an incomplete gradient."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *inputs: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            'attention weights of attn_implementation="fastformer" are recomputed and not differentiable; use "eager"'
        )
