"""The reference of attention, one block of queries at a time, for sequences whose scores would not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import reference
import torch
from attention_accuracy import learned_in, magnitudes, result_names
from gpu.judging import SEED, assert_within, precision, unit_of
from gpu.making import Maker
from torch import Tensor

from fastformer import BlockMask
from fastformer.ops import attention
from fastformer.ops.attention.dropout import dropout_keep
from fastformer.ops.dropout import draw_seed

# Scores of a block: 256 MiB in float64. Autograd keeps about ten tensors of this size.
ELEMENTS = 1 << 25
Results = dict[str, Tensor]


def judge_attention(
    tensors: list[Tensor], options: dict[str, Any], precision_name: str, ends: list[int] | None = None
) -> None:
    """Fail unless a dense or packed call and its gradients obey the rule of accuracy in a precision of `DTYPES`.

    Args:
        tensors: query, key and value in float32; packed (total_tokens, heads, head_dim) with `ends`.
        options: the call's other arguments. Those that are learned get a gradient too; packed calls must have none.
        ends: the boundaries of packed sequences.
    """
    with precision(precision_name) as dtype:
        tensors = [tensor.to(dtype) for tensor in tensors]
        options = {name: value.to(dtype) if name.endswith("bias") else value for name, value in options.items()}
        grads = _output_grads(tensors, packed=ends is not None)
        actual = _of_the_operator(tensors, options, grads, ends)
        exact = _by_sequences([tensor.double() for tensor in tensors], options, grads, ends)
        pytorch = _by_sequences(tensors, options, grads, ends)
    for name, units in magnitudes(actual, exact, _dense(grads[0]), [_dense(t) for t in tensors], options).items():
        unit = unit_of(precision_name, actual[name].dtype, units)
        assert_within(name, actual[name], pytorch[name], exact[name], unit)


def _dense(tensor: Tensor) -> Tensor:
    """View (total_tokens, heads, head_dim) as (1, heads, tokens, head_dim)."""
    return tensor if tensor.dim() == 4 else tensor.transpose(0, 1)[None]


def _output_grads(tensors: list[Tensor], packed: bool) -> list[Tensor]:
    query, _, value = tensors
    lse_shape = query.shape[:-1][::-1] if packed else query.shape[:-1]
    shapes = ((*query.shape[:-1], value.shape[-1]), lse_shape)
    torch.manual_seed(SEED)
    return [torch.randn(shape, device=query.device).to(query.dtype) for shape in shapes]


def _leaves(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Return leaves of tensors and learned options, and the options with these leaves, in float64 if tensors are."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    learned = {}
    for name in learned_in(options):
        tensor = options[name].double() if dtype == torch.float64 else options[name]
        learned[name] = tensor.detach().requires_grad_()
    return [*leaves, *learned.values()], {**options, **learned}


def _of_the_operator(
    tensors: list[Tensor], options: dict[str, Any], grads: list[Tensor], ends: list[int] | None
) -> Results:
    leaves, options = _leaves(tensors, options, tensors[0].dtype)
    packing: dict[str, Any] = {}
    if ends is not None:
        boundaries = torch.tensor(ends, dtype=torch.int32, device=tensors[0].device)
        packing = {"cu_seqlens_q": boundaries, "max_seqlen_q": max(end - start for start, end in pairwise(ends))}
    torch.manual_seed(SEED)
    output, lse = attention(*leaves[:3], return_lse=True, **packing, **options)
    found = torch.autograd.grad([output, lse], leaves, [grads[0], _where_finite(grads[1], lse)])
    results = [output.detach(), lse.detach(), *found]
    if ends is not None:
        results = [lse.detach()[None] if number == 1 else _dense(result) for number, result in enumerate(results)]
    return dict(zip(result_names(options), results, strict=True))


def _where_finite(grad: Tensor, lse: Tensor) -> Tensor:
    return torch.where(torch.isfinite(lse), grad.to(lse.dtype), 0.0)


def _by_sequences(
    tensors: list[Tensor], options: dict[str, Any], grads: list[Tensor], ends: list[int] | None
) -> Results:
    """The reference of a dense call, or of each packed sequence alone."""
    if ends is None:
        return by_rows(tensors, options, grads)
    parts = []
    for start, end in pairwise(ends):
        if end > start:
            sequence = [_dense(tensor[start:end]) for tensor in tensors]
            parts.append(by_rows(sequence, options, [_dense(grads[0][start:end]), grads[1][None, :, start:end]]))
    return {name: torch.cat([part[name] for part in parts], 2) for name in result_names(options)}


def by_rows(tensors: list[Tensor], options: dict[str, Any], grads: list[Tensor]) -> Results:
    """Compute the reference in the dtype of the tensors, with sums over blocks in float64."""
    if isinstance(options.get("mask"), BlockMask):
        options = {**options, "mask": options["mask"].to_dense()}
    leaves, options = _leaves(tensors, options, tensors[0].dtype)
    query, key, value = leaves[:3]
    torch.manual_seed(SEED)
    state = draw_seed(query.device).tolist() if options.get("dropout_p") else None
    queries, keys = query.shape[2], key.shape[2]
    totals = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    outputs, lses = [], []
    for rows in _blocks(query, keys):
        of_rows = {
            name: _rows_of(tensor, rows) if name in ("mask", "bias") else tensor for name, tensor in options.items()
        }
        if state is not None:
            of_rows["keep"] = _kept(state, options["dropout_p"], query, rows, keys)
        output, lse = reference.attention(query[:, :, rows], key, value, part=(rows.start, queries), **of_rows)
        given = [grads[0][:, :, rows].to(output.dtype), _where_finite(grads[1][:, :, rows], lse)]
        for total, grad in zip(totals, torch.autograd.grad([output, lse], leaves, given), strict=True):
            total += grad
        outputs.append(output.detach())
        lses.append(lse.detach())
    found = [total.to(leaf.dtype) for total, leaf in zip(totals, leaves, strict=True)]
    return dict(zip(result_names(options), [torch.cat(outputs, 2), torch.cat(lses, 2), *found], strict=True))


def _blocks(query: Tensor, keys: int) -> Iterator[slice]:
    batch, heads, queries, _ = query.shape
    step = max(1, ELEMENTS // max(1, batch * heads * keys))
    for first in range(0, queries, step):
        yield slice(first, min(first + step, queries))


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[..., rows, :] if tensor.dim() > 1 and tensor.shape[-2] > 1 else tensor


def _kept(state: list[int], dropout_p: float, query: Tensor, rows: slice, keys: int) -> Tensor:
    """Return a mask of the weights that dropout keeps in these rows."""
    batch, heads = query.shape[:2]
    places = [
        torch.arange(a, b, device=query.device) for a, b in ((0, batch * heads), (rows.start, rows.stop), (0, keys))
    ]
    return dropout_keep(*state, dropout_p, *places).view(batch, heads, -1, keys)


def attention_tensors(
    make: Maker,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
) -> list[Tensor]:
    """Return query, key and value as a projection gives them, with the heads of a token next to each other."""
    shapes = ((queries, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, value_dim or head_dim))
    return [make.normal(batch, *shape).transpose(1, 2) for shape in shapes]
