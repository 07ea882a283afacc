from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training.tasks import MAKERS, TINY
from transformers import BertConfig, BertForMaskedLM

from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.extras import require
from fastformer.models import FastformerConfig, FastformerForPreTraining

WORDS = ("cat", "dog", "bird", "fish", "eats", "sees", "likes", "rice", "bread", "water", "milk")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command line that pretrains for seconds, with about twenty batches in an epoch."""
    require("jsonargparse")
    folder, chosen = tmp_path_factory.mktemp("corpus"), random.Random(0)
    sentences = [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12))).capitalize() + "." for _ in range(800)]
    documents = ["\n".join(sentences[begin : begin + 8]) for begin in range(0, len(sentences), 8)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return [
        *("pretrain", "--data", str(folder / "text.txt"), "--accelerator", "cpu", "--devices", "1"),
        *("--evaluate_every", "2", "--optimizer.learning_rate", "0.01", "--trainer.log_every_n_steps", "1"),
        *("--overrides.hidden_size", "16", "--overrides.intermediate_size", "32"),
        *("--vocab_size", "400", "--max_length", "64", "--tokens_per_batch", "256"),
        *("--cache_dir", str(folder / "cache")),
    ]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with labelled files for each task."""
    folder = tmp_path_factory.mktemp("labelled")
    for task, make in MAKERS.items():
        for split, count in (("train", 96), ("validation", 16), ("test", 12)):
            draw = random.Random(f"{task} {split}")
            lines = [json.dumps(make(draw)) for _ in range(count)]
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of models to start from: ours, and a BERT of Hugging Face's, with the same tokenizer."""
    texts = [
        text
        for task in ("classify", "tag")
        for line in (data / task / "train.jsonl").read_text().splitlines()
        for text in [json.loads(line).get("text") or " ".join(json.loads(line).get("tokens"))]
    ]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    shape = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 48, "hidden_dropout_prob": 0.0}
    models = {
        "ours": FastformerForPreTraining(FastformerConfig(**shape)),
        "bert": BertForMaskedLM(BertConfig(**shape, attention_probs_dropout_prob=0.0)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("base") / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """Destroy the process group that Lightning has made, so that the following tests can make their own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
