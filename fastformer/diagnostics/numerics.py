"""Measure the error of every operator against float64, and compare it with the error of PyTorch's functions.

An error is the largest one of all elements. Its unit is a rounding: the dtype's epsilon times the largest exact
magnitude. Fastformer's rule: the error of an operator is at most twice PyTorch's in the same dtype, plus one unit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastformer
from fastformer.backends import HAS_TRITON
from fastformer.console import Table
from fastformer.registry import OPERATORS, Call, Make, Operator
from fastformer.registry.operator import Function

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """An operator of the registry in one regime.

    Attributes:
        operator, regime: the name of the operator and the name of the regime.
        inputs: the sizes, features and scales that the operator's inputs are made with.
    """

    operator: str
    regime: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Error:
    """The error of one result of one implementation, in units of rounding.

    Attributes:
        operator, regime, dtype: the names of the operator, the regime and the dtype.
        result: "output", or "gradient 0", "gradient 1", ... for the tensors of the problem that have gradients.
        implementation: "triton" or "torch" (Fastformer's backends), "pytorch" (the formula in PyTorch), or "sdpa".
        units: the error; None if it is not finite.
        kept: whether the rule holds; None for PyTorch's implementations.
    """

    operator: str
    regime: str
    dtype: str
    result: str
    implementation: str
    units: float | None
    kept: bool | None


def errors_of(problem: Problem, dtype: str, device: str, seed: int) -> Iterator[Error]:
    """Yield the errors of every implementation and result of a problem in one dtype."""
    torch.manual_seed(seed)
    operator = OPERATORS[problem.operator]
    call = operator.inputs(Make(DTYPES[dtype], torch.device(device)), **problem.inputs)
    rounded = call._replace(
        tensors=call.tensors | {n: call.tensors[n].to(DTYPES[dtype]) for n in operator.differentiable(call.tensors)}
    )
    exact = _results(operator, operator.plain, rounded.double())

    def ours(**arguments: Any) -> Any:
        # Some tensors are float32 in every dtype. The operator gets them in float32, with the rounded values that all
        # implementations get.
        return operator.ours(**{name: _like(value, call.tensors.get(name)) for name, value in arguments.items()})

    measured = {"pytorch": _units(_results(operator, operator.plain, rounded), exact)}
    if operator.fused is not None and "score_mod" not in rounded.options:  # PyTorch's takes no function of the scores
        measured["sdpa"] = _units(_results(operator, operator.fused, rounded), exact)
    for backend in available_backends(device):
        with fastformer.backend(backend):
            measured[backend] = _units(_results(operator, ours, rounded), exact)
    for implementation, units in measured.items():
        for number, error in enumerate(units):
            own = implementation in ("pytorch", "sdpa")
            allowed = _allowed([measured[name][number] for name in ("pytorch", "sdpa") if name in measured])
            kept = None if own else error is not None and error <= allowed
            result = "output" if number == 0 else f"gradient {number - 1}"
            yield Error(problem.operator, problem.regime, dtype, result, implementation, error, kept)


def _like(value: Any, made: Tensor | None) -> Any:
    return value if made is None else value.to(made.dtype)


def available_backends(device: str) -> list[str]:
    """Fastformer's backends that can run on `device` in this process."""
    on_gpu = torch.device(device).type == "cuda"
    kernels = HAS_TRITON and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1")
    return ["triton", "torch"] if kernels else ["torch"]


def _allowed(pytorch: list[float | None]) -> float:
    """The largest error that the rule allows. If PyTorch's error is not finite, any finite error is allowed."""
    return float("inf") if None in pytorch else 2 * max(error for error in pytorch if error is not None) + 1


def _results(operator: Operator, function: Function, call: Call) -> list[Tensor]:
    """The output and its gradients, for a loss that gives each element of the output a different weight."""
    leaves = operator.leaves(call.tensors)
    output = operator.output(function, call._replace(tensors=leaves))
    wanted = [each for each in leaves.values() if each.requires_grad]
    if not wanted:
        return [output]
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, wanted, weights)]


def _units(actual: list[Tensor], exact: list[Tensor]) -> list[float | None]:
    units: list[float | None] = []
    for a, e in zip(actual, exact, strict=True):
        unit = torch.finfo(a.dtype).eps * max(e.abs().max().item(), torch.finfo(a.dtype).tiny)
        error = (a.double() - e).abs().max().item() / unit
        units.append(error if error < float("inf") else None)  # NaN compares false
    return units


# --- Problems ---------------------------------------------------------------------------------------------------------

_ATTENTION: dict[str, Any] = {"queries": 32, "keys": 96, "head_dim": 32, "features": ()}
_DECODE: dict[str, Any] = {"lengths": (96, 96)}
_WIDE_ROWS = {"rows": 32, "columns": 500}
_NORM: dict[str, dict[str, Any]] = {
    "ordinary": _WIDE_ROWS,
    "far from zero": _WIDE_ROWS | {"shift": 100.0},
    "long rows": {"rows": 2, "columns": 40000},
    "tiny scale": _WIDE_ROWS | {"scale": 1e-3},
}
_FEED_FORWARD = {"tokens": 32, "features": 48, "intermediate": 96}
_CROSS_ENTROPY = {"reduction": "none"}
_LINEAR = {"rows": 32, "classes": 500, "features": 48}

