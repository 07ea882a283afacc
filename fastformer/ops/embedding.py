"""The input block of a Transformer such as BERT: word, position and token type embeddings, LayerNorm and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.checks import check_device, check_floating, check_indices, check_like, check_shape
from fastformer.ops.dropout import apply_dropout_, check_dropout_p, draw_seed, dropped, kernel_dropout
from fastformer.ops.operator import in_dtype, operator, vjp
from fastformer.ops.packing import packed_positions

_INTEGERS = (torch.int64, torch.int32)


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
    """Compute ``dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids]))``.

    Args:
        input_ids: (batch, sequence), or packed (total_tokens,); int64 or int32.
        word_weight: (vocab_size, hidden_size), float32, float16 or bfloat16.
        position_weight: (max_positions, hidden_size), in `word_weight`'s dtype; None for no positions.
        token_type_weight: (token_types, hidden_size), in `word_weight`'s dtype; None for no types.
        norm_weight, norm_bias: (hidden_size,), of LayerNorm; float32, float16 or bfloat16.
        position_ids: shaped like `input_ids`, or (1, sequence). By default the index within the sequence.
        token_type_ids: shaped like `input_ids`; by default zeros.
        cu_seqlens: (batch + 1,) int32, the first token of each packed sequence and the total at the end; gives packed
            tokens their default positions.
        padding_idx: the index of a word whose embedding gets no gradient.
        eps: added to the variance.
        dropout_p: probability of dropping an element of the result; see `layer_norm`.

    Returns:
        (*input_ids.shape, hidden_size) in word_weight's dtype, computed in float32. The tables' gradients are
        deterministic.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.
        IndexError: an index is outside its table, on a CPU, or a sequence is longer than the table of positions. Other
            wrong indices on a GPU, which is not waited for, make their token NaN.

    Source: BERT (Devlin et al. 2019, section 3).
    """
    if input_ids.dtype not in _INTEGERS:
        raise TypeError(f"input_ids must be int64 or int32; got {input_ids.dtype}")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be (batch, sequence) or (total_tokens,); got {tuple(input_ids.shape)}")
    check_floating("word_weight", word_weight)
    dtype, device, hidden_size = word_weight.dtype, input_ids.device, word_weight.shape[-1]
    for name, table in (
        ("word_weight", word_weight),
        ("position_weight", position_weight),
        ("token_type_weight", token_type_weight),
    ):
        if table is None:
            continue
        shape = table.shape
        if len(shape) != 2 or 0 in shape or shape[1] != hidden_size or table.dtype != dtype or table.device != device:
            _refuse_table(name, table, word_weight, input_ids)
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None:
            check_floating(name, parameter)
            if parameter.shape != (hidden_size,) or parameter.device != device:
                check_shape(name, parameter, (hidden_size,))
                check_device(name, parameter, "input_ids", input_ids)
    check_dropout_p(dropout_p)
    if padding_idx is not None and not 0 <= padding_idx < word_weight.shape[0]:
        raise ValueError(f"padding_idx must be from 0 to {word_weight.shape[0] - 1}; got {padding_idx}")
    if token_type_ids is not None:
        if token_type_weight is None:
            raise ValueError("token_type_ids was given without token_type_weight")
        _check_integers("token_type_ids", token_type_ids, input_ids)
        if token_type_ids.shape != input_ids.shape:
            check_shape("token_type_ids", token_type_ids, tuple(input_ids.shape))
    output, _, _ = _embedding(
        input_ids,
        _positions(input_ids, position_weight, position_ids, cu_seqlens),
        token_type_ids,
        word_weight,
        position_weight,
        token_type_weight,
        norm_weight,
        norm_bias,
        draw_seed(device) if dropout_p else None,
        -1 if padding_idx is None else padding_idx,
        eps,
        dropout_p,
    )
    return output


def _refuse_table(name: str, table: Tensor, word_weight: Tensor, input_ids: Tensor) -> None:
    check_like(name, table, "word_weight", word_weight)
    check_device(name, table, "input_ids", input_ids)
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"{name} must have shape (rows, hidden_size), not empty; got {tuple(table.shape)}")
    check_shape(name, table, (table.shape[0], word_weight.shape[-1]))


def _check_integers(name: str, ids: Tensor, input_ids: Tensor) -> None:
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int64 or int32; got {ids.dtype}")
    check_device(name, ids, "input_ids", input_ids)


def _positions(
    input_ids: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """The position of each token, shaped like `input_ids`; None for default positions or without a table."""
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
        return position_ids.expand(input_ids.shape)
    if cu_seqlens is not None:
        return packed_positions(cu_seqlens, input_ids.shape[0])
    if input_ids.dim() == 1:
        raise ValueError("packed input_ids, (total_tokens,), need cu_seqlens or position_ids for their positions")
    if input_ids.shape[1] > position_weight.shape[0]:
        _refuse("position_ids", 0, input_ids.shape[1] - 1, position_weight)
    return None


# Tensors of words, positions and token types.
_WordsAnd = tuple[Tensor, Tensor | None, Tensor | None]


class _Embedding(NamedTuple):
    """One call's arguments. A token without ids has its index along the last dimension as position, and type 0."""

    word_ids: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    seed: Tensor | None
    padding_idx: int
    eps: float
    dropout_p: float


