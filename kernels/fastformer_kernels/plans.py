"""The choice of a plan for each part of the feed-forward block: one fused kernel, or a library's product and one pass.

The fused kernel saves passes over the result. The library's product is faster than Triton's, and its advantage grows
with the depth of the product. The measurements of `fastformer tune` on the user's GPU decide, for each class of shapes.
Where nothing was measured, a rule with one number per architecture decides.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from fastformer_kernels.configurations import chosen, forced, size_class
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
# The deepest 16-bit product for which one pass saved outweighs the library's faster product. Estimated, not measured:
# peak 16-bit throughput over memory bandwidth, times the share of the library's speed that Triton's product lacks.
# Exact float32 and tf32 products are always the library's.
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

# Upper bounds of the classes of shapes that are measured. One more class lies above each last bound.
TOKEN_CLASSES = (256, 2048)
DEPTH_CLASSES = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class FeedForwardPlan:
    """The plan of one part of the block: one fused kernel if `fused`, else a library's product and one pass."""

    fused: bool


_PLANS: dict[Plan, FeedForwardPlan] = {"fused": FeedForwardPlan(True), "library": FeedForwardPlan(False)}


def is_fused(operation: Operation, input: torch.Tensor, depth: int) -> bool:
    """True if `operation` on `input` (tokens, ...), a product over `depth`, runs as one kernel."""
    tokens, precision = input.shape[0], product_precision(input.dtype)
    default = _PLANS[default_plan(architecture_of(input).name, operation, precision, tokens, depth)]
    return chosen(operation, input, default, lambda: shape_class(precision, tokens, depth)).fused


def default_plan(architecture: str, operation: Operation, precision: str, tokens: int, depth: int) -> Plan:
    """The plan to follow where nothing was measured."""
    # The interpreter only checks kernels: speed does not matter there.
    if architecture == "interpreter":
        return "fused"
    deepest = _DEPTH_PER_PASS[architecture] * SAVED_PASSES[operation]
    return "fused" if precision == "16-bit" and tokens >= _FEWEST_TOKENS and depth <= deepest else "library"


def product_precision(dtype: torch.dtype) -> str:
    """The precision of products of `dtype`, as the choice of a plan distinguishes it: 16-bit, tf32 or ieee."""
    return "16-bit" if dtype.itemsize == 2 else input_precision(dtype)


@lru_cache
def shape_class(precision: str, tokens: int, depth: int) -> tuple[str, ...]:
    """The class of shapes of a product."""
    return precision, f"tokens{size_class(tokens, TOKEN_CLASSES)}", f"depth{size_class(depth, DEPTH_CLASSES)}"


def forced_plan(plan: Plan) -> AbstractContextManager[None]:
    """Follow `plan` for every operation within the `with` block."""
    return forced(dict.fromkeys(SAVED_PASSES, _PLANS[plan]))
