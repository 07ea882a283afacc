"""The table of coverage says how each class compares with its own eager attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers

from fastformer.integrations.verification import coverage
from fastformer.integrations.verification.coverage import Outcome, examine, main, markdown, text_models

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("BertForMaskedLM", "equal", ""),
        ("Qwen3ForCausalLM", "equal", ""),
        ("BartForConditionalGeneration", "equal", ""),
        ("DebertaV2Model", "own attention", "asks for no attention implementation"),
        ("MambaForCausalLM", "own attention", "has none"),
    ],
)
def test_examine(name: str, verdict: str, reason: str) -> None:
    outcome = examine(name)
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


def test_a_lost_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(module, query, key, value, attention_mask, **arguments):
        return coverage_attention(module, query, key, value, None, **arguments)

    coverage_attention = coverage.attention_forward
    monkeypatch.setattr(coverage, "attention_forward", without_mask)
    assert examine("BertForMaskedLM").verdict == "different"
    monkeypatch.undo()
    transformers.AttentionInterface.register("fastformer", coverage_attention)


def test_a_padded_row_that_float64_makes_nan_does_not_hide_that_the_difference_is_rounding() -> None:
    assert examine("Gemma4ForCausalLM").verdict == "equal"


def test_an_error_of_ours_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastformer.ops.attention.attention"], "MAX_HEAD_DIM", 4)
    outcome = examine("LlamaForCausalLM")
    assert outcome.verdict == "refused"
    assert "head_dim must be from 1 to 4" in outcome.reason


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "table.md"), "--classes", "BertForMaskedLM", "DebertaModel"]) == 0
    table = (tmp_path / "table.md").read_text()
    assert transformers.__version__ in table
    assert "| bert | equal | BertForMaskedLM |  |" in table
    with pytest.raises(SystemExit):
        main(["--classes", "NoSuchModel"])
    assert "NoSuchModel" in capsys.readouterr().err


def test_brackets_of_an_error_are_no_link() -> None:
    outcome = Outcome("BertModel", "not built", "KeyError: sizes['a']['b']")
    assert "| KeyError: sizes\\['a']\\['b'] |" in markdown([outcome])


def test_committed_table_has_every_class_of_its_version() -> None:
    """The committed table has every class of the transformers version that it names.

    Another version has other classes.
    """
    table = (Path(__file__).parents[3] / "docs/transformers_coverage.md").read_text()
    if f"transformers {transformers.__version__}," not in table:
        pytest.skip(f"the table is of another version than the installed transformers {transformers.__version__}")
    assert [name for name in text_models() if name not in table] == []