@operator("fastformer::embedding", mutates_args=())
def _embedding(call: _Embedding) -> tuple[Tensor, Tensor, Tensor]:
    """Output (*word_ids.shape, hidden_size), and the rows' mean and rstd, (*word_ids.shape, 1)."""
    runs_kernel = _runs_kernel(call.word_ids, call.word_weight)
    if runs_kernel or not call.word_ids.is_cpu:
        # On a CPU PyTorch's own functions check the ids.
        _check_ids(call)
    if runs_kernel:
        from fastformer_kernels.embedding import embedding_forward

        return embedding_forward(
            *_contiguous(_ids(call)),
            *_contiguous(_tables(call)),
            None if call.norm_weight is None else call.norm_weight.contiguous(),
            None if call.norm_bias is None else call.norm_bias.contiguous(),
            call.eps,
            kernel_dropout(call.seed, call.dropout_p),
        )
    total = _sum_torch(*_ids(call), *_tables(call))
    weight, bias = _widened(call.norm_weight), _widened(call.norm_bias)
    output, mean, rstd = torch.native_layer_norm(total, (call.word_weight.shape[1],), weight, bias, call.eps)
    if call.seed is not None:
        apply_dropout_(output.flatten(0, -2), call.seed, call.dropout_p)
    return in_dtype(output, call.word_weight.dtype), mean, rstd


def _ids(call: _Embedding | _EmbeddingBackward) -> _WordsAnd:
    return call.word_ids, call.position_ids, call.token_type_ids


def _tables(call: _Embedding | _EmbeddingBackward) -> _WordsAnd:
    return call.word_weight, call.position_weight, call.token_type_weight


def _check_ids(call: _Embedding) -> None:
    for name, ids, table in zip(
        ("input_ids", "position_ids", "token_type_ids"), _ids(call), _tables(call), strict=True
    ):
        if ids is not None and table is not None:
            check_indices(name, ids, table.shape[0])


@_embedding.register_fake
def _(call: _Embedding) -> tuple[Tensor, Tensor, Tensor]:
    mean = call.word_weight.new_empty((*call.word_ids.shape, 1), dtype=torch.float32)
    return call.word_weight.new_empty((*call.word_ids.shape, call.word_weight.shape[1])), mean, torch.empty_like(mean)


@_embedding.register_formula
def _formula(call: _Embedding) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids(call)
    total = _embedded(*_ids(call), *_tables(call), call.padding_idx)
    mean = total.mean(-1, keepdim=True)
    rstd = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + call.eps)
    output = (total - mean) * rstd
    if call.norm_weight is not None:
        output = output * call.norm_weight
    if call.norm_bias is not None:
        output = output + call.norm_bias
    if call.seed is not None:
        output = dropped(output, call.seed, call.dropout_p)
    return output.to(call.word_weight.dtype), mean, rstd


def _embedded(
    word_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
    padding_idx: int,
) -> Tensor:
    """Compute what `_sum_torch` returns, by differentiable functions; the word `padding_idx` gets no gradient."""
    total = F.embedding(word_ids, word_weight, padding_idx if padding_idx >= 0 else None).float()
    if position_weight is not None:
        found = (
            position_weight[: word_ids.shape[-1]]
            if position_ids is None
            else F.embedding(position_ids, position_weight)
        )
        total = total + found
    if token_type_weight is not None:
        found = token_type_weight[0] if token_type_ids is None else F.embedding(token_type_ids, token_type_weight)
        total = total + found
    return total


