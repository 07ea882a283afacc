"""The work whose kernels are compiled and reported: calls of every operator, forward and backward, on meta tensors.

The operators and their inputs come from the registry; `_CASES` has their sizes and features. A case does not name
kernels: running it shows which kernels the operator launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from fastformer_kernels.attention.arguments import LIST_HEADER, MASK_TILE, MASK_WORDS
from fastformer_kernels.plans import Plan, forced_plan
from torch import Tensor

from fastformer.ops.attention.block_mask import BlockMask, TileLists
from fastformer.registry import OPERATORS as REGISTRY
from fastformer.registry import Make

Sizes = dict[str, Any]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LAYOUTS = ("aligned", "odd", "offset", "huge")
"""The kinds of tensors for which Triton specialises a launch. aligned: sizes are multiples of 16. odd: they are not.
offset: in addition, tensors do not begin at a multiple of 16 bytes. huge: strides and sizes need 64 bits."""


@dataclass(frozen=True)
class Case:
    """A call of one operator.

    Attributes:
        operator: the name of the operator.
        variant: the name of the shapes and features.
        dtype: a key of `DTYPES`.
        layout: one of `LAYOUTS`.
        run: makes the call and its backward.
        guarded: whether the regression gate watches the case.
        everywhere: whether the gate watches it on every architecture, not only on those where it watches all cases.
    """

    operator: str
    variant: str
    dtype: str
    layout: str
    run: Callable[[], object]
    guarded: bool
    everywhere: bool

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.variant}/{self.dtype}/{self.layout}"


@dataclass(frozen=True)
class Maker(Make):
    """Makes the tensors of a case, on the device meta.

    Attributes:
        layout: one of `LAYOUTS`.
    """

    layout: str

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        offset = 1 if self.layout == "offset" else 0
        storage = torch.empty((*shape[:-1], shape[-1] + offset), dtype=dtype or self.dtype, device=self.device)
        return storage[..., offset:]

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def booleans(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.bool)

    def block_mask(self, queries: int, keys: int) -> BlockMask:
        def lists(rows: int, columns: int) -> TileLists:
            shape = (1, 1, -(-rows // MASK_TILE), LIST_HEADER + -(-columns // MASK_TILE))
            bits = (2 + shape[2], MASK_TILE, MASK_WORDS)
            return TileLists(*(torch.empty(size, dtype=torch.int32, device=self.device) for size in (shape, bits)))

        return BlockMask((1, 1, queries, keys), lists(queries, keys), lists(keys, queries))

    def rotary_table(self, positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.empty(positions, rotary_dim // 2, device=self.device) for _ in range(2))
        return cos, sin

    def size(self, aligned: int) -> int:
        """Return `aligned`, a multiple of 16, or another size that is no multiple if the layout asks for one."""
        return aligned if self.layout in ("aligned", "huge") else aligned - 3

    def rows(self, rows: int, elements: int) -> int:
        """A number of rows of `elements` elements. In the huge layout, their offsets need 64 bits."""
        return 2**31 // elements + 16 if self.layout == "huge" else self.size(rows)


def cases(
    operators: list[str] | None = None,
    dtypes: list[str] | None = None,
    layouts: list[str] | None = None,
    guarded: bool = False,
) -> Iterator[Case]:
    """Yield the cases of these operators, dtypes and layouts (None: all), or those that the regression gate watches.

    Raises:
        ValueError: an unknown operator, dtype or layout.
    """
    for option, given, known in (
        ("operators", operators, list(_CASES)),
        ("dtypes", dtypes, list(DTYPES)),
        ("layouts", layouts, list(LAYOUTS)),
    ):
        unknown = sorted(set(given or []) - set(known))
        if unknown:
            raise ValueError(f"{option} must be among {', '.join(known)}; got {', '.join(unknown)}")
    for operator, variants in _CASES.items():
        for name, variant in variants.items():
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    watched = layout == "aligned" and dtype in variant.guarded
                    chosen = (
                        watched if guarded else (not dtypes or dtype in dtypes) and (not layouts or layout in layouts)
                    )
                    if chosen and (not operators or operator in operators):
                        run = partial(_run, variant, name, dtype, layout)
                        yield Case(operator, name, dtype, layout, run, watched, watched and variant.everywhere)


def _run(variant: _Variant, name: str, dtype: str, layout: str) -> None:
    make, operator = Maker(DTYPES[dtype], torch.device("meta"), layout), REGISTRY[variant.operator]
    with _settings(name):
        tensors, options = operator.inputs(make, **variant.inputs(make))
        result = operator.ours(**operator.leaves(tensors), **options)
        results = [each for each in (result if isinstance(result, tuple) else (result,)) if each.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.empty_like(each) for each in results])


@contextmanager
def _settings(variant: str) -> Iterator[None]:
    """Apply the process-wide settings that the words of a variant's name ask for, within the block."""
    words = variant.split("-")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms("deterministic" in words)
    try:
        with ExitStack() as stack:
            for plan in get_args(Plan):
                if plan in words:
                    stack.enter_context(forced_plan(plan))
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


