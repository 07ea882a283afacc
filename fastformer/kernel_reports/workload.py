"""The work whose kernels are compiled and reported: calls of every operator, forward and backward, on meta tensors.

To add an operator: write a function that calls it as a user would and runs its backward, and list its cases in
`_CASES`. A case says nothing of kernels: what an operator launches is found by running it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from fastformer_kernels.plans import Plan, forced_plan
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LAYOUTS = ("aligned", "odd", "offset", "huge")
"""What Triton specialises a launch on: sizes that are multiples of 16 or are not, tensors that do not begin at a
multiple of 16 bytes, strides and sizes that need 64 bits."""


@dataclass(frozen=True)
class Case:
    """A call of one operator.

    Attributes:
        operator: its name.
        variant: the shapes and features.
        dtype: a key of `DTYPES`.
        layout: one of `LAYOUTS`.
        run: makes the call and its backward.
        guarded: whether the regression gate watches it.
    """

    operator: str
    variant: str
    dtype: str
    layout: str
    run: Callable[[], object]
    guarded: bool

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.variant}/{self.dtype}/{self.layout}"


class Maker:
    """Makes the tensors of a case in its dtype and layout."""

    def __init__(self, dtype: str, layout: str) -> None:
        self.dtype, self.layout = DTYPES[dtype], layout

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, requires_grad: bool = True) -> Tensor:
        offset = 1 if self.layout == "offset" else 0
        storage = torch.empty(
            (*shape[:-1], shape[-1] + offset), dtype=dtype or self.dtype, device="meta", requires_grad=requires_grad
        )
        return storage[..., offset:]

    def size(self, aligned: int) -> int:
        """A size that is a multiple of 16, or one that is not."""
        return aligned if self.layout in ("aligned", "huge") else aligned - 3

    def rows(self, rows: int, elements: int) -> int:
        """How many rows of `elements`: so many that offsets need 64 bits where the layout is huge."""
        return 2**31 // elements + 16 if self.layout == "huge" else self.size(rows)


def cases(
    operators: list[str] | None = None,
    dtypes: list[str] | None = None,
    layouts: list[str] | None = None,
    guarded: bool = False,
) -> Iterator[Case]:
    """The cases of these operators, dtypes and layouts (None: all of them), or of the regression gate.

    Raises:
        ValueError: an unknown operator, dtype or layout.
    """
    for name, given, known in (
        ("operators", operators, list(_CASES)),
        ("dtypes", dtypes, list(DTYPES)),
        ("layouts", layouts, list(LAYOUTS)),
    ):
        unknown = sorted(set(given or []) - set(known))
        if unknown:
            raise ValueError(f"{name} must be among {', '.join(known)}; got {', '.join(unknown)}")
    for operator, variants in _CASES.items():
        for variant, (call, guarded_dtypes) in variants.items():
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    watched = layout == "aligned" and dtype in guarded_dtypes
                    chosen = (
                        watched if guarded else (not dtypes or dtype in dtypes) and (not layouts or layout in layouts)
                    )
                    if chosen and (not operators or operator in operators):
                        run = partial(_run, call, variant, dtype, layout)
                        yield Case(operator, variant, dtype, layout, run, watched)


def _run(call: Callable[[Maker], Any], variant: str, dtype: str, layout: str) -> None:
    with _settings(variant):
        result = call(Maker(dtype, layout))
        results = [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.empty_like(tensor) for tensor in results])


@contextmanager
def _settings(variant: str) -> Iterator[None]:
    """The process-wide settings that the words of a variant's name ask for."""
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


