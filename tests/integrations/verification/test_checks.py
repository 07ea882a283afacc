"""`fastformer verify` accepts what is equal, and finds what is not equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import MODELS
from torch import nn

from fastformer.cli import main
from fastformer.integrations import acceleration
from fastformer.integrations.verification import checks as verification
from fastformer.integrations.verification.checks import Check, verify
from fastformer.integrations.verification.subject import Subject

ALWAYS = {"outputs", "gradients", "bfloat16 outputs", "bfloat16 gradients", "float16 outputs", "float16 gradients"}
PADDED = {"right padding", "left padding"}
GENERATED = {"generation", "generation, dynamic cache", "generation, static cache", "generation, left padding"}


def statuses(checks: list[Check]) -> dict[str, set[str]]:
    return {status: {c.name for c in checks if c.status == status} for status in ("passed", "failed", "not applicable")}


@pytest.mark.parametrize(
    ("name", "applicable"),
    [
        ("BertForMaskedLM", ALWAYS | PADDED | {"loss", "4-D mask"}),
        ("BertModel", ALWAYS | PADDED | {"4-D mask"}),
        ("LlamaForCausalLM", ALWAYS | PADDED | GENERATED | {"loss", "4-D mask", "packed"}),
        ("T5ForConditionalGeneration", ALWAYS | PADDED | GENERATED | {"loss"}),
        ("ViTForImageClassification", ALWAYS | {"loss"}),
    ],
)
def test_models_pass(name: str, applicable: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify", name, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["class"] == name and report["passed"]
    assert statuses([Check(**check) for check in report["checks"]])["passed"] == applicable
    assert all(check["detail"] for check in report["checks"] if check["status"] == "not applicable")
    assert report["acceleration"]["decisions"]
    assert name in capsys.readouterr().out


def test_attention_alone(tmp_path: Path) -> None:
    assert main(["verify", "BertModel", "--no-accelerate", "--out", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["acceleration"] is None


def test_a_file_is_never_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["verify", "BertModel", "--out", str(tmp_path / "thesis.tex")]) == 2
    assert "already exists: replace it with --overwrite" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_CHECKS", verification._CHECKS[:2])
    _, checks = verify(Subject.find("BertForMaskedLM"), backend_name="triton")
    assert not statuses(checks)["failed"]


def test_a_saved_model(tmp_path: Path) -> None:
    MODELS["DistilBERT"].build().save_pretrained(tmp_path)
    subject = Subject.find(str(tmp_path))
    assert type(subject.model).__name__ == "DistilBertForMaskedLM"
    report, checks = verify(subject)
    assert report is not None and not report.left
    assert not statuses(checks)["failed"]


def perturb(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change one thing in the candidate before it is accelerated."""

    def accelerate(model: nn.Module) -> acceleration.Acceleration:
        change(model)
        return acceleration.accelerate(model)

    monkeypatch.setattr(verification, "accelerate", accelerate)


def _weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.1


def _frozen(model: Any) -> None:
    model.model.norm.weight.requires_grad_(False)


def _raises(model: Any) -> None:
    def forward(input: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    model.model.norm.forward = forward


@pytest.mark.parametrize(
    ("change", "failed"),
    [(_weight, {"outputs", "loss", "gradients", "packed"}), (_frozen, {"gradients"}), (_raises, {"outputs", "packed"})],
)
def test_a_difference_is_found(change: Any, failed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    perturb(monkeypatch, change)
    monkeypatch.setattr(verification, "_CHECKS", verification._CHECKS[:4])
    with pytest.raises(SystemExit, match="1"):
        main(["verify", "LlamaForCausalLM", "--out", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"]
    assert failed <= {check["name"] for check in report["checks"] if check["status"] == "failed"}


def test_what_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "NoSuchModel"]) == 2
    assert "'NoSuchModel' is not a class of transformers' models, a folder" in capsys.readouterr().err


def test_a_model_that_does_not_run_is_not_called_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject.find("BertModel")
    monkeypatch.setattr(subject.model, "forward", lambda **_: {}["nothing"])
    with pytest.raises(ValueError, match="BertModel does not run on an input made here"):
        verify(subject)