# --- Sizes and features -----------------------------------------------------------------------------------------------


def _attention(
    make: Maker,
    head_dim: int,
    features: tuple[str, ...] = (),
    value_dim: int = 0,
    group: int = 1,
    tokens: int = 1024,
) -> Sizes:
    heads = 8
    sequence = make.rows(tokens, heads * head_dim)
    return {
        "batch": 4 if "packed" in features else 2,
        "heads": heads,
        "kv_heads": heads // group,
        "queries": sequence,
        "keys": sequence,
        "head_dim": head_dim,
        "value_dim": value_dim or head_dim,
        "features": features,
    }


def _decode(make: Maker, queries: int, group: int, paged: bool, block_mask: bool = False) -> Sizes:
    sizes = _decode_sizes(make, queries, group, paged, kv_heads=8, head_dim=128)
    return {**sizes, "block_mask": block_mask}


def _latent_decode(make: Maker) -> Sizes:
    """Absorbed multi-head latent attention, with the sizes of DeepSeek-V3."""
    return {**_decode_sizes(make, 1, 128, True, kv_heads=1, head_dim=576), "latent_dim": 512}


def _decode_sizes(make: Maker, queries: int, group: int, paged: bool, kv_heads: int, head_dim: int) -> Sizes:
    batch = 4
    return {
        "lengths": [make.rows(4096, kv_heads * head_dim)] * batch,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "queries": queries,
        "head_dim": head_dim,
        "page_size": 16 if paged else None,
    }


def _append(make: Maker, tokens: int, paged: bool) -> Sizes:
    batch, kv_heads, head_dim = 4, 8, 128
    return {
        "lengths": [0] * batch,
        "tokens": tokens,
        "heads": 32,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "capacity": make.rows(4096, kv_heads * head_dim),
        "positions": 4096,
        "page_size": 16 if paged else None,
    }


def _merge(make: Maker) -> Sizes:
    return {"parts": 4, "rows": make.rows(4096, 128), "head_dim": 128}


def _rotary(make: Maker, interleaved: bool) -> Sizes:
    heads, head_dim = 8, 128
    tokens = make.rows(1024, heads * head_dim)
    sizes = {"batch": 2, "heads": heads, "kv_heads": 2, "tokens": tokens, "head_dim": head_dim}
    return {**sizes, "interleaved": interleaved}


def _softmax(make: Maker, columns: int, masked: bool = False, causal: bool = False) -> Sizes:
    columns = make.size(columns)
    return {"rows": make.rows(4096, columns), "columns": columns, "masked": masked, "causal": causal}


def _softmax_of_few_rows(make: Maker, columns: int) -> Sizes:
    """Rows that several programs share. In the huge layout, their offsets need 64 bits."""
    return {"rows": 8, "columns": 2**29 if make.layout == "huge" else make.size(columns)}


def _norm(make: Maker, columns: int, bias: bool, residual: bool, dropout_p: float = 0.0) -> Sizes:
    columns = make.size(columns)
    sizes = {"rows": make.rows(4096, columns), "columns": columns, "bias": bias, "residual": residual}
    return {**sizes, "dropout_p": dropout_p, "parameters": torch.float32}


def _attention_weights(make: Maker) -> Sizes:
    heads, head_dim = 8, 64
    tokens = make.rows(1024, heads * head_dim)
    return {"batch": 2, "heads": heads, "tokens": tokens, "head_dim": head_dim, "rows": range(64)}


def _embedding(make: Maker) -> Sizes:
    return {
        "batch": 8,
        "tokens": make.size(512),
        "hidden": make.size(1024),
        "words": make.rows(32768, 1024),
        "positions": 512,
        "own_positions": True,
        "padding_idx": 0,
        "dropout_p": 0.1,
        "parameters": torch.float32,
    }