def _attention(make: Maker, head_dim: int, features: tuple[str, ...] = (), value_dim: int = 0, group: int = 1) -> Any:
    from fastformer.ops.attention.attention import attention

    heads, kv_heads = 8, 8 // group
    sequence = make.rows(1024, heads * head_dim)
    value_dim = value_dim or head_dim
    shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
    if "packed" in features:
        boundaries = torch.empty(5, dtype=torch.int32, device="meta")
        tensors = [make.tensor(4 * sequence, h, d) for h, d in shapes]
        options: dict[str, Any] = {"cu_seqlens_q": boundaries, "max_seqlen_q": sequence}
    else:
        # As a projection gives them: heads of a token side by side.
        tensors = [make.tensor(2, sequence, h, d).transpose(1, 2) for h, d in shapes]
        options = {}
    arguments: dict[str, Callable[[], Any]] = {
        "causal": lambda: {"causal": True},
        "window": lambda: {"window": (256, 256)},
        "softcap": lambda: {"softcap": 50.0},
        "dropout": lambda: {"dropout_p": 0.1},
        "sinks": lambda: {"sinks": make.tensor(heads, dtype=torch.float32)},
        "alibi": lambda: {"alibi_slopes": make.tensor(heads, dtype=torch.float32)},
        "relative": lambda: {"relative_bias": make.tensor(heads, 2 * sequence - 1)},
        "bias": lambda: {"bias": make.tensor(1, heads, sequence, sequence)},
        "mask": lambda: {"mask": make.tensor(2, 1, sequence, sequence, dtype=torch.bool, requires_grad=False)},
        "key_lengths": lambda: {"key_lengths": torch.empty(2, dtype=torch.int32, device="meta")},
    }
    for feature in features:
        options.update(arguments[feature]() if feature in arguments else {})
    return attention(*tensors, **options)


def _lengths(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int32, device="meta")


