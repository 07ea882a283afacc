"""Training reads nothing back from its device, for which it would have to wait: meta tensors have no values to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.loading.steps import label_counts
from fastformer.training.memory import PeakMemory
from fastformer.training.pretraining import MODULES
from fastformer.training.progress import Throughput, _tokens

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def on_meta(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: on_meta(value) for name, value in batch.items()}
    return batch.to("meta") if isinstance(batch, torch.Tensor) else batch


@pytest.fixture(params=MODULES)
def fitted(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Return a trainer after two steps. Its `logged` holds the values that its module logged."""
    text = "\n\n".join(" ".join(f"Number {i} is {n} more than {i - n}." for n in range(1, 9)) for i in range(30))
    (tmp_path / "text.txt").write_text(text)
    data = PretrainingDataModule(
        objective=request.param,
        data=[str(tmp_path / "text.txt")],
        vocab_size=400,
        max_length=40,
        tokens_per_batch=400,
        cache_dir=str(tmp_path),
    )
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Throughput(), PeakMemory()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        max_steps=2,
    )
    trainer.logged = {}
    log = LightningModule.log

    def noting(self: LightningModule, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        trainer.logged[name] = value
        log(self, name, value, *arguments, **options)

    monkeypatch.setattr(LightningModule, "log", noting)
    trainer.fit(MODULES[request.param](overrides=TINY), datamodule=data)
    return trainer


def test_what_each_step_logs_is_a_tensor(fitted: Trainer) -> None:
    """Each step logs tensors only: Lightning copies a number to the device, and waits for it."""
    of_steps = {name: value for name, value in fitted.logged.items() if name.startswith("train/")}
    assert {"train/loss", "train/learning_rate", "train/peak_memory", "train/tokens_per_second"} <= set(of_steps)
    assert [name for name, value in of_steps.items() if not isinstance(value, torch.Tensor)] == []


def test_steps_of_training_and_validation_read_nothing(fitted: Trainer) -> None:
    module, data = fitted.lightning_module.to("meta"), fitted.datamodule
    module.on_validation_epoch_start()
    for batch in data.val_dataloader():
        module.validation_step(on_meta(batch), 0)
    batch = on_meta(next(iter(data.val_dataloader())))
    counts = label_counts(batch)
    assert module.training_step({**batch, "label_counts": torch.stack([counts, counts])}, 0).device.type == "meta"


def test_padding_is_counted_where_the_batch_is() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.zeros(2, 3), "attention_mask": mask, "decoder_input_ids": torch.zeros(2, 2)}
    assert int(_tokens([batch, batch])) == 14
    assert _tokens(on_meta(batch)).device.type == "meta"
