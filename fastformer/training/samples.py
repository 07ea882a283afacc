"""Samples of a pretrained model's output, for the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BatchEncoding, pipeline

_NEW_TOKENS = 24


class Sample(NamedTuple):
    """A text given to a model, and the model's answer."""

    given: str
    answer: str


def sample(objective: str, model: Path) -> Sample:
    """Return a text like those of the default corpus, and the answer of the pretrained model in a folder."""
    return _SAMPLES[objective](str(model))


def _filled_mask(folder: str) -> Sample:
    """Return a text with a mask, and the most probable words for it with their probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = f"This method returns a {tokenizer.mask_token} object."
    found = pipeline("fill-mask", folder, tokenizer=tokenizer)(text)
    return Sample(text, ", ".join(f"{word['token_str'].strip()} {word['score']:.0%}" for word in found))


def _continuation(folder: str) -> Sample:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    text = "This method returns"
    prompt = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.config.max_position_embeddings // 2)
    answer = _generate(model, prompt)[prompt["input_ids"].shape[1] :]
    return Sample(text, str(tokenizer.decode(answer, skip_special_tokens=True)).strip())


def _restored(text: str) -> Callable[[str], Sample]:
    def restore(folder: str) -> Sample:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
        source = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.config.max_position_embeddings)
        unsaid = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        answer = [token for token in _generate(model, source).tolist() if token not in unsaid]
        return Sample(text, str(tokenizer.decode(answer)).strip())

    return restore


def _generate(model: Any, inputs: BatchEncoding) -> torch.Tensor:
    """Generate the most probable tokens, one after another, up to the longest sequence the model was trained on."""
    generated = 0 if model.config.stack == "encoder_decoder" else inputs["input_ids"].shape[1]
    room = model.config.max_position_embeddings - max(generated, 1)
    return model.generate(**inputs, max_new_tokens=min(_NEW_TOKENS, room), do_sample=False)[0]


_SAMPLES: dict[str, Callable[[str], Sample]] = {
    "mlm": _filled_mask,
    "clm": _continuation,
    "span-corruption": _restored("This method returns a <extra_id_0> object. It is the same <extra_id_1> the other."),
    "denoising": _restored("This method returns a<mask> object."),
}
