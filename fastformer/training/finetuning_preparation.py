"""Prepare a fine-tuning run: its examples, its starting point, and its features."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from jsonargparse import Namespace
from transformers import AutoConfig

from fastformer.data.labelled.examples import Examples, Splits, place_of
from fastformer.data.pretraining.tokenizer import load_tokenizer, text_fingerprint, train_tokenizer
from fastformer.models import FastformerConfig
from fastformer.models.presets import SMALLEST
from fastformer.training.finetuning_examples import drawn_examples, load_examples
from fastformer.training.prediction import position_limit, recipe_for, room
from fastformer.training.starting_point import CLASSES, StartingPoint, Task, from_scratch, pretrained, untrained
from fastformer.training.tasks import RECIPES, Recipe, Rewrite, TextOptions

PRETRAINED = Path("runs/pretrain/model")
"""The default starting point of fine-tuning, if the folder exists and fits the task."""


class Prepared(NamedTuple):
    examples: Splits[Any]
    start: StartingPoint
    recipe: Recipe
    train: list[Any]  # features
    validation: list[Any]
    source: str  # the starting point, in words


def prepare(task: Task, options: Namespace, arguments: Sequence[str], of_new_model: Sequence[str]) -> Prepared:
    """Load the data, and build the model with its output layer.

    Lengths that were not given are reduced to the positions of the model, with a warning.

    Args:
        task: the task.
        options: the command's options.
        arguments: the command line, which says whether a length was given.
        of_new_model: the given options that describe a new model; with one, none is loaded.

    Raises:
        ValueError: options that do not fit together, or examples that they cannot be used with.
    """
    texts = _text_options(options)
    kind = RECIPES[task]
    examples = load_examples(task, options.data, texts, options.cache_dir)
    labels = kind.label_names(examples.train)
    if options.max_train_examples is not None:
        drawn = drawn_examples(cast(Examples[Any], examples.train), options.max_train_examples, options.seed)
        examples = examples._replace(train=drawn)
    if task == "classify" and labels is None:
        labels = ["value"]  # regression has one output
    model_folder = _model_folder(task, options, of_new_model)
    if model_folder is not None:
        start = (untrained if options.from_scratch else pretrained)(model_folder, task, labels)
        tokenizer = load_tokenizer(model_folder)
        source = f"scratch, in the shape of {model_folder}" if options.from_scratch else str(model_folder)
    else:
        corpus = (text for example in examples.train for text in kind.texts(example))
        tokenizer = train_tokenizer(corpus, options.vocab_size, kind.tokenizer_objective)
        longest = max(texts.max_length, texts.max_target_length)
        if kind.tokenizer_objective == "clm":
            longest += texts.max_target_length  # generated text follows the prompt
        size = options.preset or SMALLEST
        start = from_scratch(size, task, tokenizer, longest, labels, **options.overrides)
        source = f"scratch, {size}"
    if options.activation_checkpointing:
        start.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    texts = _fitting("max_length", position_limit(start.model), options, arguments)
    recipe = recipe_for(task, start, texts, tokenizer)
    if isinstance(recipe, Rewrite):
        left = room(start.model, recipe.prompts(examples.test))
        recipe = replace(recipe, options=_fitting("text.max_target_length", left, options, arguments))
    train, validation = recipe.features(examples.train), recipe.features(examples.validation)
    _check_test(recipe, examples.test)
    return Prepared(examples, start, recipe, train, validation, source)


def _fitting(name: str, limit: int | None, options: Namespace, arguments: Sequence[str]) -> TextOptions:
    """Return the text options after reducing the length `name` to the model's limit.

    Raises:
        ValueError: the length was given, and is above the limit.
    """
    length = options[name]
    if limit is not None and length > limit:
        named = any(argument.partition("=")[0] == f"--{name}" for argument in arguments)
        if named or length != getattr(TextOptions(), name.rpartition(".")[2]):
            raise ValueError(f"--{name} must be at most {limit}, the number of positions of the model; got {length}")
        warnings.warn(f"--{name} is {limit}, not {length}: the model has no more positions", stacklevel=2)
        options[name] = limit
    return _text_options(options)


def _text_options(options: Namespace) -> TextOptions:
    return TextOptions(max_length=options.max_length, **options.text.as_dict())


def fingerprints(prepared: Prepared) -> dict[str, str]:
    """Return the fingerprints of the examples, of the names of classes or tags, and of the tokenizer.

    A run can only be continued with the same ones.
    """
    recipe = prepared.recipe
    parts: dict[str, Iterable[Any]] = {f"{part} examples": found for part, found in prepared.examples._asdict().items()}
    parts["label names"] = recipe.labels or ()
    texts = {name: map(repr, values) for name, values in parts.items()}
    tokenizer = text_fingerprint([recipe.tokenizer.backend_tokenizer.to_str()])
    return {**{name: text_fingerprint(values) for name, values in texts.items()}, "the tokenizer's tokens": tokenizer}


def _check_test(recipe: Recipe, test: Sequence[Any]) -> None:
    """Refuse test examples before training that would fail after it."""
    recipe.check(test)
    known = [bool(recipe.reference(example)) for example in test]
    if not any(known):
        warnings.warn("no test example has a known answer: all are predicted, and nothing is measured", stacklevel=2)
    elif not all(known):
        without, told = known.index(False), known.index(True)
        raise ValueError(
            f"{place_of(test, without)}: this test example has no known answer, but {place_of(test, told)} has; give "
            "answers for all or for none"
        )


def _model_folder(task: Task, options: Namespace, of_new_model: Sequence[str]) -> Path | None:
    """Return the folder of the model to start from, given or of a pretraining run that fits the task; None for none.

    Args:
        task, options: see `prepare`.
        of_new_model: the given options that describe a new model.
    """
    if options.model is not None:
        if of_new_model:
            raise ValueError(f"--{of_new_model[0]} is for a new model; --model {options.model} has its own")
        return Path(options.model)
    if options.from_scratch or of_new_model or not (PRETRAINED / "config.json").is_file():
        return None
    config = AutoConfig.from_pretrained(PRETRAINED, trust_remote_code=False)
    fits = isinstance(config, FastformerConfig) and config.stack in CLASSES[task].ours._stacks
    if task == "qa" and fits:  # rotary positions, from scratch, need far fewer steps than learned ones
        fits = config.position_embedding in ("rotary", "relative")
    return PRETRAINED if fits else None
