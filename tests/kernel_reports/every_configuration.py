"""A program that compiles every launch configuration chosen on one architecture, and prints which kernels fit there.

Each configuration of the tables becomes a new object, which shows what a call chose. A call below is compiled if it
chooses a configuration that no earlier call chose. Configurations that no call chooses are printed.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import fastformer_kernels
import torch
from fastformer_kernels.configurations import shipped_defaults
from fastformer_kernels.launch import ARCHITECTURES, Architecture
from fastformer_kernels.plans import forced_plan
from fastformer_kernels.rows import RowConfiguration
from torch import Tensor
from triton.runtime.jit import JITFunction

import fastformer
from fastformer import BlockMask
from fastformer.kernel_reports.compilation import Specialization, compiler, specializations_of
from fastformer.ops.attention.merge import merge_attention
from fastformer.registry.score_mod import DECAY

HEAD_DIMS = (64, 128, 256, 512)
# Keys in a cache may be wider than values.
KEY_DIMS = (64, 128, 256, 576)
DTYPES = (torch.bfloat16, torch.float32)
LENGTH = 1024
# The needs of a kernel of rows depend only on the threads of a warp: for each number, the least capable architecture.
OF_ROWS = ("sm_86", "gfx90a")
# Lengths of rows, from the shortest to one that fits in no tile.
COLUMNS = (1, 64, 1024, 4096, 16384, 65536)

Call = Callable[[], None]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def backward(*results: Tensor) -> None:
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])


# ---- Kernels of products, whose configurations are in tables ---------------------------------------------------------


def attention(head_dim: int, dtype: torch.dtype, *features: str) -> None:
    """Run attention with these features, and its backward unless "forward" is one of them."""
    heads, kv_heads = 8, 2 if "grouped" in features else 8
    shape = (4 * LENGTH,) if "packed" in features else (LENGTH,)
    tensors = [
        empty(*shape, n, head_dim, dtype=dtype) if "packed" in features else empty(2, n, *shape, head_dim, dtype=dtype)
        for n in (heads, kv_heads, kv_heads)
    ]
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "causal": lambda: {"causal": True},
        # As much memory besides the tiles as a call can need.
        "loaded": lambda: {
            "bias": empty(2, heads, LENGTH, LENGTH),
            "mask": integers(2, 1, LENGTH, LENGTH, dtype=torch.bool),
        },
        "dropout": lambda: {"dropout_p": 0.1},
        "packed": lambda: {"cu_seqlens_q": integers(5), "max_seqlen_q": LENGTH},
        "window": lambda: {"window": (256, 256)},
        "alibi": lambda: {"alibi_slopes": empty(heads)},
        "softcap": lambda: {"softcap": 30.0},
        "score_mod": lambda: {"score_mod": DECAY},
        "block mask": lambda: {"mask": BlockMask.from_mask(torch.ones(LENGTH, LENGTH).tril() > 0).to("meta")},
    }
    options = [known[feature]() for feature in features if feature in known]
    torch.use_deterministic_algorithms("deterministic" in features)
    with torch.set_grad_enabled("forward" not in features):
        output = fastformer.attention(*tensors, **{name: value for each in options for name, value in each.items()})
    if output.requires_grad:
        backward(output)
    torch.use_deterministic_algorithms(False)


def attention_weights(head_dim: int, dtype: torch.dtype) -> None:
    query, key = (torch.empty(2, 8, LENGTH, head_dim, dtype=dtype, device="meta") for _ in range(2))
    fastformer.attention_weights(query, key, torch.empty(2, 8, LENGTH, device="meta"), causal=True, rows=range(64))


def large_mask() -> None:
    """Run attention with a mask that is packed to bits first."""
    query, key, value = (torch.empty(2, 2, 4 * LENGTH, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    fastformer.attention(query, key, value, mask=integers(1, 1, 4 * LENGTH, 4 * LENGTH, dtype=torch.bool))


def decode(head_dim: int, dtype: torch.dtype) -> None:
    """Decode from a contiguous and from a paged cache, with the largest number of rows in a tile."""
    batch, kv_heads, group, queries, page = 4, 2, 8, 8, 16
    query = torch.empty(batch, kv_heads * group, queries, head_dim, dtype=dtype, device="meta")
    for table in (None, integers(batch, LENGTH // page)):
        shape = (batch, kv_heads, LENGTH) if table is None else (batch * LENGTH // page, page, kv_heads)
        dims = head_dim, min(head_dim, 512)
        caches = [torch.empty(*shape, dim, dtype=dtype, device="meta") for dim in dims]
        options: dict[str, Any] = {"block_table": table, "splits": 2}
        fastformer.decode_attention(query, *caches, lengths=integers(batch), **options)


def feed_forward(dtype: torch.dtype, gated: bool) -> None:
    """Run both plans of feed-forward, with everything that an epilogue can do."""
    hidden, intermediate = 1024, 4096
    x, residual = (empty(LENGTH, hidden, dtype=dtype) for _ in range(2))
    weights = [empty(intermediate, hidden, dtype=dtype), empty(hidden, intermediate, dtype=dtype)]
    biases = [empty(intermediate, dtype=dtype), empty(hidden, dtype=dtype)]
    gate = {"gate_weight": empty(intermediate, hidden, dtype=dtype), "gate_bias": empty(intermediate, dtype=dtype)}
    dropout = {"hidden_dropout_p": 0.1, "output_dropout_p": 0.1}
    for plan in ("fused", "library"):
        with forced_plan(plan):
            more: dict[str, Any] = {**dropout, **(gate if gated else {})}
            backward(fastformer.feed_forward(x, *weights, *biases, activation="gelu", residual=residual, **more))


ATTENTION = (
    ("loaded", "causal", "grouped"),
    ("causal",),
    ("forward",),
    ("dropout", "causal"),
    ("packed", "causal", "forward"),
    ("grouped", "causal"),
    ("window",),
    ("alibi", "causal"),
    ("softcap", "causal"),
    ("causal", "deterministic"),
    ("dropout", "causal", "deterministic"),
    ("grouped", "causal", "deterministic"),
    ("loaded", "causal", "deterministic"),
    ("score_mod", "causal"),
    ("block mask",),
)


def calls_of_products() -> Iterator[Call]:
    for features, head_dim, dtype in product(ATTENTION, HEAD_DIMS, DTYPES):
        yield partial(attention, head_dim, dtype, *features)
    for head_dim, dtype in product(KEY_DIMS, DTYPES):
        yield partial(decode, head_dim, dtype)
    for dtype, gated in product(DTYPES, (False, True)):
        yield partial(feed_forward, dtype, gated)


# ---- Kernels whose tiles follow by rule from the sizes of a call -----------------------------------------------------


def softmax(columns: int) -> None:
    backward(fastformer.softmax(empty(4096, columns)))


def softmax_of_few_rows(columns: int) -> None:
    backward(fastformer.softmax(empty(8, columns)))


def softmax_across(columns: int) -> None:
    backward(fastformer.softmax(empty(columns, 4096), dim=0))


def norm(columns: int) -> None:
    """Run the norm's kernels, forward and backward, on rows of this length."""
    x, residual, parameters = empty(4096, columns), empty(4096, columns), [empty(columns) for _ in range(2)]
    backward(*fastformer.layer_norm(x, (columns,), *parameters, residual=residual, dropout_p=0.1))


