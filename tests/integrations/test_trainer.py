"""transformers' Trainer and PEFT train accelerated models to the same results as models that are not accelerated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hugging_face_models import MODELS
from torch import nn
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

import fastformer
from fastformer.integrations import AccelerateCallback
from fastformer.integrations.acceleration.swapping import Accelerated


def documents(count: int = 8) -> list[dict[str, list[int]]]:
    torch.manual_seed(2)
    return [
        {"input_ids": torch.randint(3, 60, (length,)).tolist()} for length in torch.randint(4, 9, (count,)).tolist()
    ]


def train(model: PreTrainedModel, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Train for two steps, each of two batches of two packed documents."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    options.setdefault("data_collator", DataCollatorWithFlattening())
    trainer = Trainer(model, arguments, train_dataset=documents(), callbacks=list(callbacks), **options)
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.cpu
def test_packed_training_is_the_model_s_own(tmp_path: Path, backend: str) -> None:
    model, accelerated = MODELS["Llama"].build(), MODELS["Llama"].build()
    expected = train(model, tmp_path)
    callback = AccelerateCallback()
    actual = train(accelerated, tmp_path, callback)
    assert callback.report is not None and callback.report.replaced
    assert accelerated.config._attn_implementation == "fastformer"
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)
    torch.testing.assert_close(accelerated.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
def test_model_init(tmp_path: Path) -> None:
    callback = AccelerateCallback()
    trainer = train(None, tmp_path, callback, model_init=lambda: MODELS["Llama"].build())  # type: ignore[arg-type]
    assert callback.report is not None and callback.report.replaced
    assert any(isinstance(module, Accelerated) for module in trainer.model.modules())


def test_flattened_documents_do_not_see_each_other(backend: str) -> None:
    """The loss of packed documents is the mean of the losses that each document has alone."""
    model = MODELS["Llama"].build()
    fastformer.accelerate(model)
    rows = documents(3)
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    loss = model(**packed, use_cache=False).loss
    alone = [model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows]
    targets = [torch.tensor(row["input_ids"][1:]) for row in rows]
    expected = nn.functional.cross_entropy(torch.cat([logits[:-1] for logits in alone]), torch.cat(targets))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def lora(model: PreTrainedModel) -> peft.PeftModel:
    torch.manual_seed(3)
    # The adapters do not start at zero, as trained ones are not zero.
    options = {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.0, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("accelerate_first", [True, False])
def test_lora_trains_and_merges(accelerate_first: bool, backend: str) -> None:
    small = MODELS["Llama"]
    batch = small.batch()
    plain, model = lora(small.build()), small.build()
    if accelerate_first:
        fastformer.accelerate(model)
    adapted = lora(model)
    if not accelerate_first:
        fastformer.accelerate(adapted)
    assert any(isinstance(module, Accelerated) for module in adapted.modules())
    results = []
    for each in (adapted, plain):
        loss = each(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in each.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert all(grad is not None and grad.any() for grad in results[0][1].values())

    expected = plain(**batch).logits
    merged = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    fastformer.restore(merged)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    small = MODELS["Llama"]
    model = small.build()
    fastformer.accelerate(model)
    adapted = lora(model).eval()
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small.build(), tmp_path).eval()
    torch.testing.assert_close(loaded(**small.batch()).logits, adapted(**small.batch()).logits, rtol=1e-5, atol=1e-4)
