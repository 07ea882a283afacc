"""The report of an acceleration can be read by people and by programs."""

from __future__ import annotations

import json

import pytest
from hugging_face_models import MODELS

import fastformer
from fastformer.integrations.acceleration import Acceleration


@pytest.mark.quick
def test_report_is_printed_and_machine_readable() -> None:
    report = fastformer.accelerate(MODELS["BART"].build())
    assert isinstance(report, Acceleration)
    found = json.loads(report.to_json())
    assert found["model"] == "BartForConditionalGeneration"
    layer = next(made for made in found["decisions"] if made["module"] == "model.encoder.layers.0.self_attn_layer_norm")
    assert (layer["part"], layer["replaced"], layer["class_name"]) == ("normalisation", True, "LayerNorm")
    assert "replaced 12 x LayerNorm (normalisation): fastformer.layer_norm" in str(report)
    assert len(report.replaced) + len(report.left) == len(report.decisions)
