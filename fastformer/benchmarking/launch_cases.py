"""The calls whose overhead is measured: every operator, in its most frequent form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F

from fastformer import ops
from fastformer.benchmarking.inputs import Make
from fastformer.benchmarking.operations import Operation, Sizes, operations

FORWARD, BOTH = "forward", "with backward"


def cases(sizes: Sizes, only: str) -> Iterator[tuple[str, Operation, bool]]:
    """Yield the name, the operation, and whether the backward is included.

    Args:
        sizes: the sizes of the calls.
        only: text that the name must contain.
    """
    for operation in (*_attention(sizes), *operations(sizes)):
        # The name without sizes, which do not matter here.
        form = ", ".join(
            part for part in operation.name.split(", ") if not (part[0].isdigit() or part.startswith("to "))
        )
        for backward in (False, True)[: 1 + operation.backward]:
            name = f"{form}: {BOTH if backward else FORWARD}"
            if only in name:
                yield name, operation, backward


def _attention(sizes: Sizes) -> list[Operation]:
    def inputs(make: Make) -> Sequence[Any]:
        shape = (sizes.batch, sizes.heads, sizes.sequence, sizes.head_dim)
        return [make.normal(*shape) for _ in range(3)]

    return [
        Operation("attention", inputs, ops.attention, F.scaled_dot_product_attention),
        Operation(
            "attention, causal",
            inputs,
            lambda query, key, value: ops.attention(query, key, value, causal=True),
            lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        ),
        Operation(
            "attention, dropout",
            inputs,
            lambda query, key, value: ops.attention(query, key, value, dropout_p=0.1),
            lambda query, key, value: F.scaled_dot_product_attention(query, key, value, dropout_p=0.1),
            random=True,
        ),
        Operation(
            "scaled_dot_product_attention", inputs, ops.scaled_dot_product_attention, F.scaled_dot_product_attention
        ),
    ]
