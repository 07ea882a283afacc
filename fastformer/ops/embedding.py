"""The input block of a Transformer: word, position and token type embeddings, LayerNorm and dropout (BERT's)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.checks import check_device, check_floating, check_like, check_shape
from fastformer.ops.dropout import apply_dropout_, check_dropout_p, draw_seed
from fastformer.ops.normalization import kernel_dropout, norm_backward_torch, norm_torch
from fastformer.ops.operator import operator
from fastformer.ops.packing import packed_positions

_NAMES = ("input_ids", "position_ids", "token_type_ids")


def transformer_embedding(
    input_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
) -> Tensor:
    """``dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids]))``.

    Args:
        input_ids: (batch, sequence), or packed (total_tokens,); int64 or int32.
        word_weight: (vocab_size, hidden_size), float32, float16 or bfloat16.
        position_weight: (max_positions, hidden_size), like `word_weight` in dtype; None for no positions.
        token_type_weight: (token_types, hidden_size), like `word_weight` in dtype; None for no types.
        norm_weight, norm_bias: (hidden_size,), LayerNorm's; float32, float16 or bfloat16.
        position_ids: like `input_ids`, or (1, sequence). By default the index within the sequence.
        token_type_ids: like `input_ids`; by default zeros.
        cu_seqlens: (batch + 1,) int32, the first token of each packed sequence and the total at the end; gives packed
            tokens their default positions.
        padding_idx: a word whose embedding gets no gradient.
        eps: added to the variance.
        dropout_p: probability of dropping an element of the result; see `layer_norm`.

    Returns:
        (*input_ids.shape, hidden_size) in word_weight's dtype, computed in float32. The tables' gradients are
        deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
        IndexError: an index is outside its table, on the CPU; a GPU is not waited for, such a token becomes NaN.

    Source: BERT (Devlin et al. 2019, section 3).
    """
    _check_integers("input_ids", input_ids, input_ids)
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be (batch, sequence) or (total_tokens,); got {tuple(input_ids.shape)}")
    check_floating("word_weight", word_weight)
    hidden_size = word_weight.shape[-1]
    for name, table in (
        ("word_weight", word_weight),
        ("position_weight", position_weight),
        ("token_type_weight", token_type_weight),
    ):
        if table is not None:
            check_like(name, table, "word_weight", word_weight)
            check_device(name, table, "input_ids", input_ids)
            if table.dim() != 2 or 0 in table.shape:
                raise ValueError(f"{name} must have shape (rows, hidden_size), not empty; got {tuple(table.shape)}")
            check_shape(name, table, (table.shape[0], hidden_size))
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None:
            check_floating(name, parameter)
            check_shape(name, parameter, (hidden_size,))
            check_device(name, parameter, "input_ids", input_ids)
    check_dropout_p(dropout_p)
    if padding_idx is not None and not 0 <= padding_idx < word_weight.shape[0]:
        raise ValueError(f"padding_idx must be from 0 to {word_weight.shape[0] - 1}; got {padding_idx}")
    if token_type_ids is not None:
        if token_type_weight is None:
            raise ValueError("token_type_ids was given without token_type_weight")
        _check_integers("token_type_ids", token_type_ids, input_ids)
        check_shape("token_type_ids", token_type_ids, tuple(input_ids.shape))
    positions = _positions(input_ids, position_weight, position_ids, cu_seqlens)
    output, _, _ = _embedding(
        input_ids.reshape(-1),
        positions,
        None if token_type_ids is None else token_type_ids.reshape(-1),
        word_weight,
        position_weight,
        token_type_weight,
        norm_weight,
        norm_bias,
        draw_seed(word_weight.device) if dropout_p else None,
        -1 if padding_idx is None else padding_idx,
        eps,
        dropout_p,
    )
    return output.view(*input_ids.shape, hidden_size)


def _check_integers(name: str, ids: Tensor, input_ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32; got {ids.dtype}")
    check_device(name, ids, "input_ids", input_ids)


def _positions(
    input_ids: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Each token's position, (tokens,); None where there is no table of positions."""
    if cu_seqlens is not None and input_ids.dim() != 1:
        raise ValueError(f"cu_seqlens is for packed input_ids, (total_tokens,); got {tuple(input_ids.shape)}")
    if position_weight is None:
        if position_ids is not None:
            raise ValueError("position_ids was given without position_weight")
        return None
    if position_ids is not None:
        _check_integers("position_ids", position_ids, input_ids)
        if position_ids.dim() != input_ids.dim() or position_ids.shape[0] != 1:
            check_shape("position_ids", position_ids, tuple(input_ids.shape))
        return position_ids.expand(input_ids.shape).reshape(-1)
    if cu_seqlens is not None:
        return packed_positions(cu_seqlens, input_ids.shape[0])
    if input_ids.dim() == 1:
        raise ValueError("packed input_ids, (total_tokens,), need cu_seqlens or position_ids for their positions")
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape).reshape(-1)


