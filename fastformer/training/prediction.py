"""Predict with a fine-tuned model, given only its folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from fastformer.console import track
from fastformer.data.pretraining.tokenizer import load_tokenizer
from fastformer.extras import require
from fastformer.generation import Generator, SamplingParameters
from fastformer.generation.cached_model import LanguageModel
from fastformer.models import FastformerConfig
from fastformer.models.finite import check_finite_weights
from fastformer.models.loading import load_configuration
from fastformer.training.loading.finetuning import in_order
from fastformer.training.lora import adapter_config, with_adapter
from fastformer.training.optimization import Optimization
from fastformer.training.starting_point import StartingPoint, Task, pretrained
from fastformer.training.tasks import RECIPES, Converse, Recipe, Rewrite, TextOptions

_SLOTS = 256
"""Number of texts generated at the same time."""
_POSITION_TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")
"""Names of the learned position embeddings in Hugging Face's models."""


class Predictor:
    """A fine-tuned model, and the recipe that turns its outputs into predictions.

    >>> predictor = Predictor.load("runs/classify/model", "classify")  # doctest: +SKIP
    >>> predictor([ClassifiedText("An engine that starts.", None, None)])  # doctest: +SKIP
    [{'prediction': 'positive', 'probabilities': {'negative': 0.2, 'positive': 0.8}}]

    Args:
        model: a model of the task.
        recipe: the recipe of the task.
        tokens_per_batch: the most tokens in a batch.
    """

    def __init__(self, model: Any, recipe: Recipe, tokens_per_batch: int = 4096) -> None:
        self.model = model.eval()
        self.recipe = recipe
        self.tokens_per_batch = tokens_per_batch
        # The optimizer is never made.
        self._module = recipe.module(model, Optimization(1.0))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        task: Task,
        options: TextOptions | None = None,
        device: torch.device | str = "cpu",
        tokens_per_batch: int = 4096,
    ) -> Predictor:
        """Load the model in a folder; for an adapter, its base model with the adapter merged.

        Raises:
            ValueError: the model is not fine-tuned for the task, or weights are missing, unexpected or not finite.
        """
        if (Path(folder) / "adapter_config.json").is_file():
            start = _adapted(folder, task)
        else:
            start = pretrained(folder, task)
            if start.new_layers:
                missing = ", ".join(start.new_layers)
                raise ValueError(f"the model in {folder} is not fine-tuned for {task}: it has no weights for {missing}")
        try:
            check_finite_weights(start.model)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        tokenizer = load_tokenizer(folder)
        recipe = recipe_for(task, start, options or TextOptions(), tokenizer)
        return cls(start.model.to(device), recipe, tokens_per_batch)  # type: ignore[arg-type]

    def __call__(self, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the predictions for examples of the task, with labels or without, in order."""
        with torch.inference_mode():
            if isinstance(self.recipe, Rewrite):
                written = list(self._generated(self.recipe.prompts(examples)))
                predictions = self.recipe.predictions(written, examples, [])
                if isinstance(self.recipe, Converse):
                    predictions = [
                        {**prediction, **self._likelihood(example)}
                        for prediction, example in zip(predictions, examples, strict=True)
                    ]
                return predictions
            features = self.recipe.features(examples)
            batches = [*in_order(features, self.recipe.collate, self.recipe.length, self.tokens_per_batch)]
            outputs = [
                output
                for batch in track(batches, "predicting")
                for output in self._module.predict_step(self._moved(batch), 0)
            ]
        return self.recipe.predictions(outputs, examples, features)

    def _likelihood(self, example: Any) -> dict[str, Any]:
        """Return the log-likelihood of the example's answers and their number of tokens; empty if it has no answer."""
        if not self.recipe.reference(example):
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cut texts: the warning came before training
            try:
                (feature,) = self.recipe.features([example])
            except ValueError:  # the answer begins after the longest sequence
                return {}
        batch = self._moved(self.recipe.collate([feature]))
        tokens = int(self._module.targets(batch))
        return {"log_likelihood": -self._module.run(batch)[0].item() * tokens, "tokens": tokens}

    def _moved(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: self._moved(value) for name, value in batch.items()}
        return batch.to(self.model.device) if isinstance(batch, torch.Tensor) else batch

    def _generated(self, prompts: Sequence[list[int]]) -> Iterable[list[int]]:
        """Generate the text for each prompt, without the prompt."""
        options, end = self.recipe.options, self.recipe.tokenizer.eos_token_id
        left = room(self.model, prompts)
        if left is not None and options.max_target_length > left:
            raise ValueError(
                f"text.max_target_length must be at most {left}, the positions of the model that remain after the "
                f"longest prompt; got {options.max_target_length}"
            )
        if options.beams > 1 or not isinstance(self.model, LanguageModel):
            return self._generated_in_batches(prompts)
        ends = None if end is None else [end]
        parameters = SamplingParameters(max_new_tokens=options.max_target_length, eos_token_ids=ends)
        written = Generator(self.model, slots=_SLOTS).generate(prompts, parameters)
        return (generation.tokens for generation in written)

    def _generated_in_batches(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Generate with Hugging Face's generate, which supports beam search and every model."""
        options, tokenizer = self.recipe.options, self.recipe.tokenizer
        decoder_alone = not self.model.config.is_encoder_decoder
        for batch in track([*in_order(prompts, lambda rows: rows, len, self.tokens_per_batch)], "generating"):
            inputs = self._moved(_padded(batch, tokenizer.pad_token_id, on_the_left=decoder_alone))
            written: torch.Tensor = self.model.generate(
                **inputs,
                max_new_tokens=options.max_target_length,
                num_beams=options.beams,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            yield from written[:, inputs["input_ids"].shape[1] if decoder_alone else 0 :].tolist()


def position_limit(model: Any, decoder: bool = False) -> int | None:
    """Return the longest sequence that Fastformer's or Hugging Face's model has positions for; None for no limit.

    Args:
        model: the model.
        decoder: for an encoder-decoder, return the limit of the decoder instead of the encoder.
    """
    if isinstance(model.config, FastformerConfig):
        return model.config.position_limit
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and name.rpartition(".")[2] in _POSITION_TABLES
        and (not model.config.is_encoder_decoder or ("decoder" in name) == decoder)
    ]
    return min((each.num_embeddings - _unused_rows(each) for each in tables), default=None)


def _unused_rows(table: torch.nn.Embedding) -> int:
    """Return the number of rows before the first position: for padding, or unused."""
    return getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)


def room(model: Any, prompts: Sequence[list[int]]) -> int | None:
    """Return the number of positions left after the longest prompt; None for no limit.

    Raises:
        ValueError: a prompt, or the text after it, would have no position.
    """
    limit, longest = position_limit(model), max(map(len, prompts), default=0)
    if limit is None:
        return None
    if model.config.is_encoder_decoder:
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens, but the model has only {limit} positions")
        return position_limit(model, decoder=True)
    if longest >= limit:
        raise ValueError(f"a prompt has {longest} tokens, so none of the model's {limit} positions is left to write")
    return limit - longest


def recipe_for(task: Task, start: StartingPoint, options: TextOptions, tokenizer: PreTrainedTokenizerFast) -> Recipe:
    """Return the recipe of a task for a model, whose configuration names the labels."""
    config: Any = start.model.config
    known: int | None = getattr(start.model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and len(tokenizer) > known:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model in {config.name_or_path or 'memory'} has "
            f"embeddings for {known:,}: they do not belong together"
        )
    labels = None
    if task == "tag" or (task == "classify" and config.num_labels > 1):
        labels = [config.id2label[number] for number in range(config.num_labels)]
    return RECIPES[task](options, tokenizer, config, "packed" if start.packed else "dense", labels)


def _adapted(folder: str | Path, task: Task) -> StartingPoint:
    """Load the base model and merge the adapter; the configuration in the adapter's folder names the labels."""
    require("peft")
    config = load_configuration(folder)
    labels = list(config.id2label.values()) if task in ("classify", "tag") else None
    adapter = adapter_config(folder)
    try:
        start = pretrained(adapter.base_model_name_or_path, task, labels)
    except OSError as error:
        raise ValueError(f"{folder}: the base model of the adapter is not there: {error}") from error
    return start._replace(model=with_adapter(start.model, adapter, folder))


def _padded(rows: Sequence[list[int]], pad_token_id: int, on_the_left: bool) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        columns = slice(longest - len(row), None) if on_the_left else slice(len(row))
        ids[number, columns] = torch.tensor(row)
        mask[number, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}