def _caches(make: Maker, batch: int, kv_heads: int, head_dim: int, paged: bool) -> tuple[list[Tensor], Tensor | None]:
    """Key and value caches for 4,096 tokens a sequence, and the block table of paged ones."""
    tokens, page = make.rows(4096, kv_heads * head_dim), 16
    shape = (batch * tokens // page, page, kv_heads, head_dim) if paged else (batch, kv_heads, tokens, head_dim)
    table = torch.empty(batch, tokens // page, dtype=torch.int32, device="meta") if paged else None
    return [make.tensor(*shape, requires_grad=False) for _ in range(2)], table


def _decode(make: Maker, queries: int, group: int, paged: bool) -> Tensor:
    from fastformer.ops.attention.decode import decode_attention

    batch, kv_heads, head_dim = 4, 8, 128
    caches, table = _caches(make, batch, kv_heads, head_dim, paged)
    query = make.tensor(batch, kv_heads * group, queries, head_dim, requires_grad=False)
    result = decode_attention(query, *caches, lengths=_lengths(batch), block_table=table)
    assert isinstance(result, Tensor)
    return result


def _append(make: Maker, tokens: int, paged: bool) -> Tensor:
    from fastformer.ops.attention.cache import append_to_cache

    batch, heads, kv_heads, head_dim = 4, 32, 8, 128
    caches, table = _caches(make, batch, kv_heads, head_dim, paged)
    query, key, value = (make.tensor(batch, h, tokens, head_dim, requires_grad=False) for h in (heads, *[kv_heads] * 2))
    angles = [torch.empty(4096, head_dim // 2, device="meta") for _ in range(2)]
    options: dict[str, Any] = {"cos": angles[0], "sin": angles[1], "query": query, "block_table": table}
    result = append_to_cache(key, value, *caches, lengths=_lengths(batch), **options)
    assert result is not None
    return result


def _merge(make: Maker) -> Any:
    from fastformer.ops.attention.merge import merge_attention

    rows = make.rows(4096, 128)
    return merge_attention(make.tensor(4, rows, 128), make.tensor(4, rows, dtype=torch.float32))


def _rotary(make: Maker, interleaved: bool) -> Any:
    from fastformer.ops.rotary import rotary

    sequence = make.rows(1024, 8 * 128)
    query, key = (make.tensor(2, sequence, heads, 128).transpose(1, 2) for heads in (8, 2))
    angles = [torch.empty(sequence, 64, device="meta") for _ in range(2)]
    return rotary(query, key, *angles, interleaved=interleaved)


def _softmax(make: Maker, columns: int, log: bool = False, masked: bool = False, causal: bool = False) -> Tensor:
    from fastformer.ops.softmax import log_softmax, softmax

    columns = make.size(columns)
    x = make.tensor(make.rows(4096, columns), columns)
    mask = make.tensor(1, columns, dtype=torch.bool, requires_grad=False) if masked else None
    return (log_softmax if log else softmax)(x, mask=mask, causal=causal)


def _norm(make: Maker, columns: int, centered: bool, residual: bool, dropout_p: float = 0.0) -> Any:
    from fastformer.ops.normalization import layer_norm, rms_norm

    columns = make.size(columns)
    x = make.tensor(make.rows(4096, columns), columns)
    weight, bias = make.tensor(columns, dtype=torch.float32), make.tensor(columns, dtype=torch.float32)
    norm = partial(layer_norm, bias=bias) if centered else rms_norm
    added = make.tensor(*x.shape) if residual else None
    return norm(x, (columns,), weight, residual=added, dropout_p=dropout_p)


def _attention_weights(make: Maker) -> Tensor:
    from fastformer.ops.attention.weights import attention_weights

    heads, sequence = 8, make.rows(1024, 8 * 64)
    query, key = (make.tensor(2, heads, sequence, 64, requires_grad=False) for _ in range(2))
    return attention_weights(query, key, torch.empty(2, heads, sequence, device="meta"), causal=True, rows=range(64))


def _embedding(make: Maker) -> Tensor:
    from fastformer.ops.embedding import transformer_embedding

    hidden, words = make.size(1024), make.rows(32768, 1024)
    ids = torch.empty(8, make.size(512), dtype=torch.int64, device="meta")
    tables = [make.tensor(rows, hidden) for rows in (words, 512, 2)]
    norm = [make.tensor(hidden, dtype=torch.float32) for _ in range(2)]
    return transformer_embedding(
        ids, *tables, *norm, position_ids=ids, token_type_ids=ids, padding_idx=0, dropout_p=0.1
    )


def _cross_entropy(make: Maker, classes: int) -> Tensor:
    from fastformer.ops.cross_entropy import cross_entropy

    rows, classes = make.rows(2048, classes), make.size(classes)
    return cross_entropy(make.tensor(rows, classes), torch.empty(rows, dtype=torch.int64, device="meta"))


def _feed_forward(make: Maker, activation: str, gated: bool, dropout_p: float = 0.0) -> Tensor:
    from fastformer.ops.feed_forward import feed_forward

    hidden, intermediate = make.size(1024), make.size(4096)
    x = make.tensor(make.rows(4096, hidden), hidden)
    return feed_forward(
        x,
        make.tensor(intermediate, hidden),
        make.tensor(hidden, intermediate),
        make.tensor(intermediate),
        make.tensor(hidden),
        gate_weight=make.tensor(intermediate, hidden) if gated else None,
        gate_bias=make.tensor(intermediate) if gated else None,
        activation=activation,
        hidden_dropout_p=dropout_p,
        output_dropout_p=dropout_p,
        residual=make.tensor(*x.shape) if dropout_p else None,
    )


def _linear_cross_entropy(make: Maker, classes: int) -> Tensor:
    from fastformer.ops.linear_cross_entropy import linear_cross_entropy

    hidden, rows = make.size(1024), make.size(2048)
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    classes = make.size(classes)
    return linear_cross_entropy(make.tensor(rows, hidden), make.tensor(classes, hidden), target)


_BF16 = ("bfloat16",)
_NEVER: tuple[str, ...] = ()
_FEATURES = ("window", "softcap", "dropout", "sinks", "alibi", "bias", "mask", "key_lengths", "packed", "relative")

# For each operator its variants: the call, and the dtypes in which the regression gate watches its aligned layout.
_CASES: dict[str, dict[str, tuple[Callable[[Maker], Any], tuple[str, ...]]]] = {
    "attention": {
        "d64": (partial(_attention, head_dim=64), _BF16),
        "d64-causal": (partial(_attention, head_dim=64, features=("causal",)), _BF16),
        "d128": (partial(_attention, head_dim=128), _BF16),
        "d128-causal": (partial(_attention, head_dim=128, features=("causal",)), _BF16),
        "d256-causal": (partial(_attention, head_dim=256, features=("causal",)), _NEVER),
        "d80-value96": (partial(_attention, head_dim=80, value_dim=96), _NEVER),
        "d128-causal-grouped": (partial(_attention, head_dim=128, group=4, features=("causal",)), _BF16),
        "d64-packed-causal": (partial(_attention, head_dim=64, features=("packed", "causal")), _NEVER),
        "d128-packed-causal": (partial(_attention, head_dim=128, features=("packed", "causal")), _BF16),
        "d128-causal-dropout": (partial(_attention, head_dim=128, features=("causal", "dropout")), _BF16),
        "d128-window": (partial(_attention, head_dim=128, features=("window",)), _BF16),
        "d64-deterministic": (partial(_attention, head_dim=64), _NEVER),
        "d128-causal-deterministic": (partial(_attention, head_dim=128, features=("causal",)), _BF16),
        **{
            f"d64-{name}": (
                partial(_attention, head_dim=64, features=(name,)),
                _BF16 if name in ("window", "softcap", "dropout", "bias") else _NEVER,
            )
            for name in _FEATURES
        },
        "d128-everything": (
            partial(
                _attention,
                head_dim=128,
                group=2,
                features=("causal", "window", "softcap", "dropout", "sinks", "alibi", "bias", "mask", "key_lengths"),
            ),
            _NEVER,
        ),
    },
    "decode": {
        f"{'paged' if paged else 'contiguous'}-{queries}-group-{group}": (
            partial(_decode, queries=queries, group=group, paged=paged),
            _BF16 if paged and queries == 1 and group == 4 else _NEVER,
        )
        for paged in (False, True)
        for queries, group in ((1, 1), (1, 4), (4, 4))
    },
    "append_to_cache": {
        f"{'paged' if paged else 'contiguous'}-{tokens}": (
            partial(_append, tokens=tokens, paged=paged),
            _BF16 if paged and tokens == 1 else _NEVER,
        )
        for paged in (False, True)
        for tokens in (1, 512)
    },
    "merge_attention": {"4-parts": (_merge, _BF16)},
    "rotary": {
        "half": (partial(_rotary, interleaved=False), _BF16),
        "interleaved": (partial(_rotary, interleaved=True), _NEVER),
    },
    "softmax": {
        "1024": (partial(_softmax, columns=1024), _BF16),
        "8192": (partial(_softmax, columns=8192), _NEVER),
        "65536": (partial(_softmax, columns=65536), _BF16),
        "1024-log": (partial(_softmax, columns=1024, log=True), _NEVER),
        "1024-masked-causal": (partial(_softmax, columns=1024, masked=True, causal=True), _NEVER),
    },
    "norm": {
        f"{'layer' if centered else 'rms'}-{columns}{'-residual' if residual else ''}": (
            partial(_norm, columns=columns, centered=centered, residual=residual),
            _BF16 if centered and (columns == 1024 or (columns == 32768 and residual)) else _NEVER,
        )
        for columns in (768, 1024, 4096, 32768)
        for centered in (True, False)
        for residual in (False, True)
    }
    | {
        "layer-768-residual-dropout": (partial(_norm, columns=768, centered=True, residual=True, dropout_p=0.1), _NEVER)
    },
    "attention_weights": {"d64-causal": (_attention_weights, _NEVER)},
    "embedding": {"1024": (_embedding, _BF16)},
    "feed_forward": {
        f"{activation}{'-gated' if gated else ''}{'-dropout-residual' if dropout_p else ''}-{plan}": (
            partial(_feed_forward, activation=activation, gated=gated, dropout_p=dropout_p),
            _BF16 if activation == ("silu" if gated else "gelu") and bool(dropout_p) != gated else _NEVER,
        )
        for plan in get_args(Plan)
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "squared_relu")
        for gated in (False, True)
        for dropout_p in (0.0, 0.1)
    },
    "cross_entropy": {"32768": (partial(_cross_entropy, classes=32768), _NEVER)},
    "linear_cross_entropy": {
        "32768": (partial(_linear_cross_entropy, classes=32768), _BF16),
    },
}

OPERATORS = tuple(_CASES)
