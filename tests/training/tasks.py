"""Small labelled data for each fine-tuning task, and command lines that fine-tune on it in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANIMALS, GOOD, BAD = ("cat", "dog", "bird", "fish"), ("lovely", "great"), ("awful", "bad")
COLOURS = ("red", "blue", "green", "grey")


def classified(draw: random.Random) -> dict[str, Any]:
    label = draw.choice(["positive", "negative"])
    return {"text": f"A {draw.choice(GOOD if label == 'positive' else BAD)} {draw.choice(ANIMALS)}.", "label": label}


def tagged(draw: random.Random) -> dict[str, Any]:
    animal, colour = draw.choice(ANIMALS), draw.choice(COLOURS)
    return {"tokens": ["the", colour, animal, "runs"], "tags": ["O", "B-COLOUR", "B-ANIMAL", "O"]}


def asked(draw: random.Random) -> dict[str, Any]:
    colour = draw.choice(COLOURS)
    context = f"The {draw.choice(ANIMALS)} is {colour} today."
    answers = {"text": [colour], "answer_start": [context.index(colour)]}
    return {"id": str(draw.random()), "question": "Which colour?", "context": context, "answers": answers}


def summarized(draw: random.Random) -> dict[str, Any]:
    animal = draw.choice(ANIMALS)
    return {"document": f"Today the {animal} runs. It runs far.", "summary": animal}


def translated(draw: random.Random) -> dict[str, Any]:
    colour = draw.choice(COLOURS)
    return {"translation": {"en": f"the {colour} one", "de": colour}}


def conversed(draw: random.Random) -> dict[str, Any]:
    colour = draw.choice(COLOURS)
    return {"prompt": f"Say {colour}.", "completion": colour}


def alike(draw: random.Random) -> dict[str, Any]:
    animal, colour = draw.choice(ANIMALS), draw.choice(COLOURS)
    return {"anchor": f"{animal} {colour} {draw.randint(0, 99)}", "positive": f"{colour} {animal}"}


MAKERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "classify": classified,
    "tag": tagged,
    "qa": asked,
    "summarize": summarized,
    "translate": translated,
    "generate": conversed,
    "embed": alike,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "initializer_range": 0.2,
}


def command(task: str, data: Path, output: Path) -> list[str]:
    return [
        *("finetune", task, "--data", str(data / task), "--output", str(output), "--accelerator", "cpu"),
        *("--max_steps", "12", "--evaluate_every", "4", "--tokens_per_batch", "256", "--max_length", "48"),
        *("--text.max_target_length", "8", "--trainer.log_every_n_steps", "2"),
        *(("--text.stride", "8") if task == "qa" else ()),
    ]


def scratch(*more: str) -> list[str]:
    fields = {**TINY, "hidden_dropout_prob": 0.05}
    return [
        "--vocab_size",
        "400",
        "--optimizer.learning_rate=0.006",
        *(f"--overrides.{name}={value}" for name, value in fields.items()),
        *more,
    ]
