"""Train a Hugging Face model in Hugging Face's Trainer, once as it is and once on Fastformer.

One callback is the whole change. Both runs have the same seed and no dropout, so they have the same losses.

    pip install -e . "accelerate>=1.10" && python examples/drop_in_trainer.py
"""

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastformer.integrations import AccelerateCallback

VOCABULARY = 64
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUIET = {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def texts(number: int = 64) -> list[dict]:
    rows = [torch.randint(1, VOCABULARY, (length,)) for length in torch.randint(4, 33, (number,)).tolist()]
    return [{"input_ids": row.tolist(), "labels": int(row[0] >= VOCABULARY // 2)} for row in rows]


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def losses(*callbacks: AccelerateCallback) -> list[float]:
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SHAPE, **NO_DROPOUT))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=8, max_steps=16, logging_steps=1, **QUIET)
        trainer = Trainer(model, arguments, padded, train_dataset=texts(), callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> tuple[list[float], list[float], AccelerateCallback]:
    callback = AccelerateCallback()
    own, ours = losses(), losses(callback)
    print(callback.report)
    for step, (without, on_fastformer) in enumerate(zip(own, ours, strict=True), start=1):
        print(f"step {step:2d}: loss {without:.4f} as it is, {on_fastformer:.4f} on Fastformer")
    return own, ours, callback


if __name__ == "__main__":
    main()
