"""Tests of the loss in transformers' Trainer, which sums and divides by `num_items_in_batch`, and of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import here
from hugging_face_models import MODELS

import fastformer


@pytest.mark.parametrize("name", ["Llama", "ModernBERT"])
@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_num_items_in_batch(name: str, items: Any, backend: str) -> None:
    model, batch, items = MODELS[name].build(), MODELS[name].batch(), here(items)
    expected = model(**batch, num_items_in_batch=items).loss
    fastformer.accelerate(model)
    torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, expected)


def test_a_loss_that_was_set_is_set_again() -> None:
    model = MODELS["Llama"].build()
    model.loss_function = own = model.loss_function
    fastformer.accelerate(model)
    assert model.loss_function is not own
    fastformer.restore(model)
    assert vars(model)["_loss_function"] is own


def test_another_loss_is_left() -> None:
    model = MODELS["Llama"].build()
    model.loss_function = own = lambda logits, labels, vocab_size, **_: logits.square().mean()
    assert "not the cross-entropy" in next(made.detail for made in fastformer.accelerate(model).left)
    assert model.loss_function is own