def _cross_entropy(make: Maker, classes: int) -> Sizes:
    return {"rows": make.rows(2048, classes), "classes": make.size(classes)}


def _feed_forward(make: Maker, activation: str, gated: bool, dropout_p: float = 0.0) -> Sizes:
    hidden = make.size(1024)
    sizes = {"tokens": make.rows(4096, hidden), "features": hidden, "intermediate": make.size(4096)}
    return {**sizes, "activation": activation, "gated": gated, "biases": True, "dropout_p": dropout_p}


def _linear_cross_entropy(make: Maker, classes: int) -> Sizes:
    return {"rows": make.size(2048), "classes": make.size(classes), "features": make.size(1024)}


def _ordinary(make: Maker) -> Sizes:
    return {}


@dataclass(frozen=True)
class _Variant:
    """An operator of the registry with certain sizes and features.

    Attributes:
        operator: the name of the operator in the registry.
        inputs: returns the sizes and features that the operator's inputs are made with.
        guarded: the dtypes in which the regression gate watches the aligned layout.
        everywhere: see `Case`.
    """

    operator: str
    inputs: Callable[[Maker], Sizes]
    guarded: tuple[str, ...] = ()
    everywhere: bool = False


_BF16 = ("bfloat16",)
# Heads wider than 128 barely fit into shared memory; of the others, these are watched on every architecture.
_EVERYWHERE = (("causal",), ("block_mask",))
_FEATURES = ("window", "softcap", "dropout", "sinks", "alibi", "bias", "mask", "key_lengths", "packed", "relative")


def _attention_variant(watched: bool, head_dim: int, *features: str, value_dim: int = 0, group: int = 1) -> _Variant:
    sizes = partial(_attention, head_dim=head_dim, features=features, value_dim=value_dim, group=group)
    everywhere = max(head_dim, value_dim) > 128 or features in _EVERYWHERE
    return _Variant("attention", sizes, _BF16 if watched else (), everywhere)


