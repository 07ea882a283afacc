"""Every operator obeys the rule of accuracy, forward and backward, at a real size and in every precision."""

from __future__ import annotations

import pytest
import torch
from gpu.calls import CALLS
from gpu.judging import DTYPES, judge
from gpu.making import Maker, dry_with

from fastformer.ops.linear_cross_entropy import _adds_in_float32, _weight_gradient


@pytest.mark.parametrize("precision", dry_with(("bf16", "fp32"), DTYPES))
@pytest.mark.parametrize("name", CALLS)
def test_accuracy(name: str, precision: str, make: Maker) -> None:
    judge(CALLS[name](make), precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_chunks_are_added_in_float32(dtype: torch.dtype, make: Maker, dry: bool) -> None:
    """The weight's gradient of linear cross-entropy: cuBLAS rounds no chunk's product to 16 bits."""
    rows, classes, features = make.size(512, 24), make.size(5_003, 70), make.size(768, 16)
    # As in the operator, rows of logits start at multiples of 128 bytes.
    logits = make.normal(rows, -(-classes // 64) * 64, dtype=dtype)[:, :classes]
    x = make.normal(rows, features, dtype=dtype)
    exact = logits.double().T @ x.double()
    total = _weight_gradient(x.new_empty(classes, features), logits, x, number=0, whole=False)
    assert total.dtype == torch.float32
    total = _weight_gradient(total, logits, x, number=1, whole=False)
    assert _adds_in_float32(x.device, dtype) == (not dry and torch.version.cuda is not None)
    # Of 512 terms in float32, or of two products that are rounded.
    rounding = rows * torch.finfo(torch.float32).eps if _adds_in_float32(x.device, dtype) else torch.finfo(dtype).eps
    assert (total.double() - 2 * exact).abs().max() <= 2 * rounding * exact.abs().max()
