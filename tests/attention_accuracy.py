"""The rule of accuracy for attention: the magnitude whose rounding is the unit for each of its results."""

from __future__ import annotations

from typing import Any

import torch

LEARNED = ("bias", "relative_bias", "alibi_slopes", "scale", "sinks")


def learned_in(options: dict[str, Any]) -> list[str]:
    """The names of the options that get a gradient."""
    return [name for name in LEARNED if isinstance(options.get(name), torch.Tensor)]


def result_names(options: dict[str, Any]) -> list[str]:
    """The names of the results of a call and of its backward, in order."""
    return ["output", "lse", "grad_query", "grad_key", "grad_value", *(f"grad_{name}" for name in learned_in(options))]


def as_dtype(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the options with every floating tensor in `dtype`."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def run(function: Any, tensors: list[torch.Tensor], options: dict[str, Any], weights: list[torch.Tensor]) -> list[Any]:
    """Return output, log-sum-exp and every gradient, for a loss that uses both results."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    learned = {name: options[name].detach().requires_grad_() for name in learned_in(options)}
    output, lse = function(*leaves, **{**options, **learned})
    finite = torch.isfinite(lse)
    loss = (output * weights[0].to(output.dtype)).sum()
    loss = loss + (lse.masked_fill(~finite, 0.0) * weights[1].to(lse.dtype)).sum()
    loss.backward()
    return [output.detach(), lse.detach(), *(leaf.grad for leaf in leaves), *(leaf.grad for leaf in learned.values())]


def magnitudes(
    actual: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    grad_output: torch.Tensor,
    tensors: list[torch.Tensor],
    options: dict[str, Any],
) -> dict[str, float]:
    """Return, for each result, the magnitude whose rounding in the result's dtype is the allowed unit of error.

    Weights are exp(score - lse). The exponent is float32 and is rounded to within a unit of its own magnitude: that is
    the relative error of a weight. Sums of n such terms, added in another order than PyTorch's, differ by about
    sqrt(n) roundings. In 16 bits the rounding of the results hides both, except in the log-sum-exp, which is float32.

    Args:
        actual, exact: the results by their names, as computed and in float64.
        grad_output: the output's gradient.
        tensors: query, key and value.
        options: the call's other arguments.
    """
    dtype = tensors[0].dtype
    longest = max(max(tensor.shape) for tensor in tensors)
    of_float32 = (1.0 + scale_of(exact["lse"])) * longest**0.5
    roundings = of_float32 if dtype == torch.float32 else 1.0
    row_sums = sums_of_row_errors(grad_output, exact["output"], tensors, options)
    left = left_of_cancelled_rows(grad_output, exact["output"], tensors, options) if dtype == torch.float32 else {}
    found = {}
    for name, result in exact.items():
        # The output is rounded to the call's dtype. The gradients of slopes and sinks are float32 in any case.
        coarser = torch.finfo(dtype).eps / torch.finfo(actual[name].dtype).eps
        found[name] = max(roundings * max(scale_of(result), row_sums.get(name, 0.0) * coarser), left.get(name, 0.0))
    return {**found, "lse": of_float32 * scale_of(exact["lse"])}


def scale_of(exact: torch.Tensor) -> float:
    """Return the largest finite magnitude, or 1 if that is larger: about the magnitude of the terms of the sums."""
    finite = exact[torch.isfinite(exact)]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0


def sums_of_row_errors(
    grad_output: torch.Tensor, output: torch.Tensor, tensors: list[torch.Tensor], options: dict[str, Any]
) -> dict[str, float]:
    """Return the magnitude whose rounding enters gradients that sum whole rows of dS = P * (dP - delta).

    delta = sum(dO * O) is computed from the stored output, which is rounded to its dtype. Its error is up to half a
    unit of sum |dO * O|. Bias, relative bias, slopes and sinks sum this error over the rows that share an element. For
    slopes it is multiplied by distances, for scales by products of queries and keys.
    """
    rows = (grad_output * output).abs().sum(-1)
    keys = tensors[1].shape[2]
    sums = {}
    if "bias" in options:
        sums["grad_bias"] = rows.sum_to_size([*options["bias"].shape[:3]]).max().item()
    for name in ("relative_bias", "sinks"):
        sums[f"grad_{name}"] = rows.sum((0, 2)).max().item()
    sums["grad_alibi_slopes"] = (rows.sum((0, 2)) * (rows.shape[2] + keys)).max().item()
    if keys and isinstance(options.get("scale"), torch.Tensor):
        query, key = tensors[0].double(), tensors[1].double().repeat_interleave(rows.shape[1] // tensors[1].shape[1], 1)
        products = (query @ key.transpose(-1, -2)).abs().amax(-1)
        sums["grad_scale"] = (rows * products).sum((0, 2)).max().item()
    return sums


def left_of_cancelled_rows(
    grad_output: torch.Tensor, output: torch.Tensor, tensors: list[torch.Tensor], options: dict[str, Any]
) -> dict[str, float]:
    """Return the magnitude whose rounding stays in the gradients of query and key where dP - delta cancels.

    With few keys P is near 1 and dP is near delta. Then dS is only the rounding of both: a rounding of sum |dO * O|,
    which is added in another order than PyTorch's. The gradient of a query sums it over the keys, whose P sum to 1. The
    gradient of a key sums it over the queries, m / n of them for each of n keys, in random directions.
    """
    query, key = tensors[0].double().abs(), tensors[1].double().abs()
    scale = options.get("scale")
    factor = query.shape[-1] ** -0.5 if scale is None else float(torch.as_tensor(scale).abs().max())
    if not query.numel() or not key.numel():
        return {}
    rows = (grad_output * output).abs().sum(-1)
    queries_per_key = max(1.0, query.shape[1] * query.shape[2] / (key.shape[1] * key.shape[2]))
    return {
        "grad_query": factor * rows.max().item() * key.max().item(),
        "grad_key": factor * queries_per_key**0.5 * (rows * query.amax(-1)).max().item(),
    }
