"""Measures the error of every operator against float64, and compares it with the error of PyTorch's own.

Errors are the largest over all elements, in units of rounding: of the dtype's epsilon at the largest exact magnitude.
The rule that Fastformer keeps is that an operator's error is at most twice PyTorch's in the same dtype plus one unit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from fastformer.backends import HAS_TRITON
from fastformer.console import Table

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """An operator in one regime.

    Attributes:
        operator, regime: their names.
        make: its tensors in float64.
        ours: the operator. plain: PyTorch's own computation, in the dtype of its inputs; float64 gives the exact one.
        fused: PyTorch's fused operator, where there is one beside `plain`.
        differentiable: whether gradients are measured, of all the tensors; else the output alone.
    """

    operator: str
    regime: str
    make: Callable[[], list[Tensor]]
    ours: Function
    plain: Function
    fused: Function | None = None
    differentiable: bool = True


@dataclass(frozen=True)
class Error:
    """The error of one result of one implementation, in units of rounding.

    Attributes:
        result: output, or gradient 0, 1, ... of a tensor of the problem.
        implementation: triton, torch (Fastformer's backends), pytorch (plain) or sdpa.
        units: None where the implementation gives NaN or infinity and float64 does not.
        kept: whether the rule holds; None for PyTorch's own.
    """

    operator: str
    regime: str
    dtype: str
    result: str
    implementation: str
    units: float | None
    kept: bool | None


def errors_of(problem: Problem, dtype: str, device: str, seed: int) -> Iterator[Error]:
    """The errors of every implementation and result of a problem in one dtype."""
    torch.manual_seed(seed)
    tensors = [tensor.to(device, DTYPES[dtype]) for tensor in problem.make()]
    differentiable = problem.differentiable
    exact = _results(problem.plain, [tensor.double() for tensor in tensors], differentiable)
    measured = {"pytorch": _units(_results(problem.plain, tensors, differentiable), exact)}
    if problem.fused is not None:
        measured["sdpa"] = _units(_results(problem.fused, tensors, differentiable), exact)
    for backend in available_backends(device):
        with fastformer.backend(backend):
            measured[backend] = _units(_results(problem.ours, tensors, differentiable), exact)
    for implementation, units in measured.items():
        for number, error in enumerate(units):
            own = implementation in ("pytorch", "sdpa")
            allowed = _allowed([measured[name][number] for name in ("pytorch", "sdpa") if name in measured])
            kept = None if own else error is not None and error <= allowed
            result = "output" if number == 0 else f"gradient {number - 1}"
            yield Error(problem.operator, problem.regime, dtype, result, implementation, error, kept)


def available_backends(device: str) -> list[str]:
    """Fastformer's backends that can run on `device` in this process."""
    on_gpu = torch.device(device).type == "cuda"
    kernels = HAS_TRITON and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1")
    return ["triton", "torch"] if kernels else ["torch"]


def _allowed(pytorch: list[float | None]) -> float:
    """Twice PyTorch's worst plus one unit; anything finite where PyTorch itself fails."""
    return float("inf") if None in pytorch else 2 * max(error for error in pytorch if error is not None) + 1


def _results(function: Function, tensors: list[Tensor], differentiable: bool) -> list[Tensor]:
    """Output and any gradients, of a loss that weighs each element of the output differently."""
    leaves = [tensor.detach().requires_grad_(differentiable) for tensor in tensors]
    output = function(*leaves)
    if not differentiable:
        return [output]
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights.to(output))]


def _units(actual: list[Tensor], exact: list[Tensor]) -> list[float | None]:
    units: list[float | None] = []
    for a, e in zip(actual, exact, strict=True):
        unit = torch.finfo(a.dtype).eps * max(e.abs().max().item(), torch.finfo(a.dtype).tiny)
        error = (a.double() - e).abs().max().item() / unit
        units.append(error if error < float("inf") else None)  # NaN compares false
    return units


# --- Problems ---------------------------------------------------------------------------------------------------------


def _randn(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * scale + shift


def _attention_problem(
    regime: str,
    keys: int = 96,
    scale: float = 1.0,
    value_scale: float = 1.0,
    masked: bool = False,
    causal: bool = False,
) -> Problem:
    queries = 32
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(0), device="cpu") > 0.5 if masked else None
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    def make() -> list[Tensor]:
        return [
            _randn(1, 2, queries, 32, scale=scale),
            _randn(1, 2, keys, 32),
            _randn(1, 2, keys, 32, scale=value_scale),
        ]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = fastformer.attention(query, key, value, mask=None if mask is None else mask.to(query.device))
        assert isinstance(output, Tensor)
        return output

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask.to(query.device), float("-inf"))
        return scores.softmax(-1) @ value

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, None if mask is None else mask.to(query.device))

    return Problem("attention", regime, make, ours, plain, fused)