# The regimes of each operator, and the arguments that its inputs are made with. All other operators have one regime,
# with ordinary inputs.
_REGIMES: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "ordinary": _ATTENTION,
        "large logits": _ATTENTION | {"scale": 30.0},
        "long rows": _ATTENTION | {"keys": 1000},
        "tiny values": _ATTENTION | {"value_scale": 1e-4},
        "random mask": _ATTENTION | {"features": ("mask",)},
        "causal": _ATTENTION | {"features": ("causal",)},
        "block mask": _ATTENTION | {"keys": 140, "features": ("block_mask",)},
        "score_mod": _ATTENTION | {"features": ("score_mod",)},
        "wide heads": _ATTENTION | {"keys": 48, "head_dim": 512},
    },
    "decode_attention": {
        "ordinary": _DECODE,
        "large logits": _DECODE | {"scale": 30.0},
        "long rows": {"lengths": (1000,)},
        "tiny values": _DECODE | {"value_scale": 1e-4},
        "lengths": {"lengths": (96, 17, 2)},
        "pages": {"lengths": (96, 41), "page_size": 16},
        "block mask": {"lengths": (140, 41), "block_mask": True},
        "latent": {"lengths": (48,), "head_dim": 576, "latent_dim": 512},
    },
    "merge_attention": {
        "ordinary": {},
        "large logits": {"scale": 50.0},
        "long rows": {"parts": 300},
        "tiny values": {"output_scale": 1e-4},
        "parts without keys": {"masked": True},
    },
    "rotary": {
        "ordinary": {},
        "far positions": {"first_position": 20000},
        "large inputs": {"scale": 30.0},
        "tiny scale": {"scale": 1e-4},
        "interleaved half": {"rotary_dim": 16, "interleaved": True},
    },
    "softmax": {
        "ordinary": _WIDE_ROWS,
        "large logits": _WIDE_ROWS | {"scale": 50.0},
        "long rows": {"rows": 2, "columns": 40000},
        "tiny scale": _WIDE_ROWS | {"scale": 1e-4},
        "far from zero": _WIDE_ROWS | {"shift": 1000.0},
    },
    "layer_norm": _NORM,
    "rms_norm": _NORM,
    "transformer_embedding": {
        "ordinary": {},
        "far from zero": {"shift": 100.0},
        "long rows": {"hidden": 4000, "words": 2, "batch": 1, "tokens": 2},
        "tiny scale": {"scale": 1e-3},
        "one word": {"words": 1, "batch": 4, "tokens": 48},
    },
    "feed_forward": {
        "ordinary": _FEED_FORWARD,
        "long rows": _FEED_FORWARD | {"intermediate": 1000},
        "large inputs": _FEED_FORWARD | {"scale": 30.0},
        "tiny scale": _FEED_FORWARD | {"scale": 1e-3},
    },
    "cross_entropy": {
        "ordinary": _CROSS_ENTROPY,
        "large logits": _CROSS_ENTROPY | {"scale": 50.0},
        "long rows": _CROSS_ENTROPY | {"rows": 2, "classes": 40000},
        "tiny scale": _CROSS_ENTROPY | {"scale": 1e-3},
        "far from zero": _CROSS_ENTROPY | {"shift": 1000.0},
        "smoothed, half ignored": _CROSS_ENTROPY | {"label_smoothing": 0.1, "ignored": True},
    },
    "linear_cross_entropy": {
        "ordinary": _LINEAR,
        "large logits": _LINEAR | {"scale": 30.0},
        "long rows": _LINEAR | {"classes": 20000},
        "tiny scale": _LINEAR | {"scale": 1e-3},
    },
}


def problems() -> list[Problem]:
    """The problems: every operator in each of its regimes."""
    others = {name: {"ordinary": dict[str, Any]()} for name in OPERATORS if name not in _REGIMES}
    return [
        Problem(operator, regime, inputs)
        for operator, regimes in (_REGIMES | others).items()
        for regime, inputs in regimes.items()
    ]


# --- Showing ----------------------------------------------------------------------------------------------------------

# Implementations with the colors (Okabe and Ito's) and markers of the picture.
_STYLES = (("triton", "#D55E00", "o"), ("torch", "#E69F00", "s"), ("pytorch", "#0072B2", "d"), ("sdpa", "#009E73", "v"))
_IMPLEMENTATIONS = tuple(name for name, _, _ in _STYLES)


def as_table(errors: Sequence[Error]) -> Table:
    """A table with a row for each operator, regime and dtype. It has the largest error of each implementation."""
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
    """Write a picture of the largest error of each operator, regime and dtype to `path`."""
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
        max(error.units, 1e-3)  # a logarithmic axis cannot show an error of zero
        for error in errors
        if (error.operator, error.regime) == key
        and error.dtype == dtype
        and error.implementation == implementation
        and error.units is not None
    ]
