"""The judges of this folder find wrong results, and their references agree with those of all other tests."""

from __future__ import annotations

import pytest
import reference
import torch
from gpu import attention_by_rows
from gpu.attention_by_rows import attention_tensors, by_rows, judge_attention
from gpu.judging import Call, judge
from gpu.making import Maker
from gpu.test_attention import FEATURES, HEADS

from fastformer.ops import attention


@pytest.mark.parametrize("feature", FEATURES)
def test_blocks_of_rows_are_the_whole(feature: str, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three or four queries and one block of all give the same, in float64."""
    queries, keys = 21, 26
    options = FEATURES[feature](make, queries, keys)
    tensors = [tensor.double() for tensor in attention_tensors(make, 2, HEADS, 2, queries, keys, 8)]
    options = {name: value.double() if name.endswith("bias") else value for name, value in options.items()}
    grads = [make.normal(*tensors[0].shape).double(), make.normal(*tensors[0].shape[:-1]).double()]
    whole = by_rows(tensors, options, grads)
    monkeypatch.setattr(attention_by_rows, "ELEMENTS", 4 * 2 * HEADS * keys)
    for name, result in by_rows(tensors, options, grads).items():
        torch.testing.assert_close(result, whole[name])


@pytest.mark.parametrize("precision", ["bf16", "fp32", "tf32"])
@pytest.mark.parametrize("where", ["output", "gradient"])
def test_one_wrong_element_is_found(where: str, precision: str, make: Maker) -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        error = torch.zeros_like(x)
        error[3, 5] = 0.05
        return x.softmax(-1) + (error if where == "output" else error * (x - x.detach()))

    call = Call(lambda x: x.softmax(-1), lambda x: reference.softmax(x, -1), [make.normal(9, 33)])
    judge(call, precision)
    with pytest.raises(AssertionError, match="result 0" if where == "output" else "result 1"):
        judge(Call(wrong, call.exact, call.tensors), precision)


@pytest.mark.parametrize("option", [{"window": (1, 5)}, {"causal": True, "alignment": "top_left"}], ids=str)
def test_a_lost_feature_of_attention_is_found(
    option: dict[str, object], make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that ignores a window or an alignment fails the judge."""
    monkeypatch.setattr(
        attention_by_rows, "attention", lambda *tensors, **options: attention(*tensors, return_lse=True)
    )
    with pytest.raises(AssertionError, match="output"):
        judge_attention(attention_tensors(make, 1, 2, 1, 19, 22, 8), option, "bf16")