def _decode_problem(
    regime: str,
    lengths: tuple[int, ...] = (96, 96),
    scale: float = 1.0,
    value_scale: float = 1.0,
    page_size: int | None = None,
) -> Problem:
    """Two queries of each sequence, causal, over a cache that is as long as the longest."""
    batch, queries, capacity = len(lengths), 2, max(lengths)
    last_key = torch.tensor(lengths)[:, None] - queries + torch.arange(queries)
    mask = (torch.arange(capacity) <= last_key[..., None])[:, None]

    def make() -> list[Tensor]:
        return [
            _randn(batch, 4, queries, 32, scale=scale),
            _randn(batch, 1, capacity, 32),
            _randn(batch, 1, capacity, 32, scale=value_scale),
        ]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        block_table = None
        if page_size is not None:
            # The pages of each sequence stand in the cache in reverse.
            pages = torch.arange(batch * capacity // page_size, dtype=torch.int32, device=query.device)
            block_table = pages.flip(0).view(batch, -1)
            key, value = (cache.reshape(len(pages), page_size, 1, -1).flip(0) for cache in (key, value))
        ends = torch.tensor(lengths, dtype=torch.int32, device=query.device)
        output = fastformer.decode_attention(query, key, value, lengths=ends, block_table=block_table)
        assert isinstance(output, Tensor)
        return output

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.masked_fill(~mask.to(query.device), float("-inf")).softmax(-1) @ value

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (cache.expand(-1, query.shape[1], -1, -1) for cache in (key, value))
        return F.scaled_dot_product_attention(query, key, value, mask.to(query.device))

    return Problem("decode_attention", regime, make, ours, plain, fused, differentiable=False)


def _merge_problem(
    regime: str, parts: int = 4, scale: float = 1.0, output_scale: float = 1.0, masked: bool = False
) -> Problem:
    """Parts of attention outputs (parts, rows, head_dim) by log-sum-exps; `masked`: half of the parts have no key."""
    rows = 32

    def make() -> list[Tensor]:
        lses = _randn(parts, rows, scale=scale)
        if masked:
            lses[(torch.arange(parts)[:, None] + torch.arange(rows)) % 2 == 0] = float("-inf")
        return [_randn(parts, rows, 32, scale=output_scale), lses]

    return Problem(
        "merge_attention",
        regime,
        make,
        lambda outputs, lses: fastformer.merge_attention(outputs, lses.float())[0],
        lambda outputs, lses: (_at_least_float32(lses).softmax(0)[..., None] * outputs).sum(0).to(outputs.dtype),
    )


def _rotary_problem(
    regime: str,
    first_position: int = 0,
    scale: float = 1.0,
    rotary_dim: int = 32,
    interleaved: bool = False,
) -> Problem:
    sequence = 8
    positions = torch.arange(first_position, first_position + sequence)
    cos, sin = fastformer.rotary_table(fastformer.rotary_frequencies(rotary_dim), first_position + sequence)

    def ours(query: Tensor, key: Tensor) -> Tensor:
        device = query.device
        rotated = fastformer.rotary(
            query,
            key,
            cos.to(device),
            sin.to(device),
            position_ids=positions.to(device)[None],
            interleaved=interleaved,
        )
        return torch.cat(rotated, 1)

    def plain(query: Tensor, key: Tensor) -> Tensor:
        x = torch.cat((query, key), 1)
        turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        c, s = (table[positions].to(x.device) for table in (cos, sin))
        if interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat((a * c - b * s, b * c + a * s), -1)
        return torch.cat((turned.to(x.dtype), rest), -1)

    return Problem(
        "rotary",
        regime,
        lambda: [_randn(1, 2, sequence, 32, scale=scale), _randn(1, 1, sequence, 32, scale=scale)],
        ours,
        plain,
    )


def _softmax_problem(
    regime: str, shape: tuple[int, int] = (32, 500), scale: float = 1.0, shift: float = 0.0
) -> Problem:
    return Problem(
        "softmax",
        regime,
        lambda: [_randn(*shape, scale=scale, shift=shift)],
        lambda x: fastformer.softmax(x),
        lambda x: x.softmax(-1),
    )


_NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "layer_norm": (fastformer.layer_norm, F.layer_norm),
    "rms_norm": (fastformer.rms_norm, F.rms_norm),
}