def norm_of_16_bit_rows(columns: int) -> None:
    """Run the kernels of odd and of wide rows."""
    x, residual = (empty(4096, columns, dtype=torch.bfloat16) for _ in range(2))
    backward(*fastformer.layer_norm(x, (columns,), empty(columns), empty(columns), residual=residual))


def cross_entropy(columns: int) -> None:
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 50.0}
    target = integers(LENGTH, dtype=torch.int64)
    backward(fastformer.cross_entropy(empty(LENGTH, columns), target))
    backward(fastformer.cross_entropy(empty(LENGTH, columns), target, torch.empty(columns, device="meta"), **options))
    fastformer.linear_cross_entropy(empty(LENGTH, 64), empty(columns, 64), target).backward()


def embedding(columns: int) -> None:
    ids = integers(8, 512, dtype=torch.int64)
    tables = [empty(rows, columns) for rows in (32768, 512, 2)]
    more: dict[str, Any] = {"position_ids": ids, "token_type_ids": ids, "dropout_p": 0.1}
    backward(fastformer.transformer_embedding(ids, *tables, empty(columns), empty(columns), **more))


def rotary(head_dim: int, interleaved: bool) -> None:
    angles = [torch.empty(LENGTH, head_dim // 2, device="meta") for _ in range(2)]
    query, key = (empty(2, heads, LENGTH, head_dim) for heads in (8, 2))
    backward(*fastformer.rotary(query, key, *angles, interleaved=interleaved))


def append(head_dim: int, tokens: int) -> None:
    batch, kv_heads = 4, 8
    caches = [torch.empty(batch, kv_heads, LENGTH, head_dim, device="meta") for _ in range(2)]
    new = [torch.empty(batch, kv_heads, tokens, head_dim, device="meta") for _ in range(3)]
    angles = [torch.empty(LENGTH, head_dim // 2, device="meta") for _ in range(2)]
    options: dict[str, Any] = {"cos": angles[0], "sin": angles[1], "query": new[2]}
    fastformer.append_to_cache(*new[:2], *caches, lengths=integers(batch), **options)


def merge(head_dim: int, parts: int) -> None:
    merge_attention(empty(parts, LENGTH, head_dim).detach(), empty(parts, LENGTH).detach())


def calls_of_rows() -> Iterator[Call]:
    for call, columns in product((softmax, softmax_of_few_rows, softmax_across, norm, cross_entropy), COLUMNS):
        yield partial(call, columns)
    for columns in (1, 64, 1024, 4096):
        yield partial(embedding, columns)
    for columns in (1023, 2047, 4095, 8191, 16384):
        yield partial(norm_of_16_bit_rows, columns)
    for head_dim in HEAD_DIMS:
        yield from (partial(rotary, head_dim, interleaved) for interleaved in (False, True))
        yield from (partial(append, head_dim, tokens) for tokens in (1, 512))
        yield from (partial(merge, head_dim, parts) for parts in (2, 64))
        yield from (partial(attention_weights, head_dim, dtype) for dtype in DTYPES)
    yield large_mask


# ---- The entries of the tables, and the calls that choose them -------------------------------------------------------


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(fastformer_kernels.__path__, "fastformer_kernels.")
    return [importlib.import_module(module.name) for module in found]


def entries(architecture: str) -> dict[str, Any]:
    """Return every configuration for `architecture` by its place: those in the modules' tables, and single ones.

    Each configuration is replaced by a new object, the same in all places that share it.
    """
    copies: dict[int, Any] = {}
    variables = {id(value): value for module in modules() for value in vars(module).values()}
    parts = {id(part) for value in variables.values() for part in _tables_within(value)}
    found: dict[str, Any] = {}
    for module in modules():
        for name, value in list(vars(module).items()):
            of_rows = architecture in OF_ROWS and isinstance(value, RowConfiguration)
            # A table that is part of another one is visited there.
            if of_rows or (_is_table(value) and id(value) not in parts):
                setattr(module, name, _separate(value, (module.__name__, name), architecture, found, copies))
    return found


def _tables_within(value: Any) -> Iterator[dict[Any, Any]]:
    for inner in value.values() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield inner
            yield from _tables_within(inner)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and (
        bool(ARCHITECTURES.keys() & value.keys()) or any(map(_is_table, value.values()))
    )


def _separate(
    value: Any, place: tuple[Any, ...], architecture: str, found: dict[str, Any], copies: dict[int, Any]
) -> Any:
    """Return a copy of a table with copies of its configurations, and add those for `architecture` to `found`.

    `copies` holds the copies made so far, by the ids of the originals.
    """
    if isinstance(value, dict):
        return {key: _separate(inner, (*place, key), architecture, found, copies) for key, inner in value.items()}
    if not is_dataclass(value) or isinstance(value, (type, Architecture)):
        return value
    copy = copies.setdefault(id(value), replace(value))
    if architecture in place or isinstance(value, RowConfiguration):
        found[" ".join(map(str, place))] = copy
    return copy


def chosen_by(call: Call, architecture: str) -> tuple[list[Specialization], set[int]]:
    """Return what a call launches, and the ids of the configurations that it chose."""
    with shipped_defaults() as asked:
        launched = specializations_of([call], architecture)
    return launched, {id(configuration) for configuration in asked.values()}


def to_compile(architecture: str, missing: dict[int, str]) -> Iterator[Specialization]:
    """Yield the launches of calls of rows and of calls that choose an entry of `missing`; remove chosen entries."""
    rows = calls_of_rows() if architecture in OF_ROWS else iter(())
    calls = [*((call, False) for call in calls_of_products()), *((call, True) for call in rows)]
    for call, always in calls:
        launched, choices = chosen_by(call, architecture)
        if always or choices & missing.keys():
            yield from launched
        for choice in choices:
            missing.pop(choice, None)


def kernels() -> set[tuple[str, str]]:
    """Return module and name of every kernel that can be launched."""
    return {
        (module.__name__, name)
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def main(architecture: str) -> None:
    known = entries(architecture)  # kept, so that no other object gets one of their ids
    missing = {id(entry): place for place, entry in known.items()}
    wanted = list(dict.fromkeys(to_compile(architecture, missing)))
    for place in missing.values():
        print(place, "is chosen by no call")
    if architecture in OF_ROWS:
        for place in sorted(kernels() - {(each.module, each.kernel) for each in wanted}):
            print(*place, "is launched by no call")
    with tempfile.TemporaryDirectory() as cache, compiler(Path(cache), 1) as submit:
        for each, done in [(each, submit(each)) for each in wanted]:
            reason = done.result()
            print(each.kernel, "fits" if reason is None else f"does not fit: {reason}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
