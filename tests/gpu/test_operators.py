"""Every operator obeys the rule of accuracy, forward and backward, at a real size and in every precision."""

from __future__ import annotations

import pytest
from gpu.calls import CALLS
from gpu.judging import DTYPES, judge
from gpu.making import Maker, dry_with


@pytest.mark.parametrize("precision", dry_with(("bf16", "fp32"), DTYPES))
@pytest.mark.parametrize("name", CALLS)
def test_accuracy(name: str, precision: str, make: Maker) -> None:
    judge(CALLS[name](make), precision)