# The variants of each operator, by the operator's name in reports.
_CASES: dict[str, dict[str, _Variant]] = {
    "attention": {
        "d64": _attention_variant(True, 64),
        "d64-causal": _attention_variant(True, 64, "causal"),
        "d128": _attention_variant(True, 128),
        "d96-causal": _attention_variant(True, 96, "causal"),
        "d128-causal": _attention_variant(True, 128, "causal"),
        "d256-causal": _attention_variant(True, 256, "causal"),
        "d512-causal": _attention_variant(True, 512, "causal"),
        "d192-value128-causal": _attention_variant(True, 192, "causal", value_dim=128),
        **{f"d512-{name}": _attention_variant(False, 512, name) for name in ("window", "dropout", "alibi", "bias")},
        "d80-value96": _attention_variant(False, 80, value_dim=96),
        "d128-causal-grouped": _attention_variant(True, 128, "causal", group=4),
        "d64-packed-causal": _attention_variant(False, 64, "packed", "causal"),
        "d128-packed-causal": _attention_variant(True, 128, "packed", "causal"),
        "d128-causal-dropout": _attention_variant(True, 128, "causal", "dropout"),
        "d128-window": _attention_variant(True, 128, "window"),
        "d64-block_mask": _attention_variant(True, 64, "block_mask"),
        "d128-block_mask": _attention_variant(True, 128, "block_mask"),
        "d128-causal-score_mod": _attention_variant(True, 128, "causal", "score_mod"),
        "d128-block_mask-deterministic": _attention_variant(False, 128, "block_mask"),
        # A mask with so many elements is packed to bits first.
        "d64-large_mask": _Variant(
            "attention", partial(_attention, head_dim=64, features=("mask",), tokens=2048), _BF16
        ),
        "d64-deterministic": _attention_variant(False, 64),
        "d128-causal-deterministic": _attention_variant(True, 128, "causal"),
        **{
            f"d64-{name}": _attention_variant(name in ("window", "softcap", "dropout", "bias"), 64, name)
            for name in _FEATURES
        },
        "d128-everything": _attention_variant(
            False,
            128,
            *("causal", "window", "softcap", "dropout", "sinks", "alibi", "bias", "mask", "key_lengths"),
            group=2,
        ),
    },
    "decode": {
        f"{'paged' if paged else 'contiguous'}-{queries}-group-{group}": _Variant(
            "decode_attention",
            partial(_decode, queries=queries, group=group, paged=paged),
            _BF16 if paged and queries == 1 and group == 4 else (),
        )
        for paged in (False, True)
        for queries, group in ((1, 1), (1, 4), (4, 4))
    }
    | {
        f"{'paged' if paged else 'contiguous'}-4-group-4-block_mask": _Variant(
            "decode_attention", partial(_decode, queries=4, group=4, paged=paged, block_mask=True), _BF16
        )
        for paged in (False, True)
    }
    | {"latent-d576-value512": _Variant("decode_attention", _latent_decode, _BF16, everywhere=True)},
    "append_to_cache": {
        f"{'paged' if paged else 'contiguous'}-{tokens}": _Variant(
            "append_to_cache",
            partial(_append, tokens=tokens, paged=paged),
            _BF16 if paged and tokens == 1 else (),
        )
        for paged in (False, True)
        for tokens in (1, 512)
    },
    "merge_attention": {"4-parts": _Variant("merge_attention", _merge, _BF16)},
    "rotary": {
        "half": _Variant("rotary", partial(_rotary, interleaved=False), _BF16),
        "interleaved": _Variant("rotary", partial(_rotary, interleaved=True)),
    },
    "softmax": {
        "1024": _Variant("softmax", partial(_softmax, columns=1024), _BF16),
        "8192": _Variant("softmax", partial(_softmax, columns=8192)),
        "65536": _Variant("softmax", partial(_softmax, columns=65536), _BF16),
        "8x50257": _Variant("softmax", partial(_softmax_of_few_rows, columns=50257), _BF16),
        "8x131072": _Variant("softmax", partial(_softmax_of_few_rows, columns=131072), _BF16),
        "1024-log": _Variant("log_softmax", partial(_softmax, columns=1024)),
        "1024-masked-causal": _Variant("softmax", partial(_softmax, columns=1024, masked=True, causal=True)),
    },
    "norm": {
        f"{'layer' if centered else 'rms'}-{columns}{'-residual' if residual else ''}": _Variant(
            "layer_norm" if centered else "rms_norm",
            partial(_norm, columns=columns, bias=centered, residual=residual),
            _BF16 if centered and (columns == 1024 or (columns not in (768, 12291) and residual)) else (),
        )
        # 4,095 is odd, and 12,291 a multiple of 16 in the odd layout: kernels of odd and wide rows run in every layout.
        for columns in (512, 768, 1024, 4095, 4096, 12291, 16384, 32768)
        for centered in (True, False)
        for residual in (False, True)
    }
    | {
        "layer-768-residual-dropout": _Variant(
            "layer_norm", partial(_norm, columns=768, bias=True, residual=True, dropout_p=0.1)
        )
    },
    "attention_weights": {"d64-causal": _Variant("attention_weights", _attention_weights)},
    "embedding": {"1024": _Variant("transformer_embedding", _embedding, _BF16)},
    "feed_forward": {
        f"{activation}{'-gated' if gated else ''}{'-dropout-residual' if dropout_p else ''}-{plan}": _Variant(
            "feed_forward",
            partial(_feed_forward, activation=activation, gated=gated, dropout_p=dropout_p),
            _BF16 if activation == ("silu" if gated else "gelu") and bool(dropout_p) != gated else (),
        )
        for plan in get_args(Plan)
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "squared_relu")
        for gated in (False, True)
        for dropout_p in (0.0, 0.1)
    },
    "cross_entropy": {
        "32768": _Variant("cross_entropy", partial(_cross_entropy, classes=32768)),
        "50257": _Variant("cross_entropy", partial(_cross_entropy, classes=50257), _BF16),
    },
    "linear_cross_entropy": {
        "32768": _Variant("linear_cross_entropy", partial(_linear_cross_entropy, classes=32768), _BF16)
    },
    # Not guarded: it launches the kernels of attention.
    "scaled_dot_product_attention": {"ordinary": _Variant("scaled_dot_product_attention", _ordinary)},
}
_LISTED = {variant.operator for variants in _CASES.values() for variant in variants.values()}
# All other operators have one variant, with ordinary inputs, which the regression gate watches.
_CASES |= {name: {"ordinary": _Variant(name, _ordinary, _BF16)} for name in REGISTRY if name not in _LISTED}

OPERATORS = tuple(_CASES)