@operator("fastformer::embedding", mutates_args=())
def _embedding(
    word_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    padding_idx: int,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the rows' mean and rstd."""
    ids = _contiguous(word_ids, position_ids, token_type_ids)
    tables = _contiguous(word_weight, position_weight, token_type_weight)
    if _runs_kernel(word_ids, word_weight):
        from fastformer_kernels.embedding import embedding_forward

        weight, bias = _contiguous(norm_weight, norm_bias)
        return embedding_forward(ids, tables, weight, bias, eps, kernel_dropout(seed, dropout_p))
    total = _sum_torch(ids, tables)
    output, mean, rstd = norm_torch(total, norm_weight, norm_bias, eps, True, torch.float32)
    if seed is not None:
        output = apply_dropout_(output, seed, dropout_p)
    return output.to(word_weight.dtype), mean, rstd


@_embedding.register_fake
def _(
    word_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    padding_idx: int,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = word_ids.shape[0]
    mean = word_weight.new_empty(tokens, dtype=torch.float32)
    return word_weight.new_empty(tokens, word_weight.shape[1]), mean, torch.empty_like(mean)


@operator("fastformer::embedding_backward", mutates_args=())
def _embedding_backward(
    grad_output: Tensor,
    word_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    dropout_p: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three tables (in their dtype) and of LayerNorm's parameters (float32), empty if not `needed`."""
    ids = _contiguous(word_ids, position_ids, token_type_ids)
    tables = _contiguous(word_weight, position_weight, token_type_weight)
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    runs_kernel = _runs_kernel(word_ids, word_weight)
    if runs_kernel:
        from fastformer_kernels.embedding import embedding_backward

        grad_sum, grad_weight, grad_bias = embedding_backward(
            grad_output,
            ids,
            tables,
            None if norm_weight is None else norm_weight.contiguous(),
            mean,
            rstd,
            kernel_dropout(seed, dropout_p),
            weight_needs_grad=needed[3],
            bias_needs_grad=needed[4],
        )
    else:
        grad_output = grad_output.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if seed is not None:
            grad_output = apply_dropout_(grad_output, seed, dropout_p)
        grad_sum, grad_weight, grad_bias = norm_backward_torch(
            grad_output, _sum_torch(ids, tables), mean, rstd, norm_weight, True, needed[3], needed[4]
        )
    gradient = _table_gradient if runs_kernel else _table_gradient_torch
    grads = [rstd.new_empty(0) for _ in tables]
    for index, (indices, table) in enumerate(zip(ids, tables, strict=True)):
        if table is not None and needed[index]:
            indices = torch.zeros_like(word_ids) if indices is None else indices
            grads[index] = gradient(grad_sum, indices, table, padding_idx if index == 0 else -1)
    return (
        *grads,
        rstd.new_empty(0) if grad_weight is None else grad_weight,
        rstd.new_empty(0) if grad_bias is None else grad_bias,
    )  # type: ignore[return-value]


@_embedding_backward.register_fake
def _(
    grad_output: Tensor,
    word_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    dropout_p: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = (word_weight, position_weight, token_type_weight)
    columns = word_weight.shape[1]
    return (
        *(
            rstd.new_empty(0) if table is None or not need else table.new_empty(table.shape)
            for table, need in zip(tables, needed, strict=False)
        ),
        rstd.new_empty(columns if needed[3] else 0),
        rstd.new_empty(columns if needed[4] else 0),
    )  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, bias, seed, ctx.padding_idx, _, ctx.dropout_p = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors, seed, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 12
    tensors = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[3:8])
    grads = _embedding_backward(grad_output, *tensors, ctx.padding_idx, ctx.dropout_p, needed)
    dtypes = [*(None if tensor is None else tensor.dtype for tensor in tensors[3:7]), ctx.bias_dtype]
    returned = [grad.to(dtype) if need else None for grad, dtype, need in zip(grads, dtypes, needed, strict=True)]
    return *(None,) * 3, *returned, *(None,) * 4


_embedding.register_autograd(_backward, setup_context=_setup_context)


def _runs_kernel(word_ids: Tensor, word_weight: Tensor) -> bool:
    if not use_triton(word_weight) or word_ids.numel() == 0:
        return False
    from fastformer_kernels.embedding import MAX_COLUMNS

    # Beyond it a row with its gradients no longer fits in registers, and PyTorch's own steps are the better plan.
    return word_weight.shape[1] <= MAX_COLUMNS


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _table_gradient(grad_sum: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    from fastformer_kernels.embedding import table_gradient

    ordered, order = torch.sort(ids, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(table.shape[0] + 1, device=ids.device, dtype=ids.dtype))
    return table_gradient(grad_sum, order, starts, padding_idx)


def _table_gradient_torch(grad_sum: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    gradient = torch.ops.aten.embedding_dense_backward(grad_sum, ids, table.shape[0], padding_idx, False)
    return gradient.to(table.dtype)


def _sum_torch(ids: tuple[Any, ...], tables: tuple[Any, ...]) -> Tensor:
    """The sum of the embeddings, (tokens, hidden_size) float32."""
    total = None
    for name, indices, table in zip(_NAMES, ids, tables, strict=True):
        if table is None:
            continue
        if indices is not None and indices.device.type == "cpu" and indices.numel():
            low, high = (bound.item() for bound in indices.aminmax())
            if low < 0 or high >= table.shape[0]:
                raise IndexError(f"{name} must be from 0 to {table.shape[0] - 1}; got {low} to {high}")
        rows = table[0].float() if indices is None else F.embedding(indices, table).float()
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total