def _norm_problem(
    operator: str, regime: str, shape: tuple[int, int] = (32, 500), scale: float = 1.0, shift: float = 0.0
) -> Problem:
    columns = shape[1]
    ours, plain = _NORMS[operator]
    return Problem(
        operator,
        regime,
        lambda: [_randn(*shape, scale=scale, shift=shift), _randn(columns)],
        lambda x, weight: ours(x, (columns,), weight, eps=1e-5),
        lambda x, weight: plain(x, (columns,), weight, eps=1e-5),
    )


def _embedding_problem(
    regime: str,
    hidden: int = 96,
    words: int = 50,
    tokens: tuple[int, int] = (2, 24),
    scale: float = 1.0,
    shift: float = 0.0,
) -> Problem:
    sequence = tokens[1]
    ids = torch.arange(tokens[0] * sequence).view(tokens) * 7 % words
    types = ids % 2

    def make() -> list[Tensor]:
        tables = [_randn(rows, hidden, scale=scale, shift=shift) for rows in (words, sequence, 2)]
        return [*tables, _randn(hidden), _randn(hidden)]

    def ours(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        device = word.device
        return fastformer.transformer_embedding(
            ids.to(device), word, position, token_type, weight, bias, token_type_ids=types.to(device)
        )

    def plain(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        device = word.device
        embedded = F.embedding(ids.to(device), word) + position + F.embedding(types.to(device), token_type)
        return F.layer_norm(embedded, (hidden,), weight, bias, eps=1e-12)

    return Problem("transformer_embedding", regime, make, ours, plain)


def _feed_forward_problem(regime: str, intermediate: int = 96, scale: float = 1.0) -> Problem:
    features = 48
    return Problem(
        "feed_forward",
        regime,
        lambda: [
            _randn(32, features, scale=scale),
            _randn(intermediate, features, scale=features**-0.5),
            _randn(features, intermediate, scale=intermediate**-0.5),
        ],
        lambda x, up, down: fastformer.feed_forward(x, up, down),
        lambda x, up, down: F.linear(F.gelu(F.linear(x, up)), down),
    )


def _cross_entropy_problem(
    regime: str,
    shape: tuple[int, int] = (32, 500),
    scale: float = 1.0,
    shift: float = 0.0,
    label_smoothing: float = 0.0,
    masked: bool = False,
) -> Problem:
    rows, classes = shape
    target = torch.arange(rows) * 7 % classes
    if masked:
        target[::2] = -100
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": label_smoothing}
    return Problem(
        "cross_entropy",
        regime,
        lambda: [_randn(*shape, scale=scale, shift=shift)],
        lambda x: fastformer.cross_entropy(x, target.to(x.device), **options),
        lambda x: F.cross_entropy(_at_least_float32(x), target.to(x.device), **options).to(x.dtype),
    )


def _linear_cross_entropy_problem(regime: str, classes: int = 500, scale: float = 1.0) -> Problem:
    target = torch.arange(32) * 7 % classes
    return Problem(
        "linear_cross_entropy",
        regime,
        lambda: [_randn(32, 48, scale=scale), _randn(classes, 48, scale=48**-0.5)],
        lambda x, weight: fastformer.linear_cross_entropy(x, weight, target.to(x.device)),
        lambda x, weight: F.cross_entropy(_at_least_float32(x @ weight.T), target.to(x.device)),
    )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def problems() -> list[Problem]:
    """Every operator in every regime."""
    return [
        _attention_problem("ordinary"),
        _attention_problem("large logits", scale=30.0),
        _attention_problem("long rows", keys=1000),
        _attention_problem("tiny values", value_scale=1e-4),
        _attention_problem("random mask", masked=True),
        _attention_problem("causal", causal=True),
        _decode_problem("ordinary"),
        _decode_problem("large logits", scale=30.0),
        _decode_problem("long rows", lengths=(1000,)),
        _decode_problem("tiny values", value_scale=1e-4),
        _decode_problem("lengths", lengths=(96, 17, 2)),
        _decode_problem("pages", lengths=(96, 41), page_size=16),
        _merge_problem("ordinary"),
        _merge_problem("large logits", scale=50.0),
        _merge_problem("long rows", parts=300),
        _merge_problem("tiny values", output_scale=1e-4),
        _merge_problem("parts without keys", masked=True),
        _rotary_problem("ordinary"),
        _rotary_problem("far positions", first_position=20000),
        _rotary_problem("large inputs", scale=30.0),
        _rotary_problem("tiny scale", scale=1e-4),
        _rotary_problem("interleaved half", rotary_dim=16, interleaved=True),
        _softmax_problem("ordinary"),
        _softmax_problem("large logits", scale=50.0),
        _softmax_problem("long rows", shape=(2, 40000)),
        _softmax_problem("tiny scale", scale=1e-4),
        _softmax_problem("far from zero", shift=1000.0),
        *(
            _norm_problem(operator, regime, **options)
            for operator in _NORMS
            for regime, options in (
                ("ordinary", dict[str, Any]()),
                ("far from zero", {"shift": 100.0}),
                ("long rows", {"shape": (2, 40000)}),
                ("tiny scale", {"scale": 1e-3}),
            )
        ),
        _embedding_problem("ordinary"),
        _embedding_problem("far from zero", shift=100.0),
        _embedding_problem("long rows", hidden=4000, words=2, tokens=(1, 2)),
        _embedding_problem("tiny scale", scale=1e-3),
        _embedding_problem("one word", words=1, tokens=(4, 48)),
        _feed_forward_problem("ordinary"),
        _feed_forward_problem("long rows", intermediate=1000),
        _feed_forward_problem("large inputs", scale=30.0),
        _feed_forward_problem("tiny scale", scale=1e-3),
        _cross_entropy_problem("ordinary"),
        _cross_entropy_problem("large logits", scale=50.0),
        _cross_entropy_problem("long rows", shape=(2, 40000)),
        _cross_entropy_problem("tiny scale", scale=1e-3),
        _cross_entropy_problem("far from zero", shift=1000.0),
        _cross_entropy_problem("smoothed, half ignored", label_smoothing=0.1, masked=True),
        _linear_cross_entropy_problem("ordinary"),
        _linear_cross_entropy_problem("large logits", scale=30.0),
        _linear_cross_entropy_problem("long rows", classes=20000),
        _linear_cross_entropy_problem("tiny scale", scale=1e-3),
    ]


# --- Showing ----------------------------------------------------------------------------------------------------------

# Implementations with the colors (Okabe and Ito's) and markers of the picture.
_STYLES = (("triton", "#D55E00", "o"), ("torch", "#E69F00", "s"), ("pytorch", "#0072B2", "d"), ("sdpa", "#009E73", "v"))
_IMPLEMENTATIONS = tuple(name for name, _, _ in _STYLES)


def as_table(errors: Sequence[Error]) -> Table:
    """A row for each operator, regime and dtype with the worst result of each implementation."""
    shown = [name for name in _IMPLEMENTATIONS if any(error.implementation == name for error in errors)]
    rows = []
    for key, row in _grouped(errors).items():
        broken = sorted({error.result for error in row if error.kept is False})
        cells = [_worst([error.units for error in row if error.implementation == name]) for name in shown]
        rows.append((*key, *cells, f"broken: {', '.join(broken)}" if broken else "kept"))
    names = [{"pytorch": "PyTorch", "sdpa": "SDPA"}.get(name, name) for name in shown]
    return Table(
        ("operator", "regime", "dtype", *names, "rule"),
        rows,
        f"lll{'r' * len(shown)}l",
        title="largest error of output and gradients against float64, in units of rounding",
    )


def _worst(units: list[float | None]) -> str:
    if not units:
        return ""
    return "not finite" if None in units else f"{max(unit for unit in units if unit is not None):.2f}"


def _grouped(errors: Sequence[Error]) -> dict[tuple[str, str, str], list[Error]]:
    rows: dict[tuple[str, str, str], list[Error]] = {}
    for error in errors:
        rows.setdefault((error.operator, error.regime, error.dtype), []).append(error)
    return rows


def draw(errors: Sequence[Error], path: Path) -> None:
    """Write a picture of the worst result of each operator, regime and dtype to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(error.dtype for error in errors))
    rows = list(dict.fromkeys((error.operator, error.regime) for error in errors))
    size = (3 + 4 * len(dtypes), 1.5 + 0.25 * len(rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for name, color, marker in _STYLES:
            points = [
                (max(units), row) for row, key in enumerate(rows) if (units := _finite_units(errors, key, dtype, name))
            ]
            if points:
                x, y = zip(*points, strict=True)
                axis.scatter(x, y, color=color, marker=marker, s=22, label=name, alpha=0.8)
        axis.set(xscale="log", title=dtype, xlabel="largest error, units of rounding")
        axis.grid(True, linewidth=0.3)
    axes[0][0].set_yticks(range(len(rows)), [f"{operator}, {regime}" for operator, regime in rows], fontsize=8)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _finite_units(errors: Sequence[Error], key: tuple[str, str], dtype: str, implementation: str) -> list[float]:
    return [
        max(error.units, 1e-3)  # an exact result has no place on a logarithmic axis
        for error in errors
        if (error.operator, error.regime) == key
        and error.dtype == dtype
        and error.implementation == implementation
        and error.units is not None
    ]
