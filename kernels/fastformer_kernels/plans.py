"""Which plan a part of the feed-forward block follows: one fused kernel, or a library's product and a pass over it.

The fused kernel saves passes over the result; the library's product is faster than Triton's, and the more so the deeper
it is. What `fastformer tune` measured on the user's GPU decides, class of shapes by class; where nothing was measured,
a rule with one number per architecture.
"""

from __future__ import annotations

import json
import os
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import triton

from fastformer_kernels.launch import architecture_of
from fastformer_kernels.precision import input_precision

Operation = Literal[
    "hidden_forward", "gated_hidden_forward", "output_forward", "hidden_backward", "gated_hidden_backward"
]
Plan = Literal["fused", "library"]

# Passes over its result that the fused kernel of an operation saves.
SAVED_PASSES: dict[Operation, int] = {
    "hidden_forward": 1,
    "gated_hidden_forward": 1,
    "output_forward": 2,
    "hidden_backward": 2,
    "gated_hidden_backward": 2,
}
# The deepest 16-bit product for which one pass saved outweighs the library's faster product. Modelled, not measured:
# peak 16-bit throughput over memory bandwidth, times the share of the library's speed that Triton's product lacks.
# Exact float32 and tf32 products are the library's always.
_DEPTH_PER_PASS = {
    "sm_80": 2048,
    "sm_86": 2048,
    "sm_89": 2048,
    "sm_90": 1024,
    "sm_100": 512,
    "sm_120": 2048,
    "gfx90a": 1024,
    "gfx942": 1024,
    "gfx950": 512,
}
# Fewer rows leave most of a GPU without a tile.
_FEWEST_TOKENS = 256

# Upper ends of the classes of shapes that are measured; there is one more class beyond each last end.
TOKEN_CLASSES = (256, 2048)
DEPTH_CLASSES = (512, 1024, 2048, 4096)

FORMAT = 1
_forced: Plan | None = None


def is_fused(operation: Operation, input: torch.Tensor, depth: int) -> bool:
    """Whether `operation` on `input` (tokens, ...), a product over `depth`, runs as one kernel."""
    if _forced is not None:
        return _forced == "fused"
    architecture = architecture_of(input).name
    tokens, precision = input.shape[0], product_precision(input.dtype)
    measured = measured_plans(architecture).get(shape_class(operation, precision, tokens, depth))
    return (measured or default_plan(architecture, operation, precision, tokens, depth)) == "fused"


def default_plan(architecture: str, operation: Operation, precision: str, tokens: int, depth: int) -> Plan:
    """The plan where nothing was measured."""
    # The interpreter proves kernels; it has no speed.
    if architecture == "interpreter":
        return "fused"
    deepest = _DEPTH_PER_PASS[architecture] * SAVED_PASSES[operation]
    return "fused" if precision == "16-bit" and tokens >= _FEWEST_TOKENS and depth <= deepest else "library"


def product_precision(dtype: torch.dtype) -> str:
    """How products of `dtype` are computed, as far as it decides a plan: 16-bit, tf32 or ieee."""
    return "16-bit" if dtype.itemsize == 2 else input_precision(dtype)


def shape_class(operation: Operation, precision: str, tokens: int, depth: int) -> str:
    """The key of a plan."""
    return f"{operation} {precision} tokens{_class(tokens, TOKEN_CLASSES)} depth{_class(depth, DEPTH_CLASSES)}"


def _class(size: int, ends: tuple[int, ...]) -> str:
    index = bisect_left(ends, size)
    return f"<={ends[index]}" if index < len(ends) else f">{ends[-1]}"


@contextmanager
def forced_plan(plan: Plan) -> Iterator[None]:
    """Follow `plan` everywhere within the block."""
    global _forced
    previous, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = previous


def plans_path() -> Path:
    """Where measured plans are kept: plans.json in FASTFORMER_CACHE, by default ~/.cache/fastformer."""
    return _plans_path(os.environ.get("FASTFORMER_CACHE") or "~/.cache/fastformer")


@lru_cache
def _plans_path(folder: str) -> Path:
    return Path(folder).expanduser() / "plans.json"


def measured_plans(architecture: str) -> Mapping[str, Plan]:
    """What was measured on `architecture` with this triton; read once per file. Empty where there is nothing to trust.

    A damaged file and plans of another triton are reported by a warning and not used.
    """
    return _measured_plans(plans_path(), architecture)


@lru_cache
def _measured_plans(path: Path, architecture: str) -> Mapping[str, Plan]:
    try:
        measured = read_plans(path).get(architecture)
    except (ValueError, OSError) as error:
        warnings.warn(f"measured plans are not used: {error}; `fastformer tune` measures again", stacklevel=2)
        return {}
    if measured is None:
        return {}
    if measured["triton"] != triton.__version__:
        warnings.warn(
            f"plans for {architecture} in {path} were measured with triton {measured['triton']}, not "
            f"{triton.__version__}, and are not used; `fastformer tune` measures again",
            stacklevel=2,
        )
        return {}
    return measured["plans"]


def read_plans(path: Path) -> dict[str, dict]:
    """By architecture: {"triton": its version, "plans": {class of shapes: plan}}; empty where there is no file.

    Raises:
        ValueError: the file is no file of plans.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    architectures = content.get("architectures")
    if not isinstance(architectures, dict) or not all(map(_is_measurement, architectures.values())):
        raise ValueError(f"{path} is damaged: no table of plans by architecture")
    return architectures


def _is_measurement(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("triton"), str)
        and isinstance(entry.get("plans"), dict)
        and all(plan in ("fused", "library") for plan in entry["plans"].values())
    )


def forget_plans_read() -> None:
    """Read the file again at the next question, since it has changed."""
    _measured_plans.cache_clear()
