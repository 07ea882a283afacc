"""The LightningModule of docs/training.md trains a Hugging Face BERT with our attention as with BERT's own."""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig

import fastformer  # noqa: F401

TRAINING = (Path(__file__).parents[2] / "docs/training.md").read_text()
SHAPE = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def text_classifier() -> type[LightningModule]:
    """Return the class that docs/training.md shows."""
    source = re.search(r"^class TextClassifier.*?(?=\n\n\n)", TRAINING, flags=re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {"LightningModule": LightningModule, "torch": torch}
    exec(source[0], namespace)
    return namespace["TextClassifier"]


def trained(attention: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    lengths = [5, 9, 3, 7] * 4
    rows = [
        {
            "input_ids": torch.randint(1, 30, (9,)),
            "attention_mask": (torch.arange(9) < length).long(),
            "labels": torch.tensor(number % 2),
        }
        for number, length in enumerate(lengths)
    ]
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    before = model.classifier.weight.detach().clone()
    trainer.fit(text_classifier()(model), DataLoader(rows, batch_size=4))
    assert trainer.global_step == 8
    assert 1e-5 < (model.classifier.weight - before).abs().max() < 1e-4  # Adam's steps have the learning rate's size
    return model.state_dict()


def test_our_attention_takes_the_steps_of_berts_own() -> None:
    ours, own = trained("fastformer"), trained("eager")
    # Adam's first steps have the size of the learning rate, whatever the size of the gradient. If a gradient is about
    # zero, as that of a key's bias is, rounding decides its sign: eight steps of 1e-5 in either direction.
    for name, weight in own.items():
        if "key.bias" in name:
            continue
        assert (ours[name] - weight).abs().mean() < 1e-6, name