class _EmbeddingBackward(NamedTuple):
    """One call's arguments of the derivative, with the statistics that `_embedding` returned."""

    grad_output: Tensor
    word_ids: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    norm_weight: Tensor | None
    seed: Tensor | None
    mean: Tensor
    rstd: Tensor
    padding_idx: int
    dropout_p: float
    needed: Sequence[bool]


@operator("fastformer::embedding_backward", mutates_args=())
def _embedding_backward(
    call: _EmbeddingBackward,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The `needed` gradients of the three tables (in their dtype) and of LayerNorm's parameters (float32)."""
    grad_output = call.grad_output
    *tables_needed, weight_needed, bias_needed = call.needed
    runs_kernel = _runs_kernel(call.word_ids, call.word_weight)
    if runs_kernel:
        from fastformer_kernels.embedding import embedding_backward

        grad_sum, grad_weight, grad_bias = embedding_backward(
            grad_output,
            *_contiguous(_ids(call)),
            *_contiguous(_tables(call)),
            None if call.norm_weight is None else call.norm_weight.contiguous(),
            call.mean,
            call.rstd,
            kernel_dropout(call.seed, call.dropout_p),
            weight_needs_grad=weight_needed,
            bias_needs_grad=bias_needed,
        )
    else:
        total = _sum_torch(*_ids(call), *_tables(call))
        if call.seed is None:
            grad_output = grad_output.float()
        else:
            grad_output = grad_output.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            apply_dropout_(grad_output.flatten(0, -2), call.seed, call.dropout_p)
        grad_sum, grad_weight, grad_bias = _norm_backward_torch(
            grad_output,
            total,
            call.mean,
            call.rstd,
            call.norm_weight,
            True in tables_needed,
            weight_needed,
            bias_needed,
        )
    table_gradient = _table_gradient if runs_kernel else _table_gradient_torch
    word, position, token_type = None, None, None
    if tables_needed[0]:
        word = table_gradient(grad_sum, call.word_ids, call.word_weight, call.padding_idx)
    if call.position_weight is not None and tables_needed[1]:
        if call.position_ids is None:
            position = _first_rows_gradient(grad_sum.sum(0), call.position_weight)
        else:
            position = table_gradient(grad_sum, call.position_ids, call.position_weight, -1)
    if call.token_type_weight is not None and tables_needed[2]:
        if call.token_type_ids is None:
            token_type = _first_rows_gradient(grad_sum.flatten(0, -2).sum(0, keepdim=True), call.token_type_weight)
        else:
            token_type = table_gradient(grad_sum, call.token_type_ids, call.token_type_weight, -1)
    return word, position, token_type, grad_weight, grad_bias


@_embedding_backward.register_fake
def _(call: _EmbeddingBackward) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    of_norm = call.mean.new_empty(call.word_weight.shape[1])
    parameters = (*_tables(call), of_norm, of_norm)
    word, position, token_type, weight, bias = (
        parameter.new_empty(parameter.shape) if parameter is not None and need else None
        for parameter, need in zip(parameters, call.needed, strict=True)
    )
    return word, position, token_type, weight, bias


@_embedding_backward.register_formula
def _(call: _EmbeddingBackward) -> tuple[Tensor | None, ...]:
    # No gradient depends on LayerNorm's bias; a missing weight is replaced by ones.
    ones = call.mean.new_ones(call.word_weight.shape[1])
    weight, bias = ones if call.norm_weight is None else call.norm_weight, torch.zeros_like(ones)
    total = _embedded(*_ids(call), *_tables(call), call.padding_idx)
    # Recover epsilon: the given statistics contain it.
    eps = (call.rstd.square().reciprocal() - total.var(-1, correction=0, keepdim=True)).detach()

    def output(*tables_and_norm: Any) -> tuple[Tensor]:
        return (_formula(*_ids(call), *tables_and_norm, call.seed, call.padding_idx, eps, call.dropout_p)[0],)

    *of_tables, of_weight, of_bias = vjp(output, [*_tables(call), weight, bias], [call.grad_output])
    gradients = (*of_tables, None if of_weight is None else of_weight.float(), of_bias)
    return tuple(gradient if need else None for gradient, need in zip(gradients, call.needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, bias, seed, ctx.padding_idx, _, ctx.dropout_p = inputs
    _, mean, rstd = output
    weight = tensors[-1]
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors, seed, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(_Embedding._fields)
    needed = list(ctx.needs_input_grad[3:8])
    gradients = _embedding_backward(grad_output, *ctx.saved_tensors, ctx.padding_idx, ctx.dropout_p, needed)
    *tables, weight, bias = [grad if need else None for grad, need in zip(gradients, needed, strict=True)]
    if weight is not None:
        weight = in_dtype(weight, ctx.weight_dtype)
    if bias is not None:
        bias = in_dtype(bias, ctx.bias_dtype)
    return None, None, None, *tables, weight, bias, None, None, None, None


_embedding.register_autograd(_backward, setup_context=_setup_context)


def _contiguous(words_and: _WordsAnd) -> _WordsAnd:
    words, positions, token_types = words_and
    return (
        words.contiguous(),
        None if positions is None else positions.contiguous(),
        None if token_types is None else token_types.contiguous(),
    )


def _runs_kernel(word_ids: Tensor, word_weight: Tensor) -> bool:
    if not use_triton(word_weight) or word_ids.numel() == 0:
        return False
    from fastformer_kernels.embedding import MAX_COLUMNS

    # A longer row does not fit in registers together with its gradients; PyTorch's separate steps are faster then.
    return word_weight.shape[1] <= MAX_COLUMNS


def _table_gradient(grad_sum: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    from fastformer_kernels.embedding import table_gradient

    ordered, order = torch.sort(ids.flatten(), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(table.shape[0] + 1, device=ids.device, dtype=ids.dtype))
    return table_gradient(grad_sum, order, starts, padding_idx)


def _table_gradient_torch(grad_sum: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    gradient = torch.ops.aten.embedding_dense_backward(grad_sum, ids, table.shape[0], padding_idx, False)
    return in_dtype(gradient, table.dtype)


def _first_rows_gradient(gradient: Tensor, table: Tensor) -> Tensor:
    """Extend the gradient of the first rows of `table` by zeros for the other rows."""
    if gradient.shape[0] == table.shape[0]:
        return in_dtype(gradient, table.dtype)
    whole = torch.zeros_like(table, memory_format=torch.contiguous_format)
    whole[: gradient.shape[0]] = gradient
    return whole


def _norm_backward_torch(
    grad_output: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    sum_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> tuple[Any, Any, Any]:
    """Gradients of the sum of embeddings, of LayerNorm's weight and of its bias, float32."""
    # Only whether there is a bias matters here, not its values, so the weight replaces it. PyTorch has no bias without
    # a weight.
    weight = _widened(weight)
    needed = [sum_needed, weight_needed, bias_needed and weight is not None]
    grad_sum, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_output, total, total.shape[-1:], mean, rstd, weight, weight, needed
    )
    if bias_needed and weight is None:
        grad_bias = grad_output.flatten(0, -2).sum(0)
    return grad_sum, grad_weight, grad_bias


def _widened(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


def _sum_torch(
    word_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor | None,
    token_type_weight: Tensor | None,
) -> Tensor:
    """The sum of the embeddings, (*word_ids.shape, hidden_size) float32."""
    total = _rows("input_ids", word_ids, word_weight).float()
    if position_weight is not None:
        if position_ids is None:
            total += position_weight[: word_ids.shape[-1]]
        else:
            total += _rows("position_ids", position_ids, position_weight)
    if token_type_weight is not None:
        if token_type_ids is None:
            total += token_type_weight[0]
        else:
            total += _rows("token_type_ids", token_type_ids, token_type_weight)
    return total


def _rows(name: str, ids: Tensor, table: Tensor) -> Tensor:
    try:
        return torch.embedding(table, ids)
    except IndexError:
        low, high = ids.aminmax()
        _refuse(name, int(low), int(high), table)


def _refuse(name: str, low: int, high: int, table: Tensor) -> NoReturn:
    raise IndexError(f"{name} must be from 0 to {table.shape[0] - 1}; got {low} to {high}")
