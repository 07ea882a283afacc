"""On a CPU, a transformers model calls its own SDPA, or our operator without padding; both give the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hugging_face_models import MODELS, assert_same_training
from transformers import masking_utils

import fastformer
import fastformer.integrations.attention.forward as attention_module
from fastformer.integrations.attention import on_cpu as attention_on_cpu
from fastformer.integrations.attention.forward import attention_forward
from fastformer.integrations.attention.mask import MaskStructure, attention_mask

pytestmark = pytest.mark.cpu

PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
}
LENGTHS = [7, 3, 0, 5]
PADDINGS = ("none", "left", "right", "holes")


@pytest.fixture(params=[0.0, 1e99], ids=["operator", "sdpa"])
def cost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Set the cost of our operator: with 0 it is used wherever it can leave out something, with 1e99 never."""
    monkeypatch.setattr(attention_on_cpu, "OPERATOR_COST", request.param)
    monkeypatch.setattr(attention_on_cpu, "ROW_COST", 0.0)
    monkeypatch.setattr(attention_on_cpu, "BIAS_COST", 0.0)
    monkeypatch.setattr(attention_on_cpu, "LEARNED_SCORES", request.param)
    with fastformer.backend("auto"):
        yield request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that records the functions that a model's layers call."""
    recorded: list[str] = []

    def recording(name: str) -> None:
        original = getattr(attention_module, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            recorded.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(attention_module, name, record)

    recording("attention")
    recording("sdpa_attention_forward")
    return recorded


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["BERT", "Llama", "Mistral", "ModernBERT", "T5", "BART", "Gemma 2"])
def test_same_training(name: str, padding: str, cost: float, calls: list[str]) -> None:
    assert_same_training(MODELS[name].build(), MODELS[name].batch(padding))
    assert calls
    if name in ("BERT", "Llama") and padding in ("left", "right"):
        assert set(calls) == {"attention" if cost == 0.0 else "sdpa_attention_forward"}


def padding_mask(padding: str) -> torch.Tensor | None:
    place, lengths = torch.arange(7), torch.tensor(LENGTHS)[:, None]
    masks = {
        "none": None,
        "left": place >= 7 - lengths,
        "right": place < lengths,
        "holes": (place % 3 > 0).expand(len(LENGTHS), -1),
    }
    return masks[padding]


@pytest.mark.parametrize("keys", [7, 9])
@pytest.mark.parametrize("queries", [1, 4, 7])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_real_tokens_get(pattern: str, padding: str, queries: int, keys: int, cost: float) -> None:
    """Real tokens get the same as from SDPA, also behind a cache and with keys that are not written yet."""
    torch.manual_seed(0)
    real = padding_mask(padding)
    offset = 7 - queries
    arguments = (len(LENGTHS), queries, keys, offset, 0, PATTERNS[pattern], real)
    dense = masking_utils.sdpa_mask(*arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    q, k, v = (torch.randn(len(LENGTHS), size, 2, 8).transpose(1, 2) for size in (queries, keys, keys))
    actual, _ = attention_forward(torch.nn.Module(), q, k, v, attention_mask(*arguments))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)
    of_real = slice(None) if real is None else real[:, offset:]
    torch.testing.assert_close(actual[of_real], expected[of_real])


def test_padding_gives_zeros_where_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_on_cpu, "OPERATOR_COST", 0.0)
    monkeypatch.setattr(attention_on_cpu, "ROW_COST", 0.0)
    real = padding_mask("right")
    mask = attention_mask(len(LENGTHS), 7, 7, 0, 0, masking_utils.causal_mask_function, real)
    q, k, v = torch.randn(3, len(LENGTHS), 2, 7, 8).unbind()
    output, _ = attention_forward(torch.nn.Module(), q, k, v, mask)
    assert real is not None
    assert not output[~real].any() and output[real].abs().sum(-1).all()


def test_dropout_is_pytorchs(calls: list[str]) -> None:
    q = torch.randn(1, 2, 300, 64)
    module = torch.nn.Module().train()
    torch.manual_seed(0)
    actual, _ = attention_forward(module, q, q, q, None, dropout=0.5)
    torch.manual_seed(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.testing.assert_close(actual, expected.transpose(1, 2))
    assert calls == ["sdpa_attention_forward"]


def test_a_backend_that_is_asked_for_runs(calls: list[str]) -> None:
    q = torch.randn(1, 2, 3, 8)
    with fastformer.backend("torch"):
        attention_forward(torch.nn.Module(), q, q, q, None)
    assert calls == ["attention"]


@pytest.mark.parametrize(
    ("length", "structure", "faster"),
    [
        (64, MaskStructure(), False),
        (512, MaskStructure(), False),
        (64, MaskStructure(causal=True), False),
        (512, MaskStructure(causal=True), True),
        (1024, MaskStructure(causal=True, window=(63, None)), True),
        (256, MaskStructure(spans=((0, 256),) + ((0, 64),) * 7), True),
        (256, MaskStructure(spans=((0, 256),) * 7 + ((0, 250),)), False),
        (16, MaskStructure(spans=((0, 16),) + ((0, 4),) * 7), False),
        (512, None, False),
    ],
    ids=str,
)
def test_the_operator_runs_where_it_leaves_out_much(length: int, structure: MaskStructure | None, faster: bool) -> None:
    query = torch.empty(8, 4, length, 64)
    assert attention_on_cpu.operator_is_faster(query, query, structure, None, 0.0) == faster


PADDED = MaskStructure(key_lengths=torch.tensor([256] + [64] * 7), spans=((0, 256),) + ((0, 64),) * 7)


@pytest.mark.parametrize(
    ("length", "structure", "learned", "faster"),
    [
        (256, MaskStructure(), False, False),
        (256, MaskStructure(), True, False),
        (1024, MaskStructure(), True, True),
        (256, PADDED, False, True),
        (256, PADDED, True, True),
        (256, replace(PADDED, key_lengths=None), False, False),
        (256, MaskStructure(causal=True), False, False),
        (1024, MaskStructure(causal=True), False, True),
    ],
    ids=str,
)
def test_with_a_bias_it_must_leave_out_more(length: int, structure: MaskStructure, learned: bool, faster: bool) -> None:
    query, bias = torch.empty(8, 4, length, 64), torch.empty(1, 4, length, length, requires_grad=learned)
    assert attention_on_cpu.operator_is_faster(query, query, structure, bias, 0.0) == faster
