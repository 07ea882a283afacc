"""Argument checks shared by the operators. Each error names the argument, what was given and what is accepted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from numbers import Integral

import torch

from fastformer.debugging import assert_on_device, debugging

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless `tensor` is float32, float16 or bfloat16."""
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16; got {tensor.dtype}")


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless `softcap` is None or a positive number."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None for none; got {softcap}")


def check_whole(name: str, value: object, least: int, none_means: str) -> None:
    """Raise unless `value` is a whole number (TypeError) of at least `least` (ValueError)."""
    if not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, or None for {none_means}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, or None for {none_means}; got {value}")


def class_name(value: object) -> str:
    """The name of the class of `value`, with its module if it is not built in."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has exactly `shape`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")


def broadcasts(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """True if a tensor of shape `given` broadcasts to the shape `wanted`.

    Sizes are compared one by one: Dynamo does not find a symbolic size in a tuple.
    """
    missing = len(wanted) - len(given)
    return missing >= 0 and all(size == 1 or size == other for size, other in zip(given, wanted[missing:], strict=True))


def check_like(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise unless `tensor` has the dtype (TypeError) and the device (ValueError) of `reference`."""
    if tensor.dtype != reference.dtype:
        raise TypeError(f"{name} must have {reference_name}'s dtype, {reference.dtype}; got {tensor.dtype}")
    check_device(name, tensor, reference_name, reference)


def check_device(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` is on the device of `reference`."""
    if tensor.device != reference.device:
        raise ValueError(f"{name} must be on {reference_name}'s device, {reference.device}; got {tensor.device}")


def check_int32(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like_name: str, like: torch.Tensor) -> None:
    """Raise unless `tensor` is int32 (TypeError), of `shape` and on the device of `like` (ValueError)."""
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {tensor.dtype}")
    check_shape(name, tensor, shape)
    check_device(name, tensor, like_name, like)


def check_no_gradient(operator: str, tensors: Iterable[torch.Tensor | None], instead: str) -> None:
    """Raise RuntimeError if autograd needs a gradient from an operator that has none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{operator} has no gradient: call it under torch.no_grad(), or {instead}")


def check_lengths(name: str, lengths: torch.Tensor, limit_name: str, limit: int) -> None:
    """Raise ValueError unless `lengths` on a CPU lie in [0, limit]; for a GPU see `fastformer.debug`."""
    if lengths.is_cpu:
        check_counts(name, lengths.tolist(), limit_name, limit)
    elif debugging():
        assert_on_device((lengths >= 0) & (lengths <= limit), f"{name} must be from 0 to {limit_name}, {limit}")


def check_counts(name: str, values: list[int], limit_name: str, limit: int) -> None:
    """Raise ValueError unless all `values` lie in [0, limit]."""
    if values and not (min(values) >= 0 and max(values) <= limit):
        raise ValueError(f"{name} must be from 0 to {limit_name}, {limit}; got {values}")


def check_pages(block_table: torch.Tensor, used: Iterable[tuple[int, int]], page_size: int, pages: int) -> None:
    """Raise ValueError if `block_table` on a CPU has an invalid page for the keys that are used.

    `used` has the range [first, stop) of the keys of each sequence.
    """
    for sequence, (row, (first, stop)) in enumerate(zip(block_table.tolist(), used, strict=True)):
        wrong = [page for page in row[first // page_size : -(-stop // page_size)] if not 0 <= page < pages]
        if wrong:
            raise ValueError(
                f"block_table must name pages from 0 to {pages - 1}; got {wrong[0]} for sequence {sequence}, whose "
                f"keys {first} to {stop - 1} are used, in pages of {page_size}"
            )


def check_pages_on_device(block_table: torch.Tensor, stop: torch.Tensor, page_size: int, pages: int) -> None:
    """Stop a GPU where `block_table` names no page of the cache for the first `stop` keys of a sequence.

    This is checked only if `fastformer.debug` is on.
    """
    if not debugging():
        return
    first_keys = page_size * torch.arange(block_table.shape[1], device=block_table.device)
    known = (block_table >= 0) & (block_table < pages)
    assert_on_device(known | (first_keys >= stop[:, None]), f"block_table must name pages from 0 to {pages - 1}")


def check_boundaries(name: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> None:
    """Raise ValueError unless `cu_seqlens` on a CPU rises from 0 to `total` in steps of at most `max_seqlen`.

    The check does not wait for a GPU (see `fastformer.debug`).
    """
    rule = f"{name} must rise from 0 to the number of tokens, {total}"
    if cu_seqlens.is_cpu:
        bounds = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
            raise ValueError(f"{rule}; got {bounds}")
        if max(lengths, default=0) > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, but {name} has a sequence of {max(lengths)}")
    elif debugging():
        steps = cu_seqlens.diff()
        assert_on_device((cu_seqlens[:1] == 0) & (cu_seqlens[-1:] == total), rule)
        assert_on_device(steps >= 0, rule)
        assert_on_device(steps <= max_seqlen, f"max_seqlen is {max_seqlen}, but {name} has a longer sequence")


def check_indices(name: str, indices: torch.Tensor, limit: int) -> None:
    """Raise IndexError unless `indices` on a CPU are from 0 to `limit` - 1; for a GPU see `fastformer.debug`."""
    if not indices.is_cpu:
        if debugging():
            assert_on_device((indices >= 0) & (indices < limit), f"{name} must be from 0 to {limit - 1}")
    elif indices.numel() and can_be_read(indices):
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= limit:
            raise IndexError(f"{name} must be from 0 to {limit - 1}; got {low} to {high}")


def can_be_read(tensor: torch.Tensor) -> bool:
    """Whether the elements of `tensor` may be read.

    They may not while a compiler traces, or while `torch.func.vmap` works on many tensors at a time.
    """
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True
