"""Helpers that compare accelerated modules with their own forward, and list the parts that are left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import fastformer
from fastformer.integrations.acceleration.swapping import Accelerated


def results(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the loss, the logits, and the gradient of every parameter."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    logits = output.logits_per_text if "logits_per_text" in output else output.logits
    if "input_ids" in batch and logits.shape[:2] == batch["input_ids"].shape:
        logits = logits[batch["attention_mask"].bool()]  # a model may compute anything for padding
    return {"loss": output.loss.detach(), "logits": logits.detach(), **gradients}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=tolerance,
            atol=tolerance * max(1.0, float(expected[name].abs().max())),
            msg=lambda message, name=name: f"{name}: {message}",
        )


def left(module: nn.Module) -> dict[str, str]:
    """Return why each part of a module is left; the module itself must be unchanged."""
    report = fastformer.accelerate(module)
    assert not isinstance(module, Accelerated)
    return {made.part: made.detail for made in report.left if not made.module}


def assert_accelerated_computes_the_same(module: nn.Module) -> None:
    """Accelerate a module that takes rows of 8 features, and compare its output and gradients with its own forward."""
    reference = copy.deepcopy(module)
    assert fastformer.accelerate(module).replaced[0].module == ""
    input = torch.randn(2, 5, 8, requires_grad=True)
    with fastformer.backend("triton"):
        actual = module(input)
        gradients = torch.autograd.grad(actual.sin().sum(), [input, *module.parameters()])
    expected = reference(input)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), [input, *reference.parameters()]))
