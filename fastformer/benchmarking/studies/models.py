"""Our models compared with Hugging Face's with the same weights: inference, and the loss with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fastformer.benchmarking.calls import Call, compiled, same
from fastformer.benchmarking.lengths import natural_lengths
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.data.packing import IGNORE_INDEX
from fastformer.models import from_hugging_face


@dataclass(frozen=True)
class Size:
    """The size of a model and of its batch. If `published`, the model has the shape of the configuration's defaults."""

    published: bool
    hidden: int
    layers: int
    vocabulary: int
    batch: int
    sequence: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Subject:
    """A Hugging Face class.

    Attributes:
        name: its name in transformers.
        reads: the kind of data: "masked", "causal", "pairs" of a source and a target, or "images".
        fields: the configuration's names of hidden size, intermediate size, layers and heads. Each may have several.
        options: further options of the configuration.
        published: options of a published shape, if the configuration's default shape is too large.
    """

    name: str
    reads: str
    fields: tuple[tuple[str, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    def build(self, size: Size, attention: str) -> PreTrainedModel:
        """Build the model with the same random weights each time. Without dropout (evaluation), results can agree."""
        model_class = getattr(transformers, self.name)
        options = {**self.options, "use_cache": False}
        if size.published:
            options |= self.published
        else:
            values = (size.hidden, 4 * size.hidden, size.layers, max(2, size.hidden // 64))
            for names, value in zip(self.fields, values, strict=True):
                options |= dict.fromkeys(names, value)
            images = {"image_size": 16 * int(size.sequence**0.5)}
            options |= images if self.reads == "images" else {"vocab_size": size.vocabulary}
        torch.manual_seed(0)
        config = model_class.config_class(**options)
        return model_class._from_config(config, attn_implementation=attention).eval()

    def batch(self, config: Any, size: Size) -> dict[str, Tensor]:
        """A batch of padded sequences of natural lengths, or of images, with labels."""
        random = torch.Generator().manual_seed(0)
        if self.reads == "images":
            pixels = torch.randn(size.batch, 3, config.image_size, config.image_size, generator=random)
            labels = torch.randint(config.num_labels, (size.batch,), generator=random)
            batch = {"pixel_values": pixels.to(size.dtype), "labels": labels}
        else:
            batch = self._text(random, config.vocab_size, size)
        return {name: tensor.to(size.device) for name, tensor in batch.items()}

    def _text(self, random: torch.Generator, vocabulary: int, size: Size) -> dict[str, Tensor]:
        lengths = torch.tensor(natural_lengths(size.batch, size.sequence))
        real = torch.arange(size.sequence) < lengths[:, None]
        ids = torch.randint(5, vocabulary, real.shape, generator=random) * real
        batch = {"input_ids": ids, "attention_mask": real.long()}
        if self.reads == "pairs":
            batch["labels"] = torch.randint(5, vocabulary, (size.batch, size.sequence // 2), generator=random)
            return batch
        predicted = real
        if self.reads == "masked":
            predicted = real & (torch.rand(real.shape, generator=random) < 0.15)
        return {**batch, "labels": ids.masked_fill(~predicted, IGNORE_INDEX)}


_USUAL = (("hidden_size",), ("intermediate_size",), ("num_hidden_layers",), ("num_attention_heads",))
_BART = (
    ("d_model",),
    ("encoder_ffn_dim", "decoder_ffn_dim"),
    ("encoder_layers", "decoder_layers"),
    ("encoder_attention_heads", "decoder_attention_heads"),
)
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SUBJECTS = {
    "BERT": Subject("BertForMaskedLM", "masked", _USUAL),
    "GPT-2": Subject("GPT2LMHeadModel", "causal", (("n_embd",), ("n_inner",), ("n_layer",), ("n_head",)), _SPECIAL),
    "Llama": Subject("LlamaForCausalLM", "causal", _USUAL, published=_LLAMA_1B),
    "T5": Subject(
        "T5ForConditionalGeneration",
        "pairs",
        (("d_model",), ("d_ff",), ("num_layers", "num_decoder_layers"), ("num_heads",)),
        {"decoder_start_token_id": 0},
    ),
    "BART": Subject("BartForConditionalGeneration", "pairs", _BART),
    "ViT": Subject("ViTForImageClassification", "images", _USUAL),
}


def cases(setting: Setting) -> Iterator[Case]:
    gpu = setting.device.type == "cuda"
    if setting.quick:
        size = Size(False, 64, 1, 96, 2, 16, setting.device, torch.float32)
    elif gpu:
        size = Size(True, 768, 12, 32000, 16, 512, setting.device, torch.bfloat16)
    else:
        size = Size(False, 256, 4, 8192, 8, 144, setting.device, torch.float32)
    for name, subject in SUBJECTS.items():
        for training in (True, False):
            yield _case(name, subject, size, training, gpu or (name == "BERT" and not training and not setting.quick))


def _case(name: str, subject: Subject, size: Size, training: bool, compile_it: bool) -> Case:
    run = _loss if training else _logits

    def theirs(attention: str, wrap: Callable[[Any], Any] = lambda model: model) -> Run:
        model: Any = subject.build(size, attention)
        batch = subject.batch(model.config, size)
        return run(wrap(model.to(size.device, size.dtype)), _decoded(model, batch))

    def ours() -> Run:
        transformers.logging.disable_progress_bar()
        model = subject.build(size, "eager")
        batch = _decoded(model, subject.batch(model.config, size))
        own: Any = from_hugging_face(model)
        return run(own.to(size.device, size.dtype), batch)

    peers = {
        OURS: Peer(ours),
        "Hugging Face, eager": Peer(partial(theirs, "eager")),
        "Hugging Face, SDPA": Peer(partial(theirs, "sdpa")),
        "Hugging Face, flash-attn": Peer(
            partial(theirs, "flash_attention_2"), packages=("flash_attn",), devices=("cuda",)
        ),
    }
    if compile_it:
        peers["Hugging Face, torch.compile"] = Peer(partial(theirs, "sdpa", compiled), compiled=True)
    title = f"{name}, {'loss and gradients' if training else 'inference'}"
    if subject.reads == "images":
        work, select = {"images": float(size.batch)}, _all
    else:
        lengths = natural_lengths(size.batch, size.sequence)
        targets = size.batch * (size.sequence // 2) if subject.reads == "pairs" else 0
        work, select = {"tokens": float(sum(lengths) + targets)}, partial(_real, lengths, size.sequence)
    return Case(title, peers, work, same(size.dtype, select), memory=size.device.type == "cuda")


def _decoded(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the decoder's input. Some models derive it from the labels, others need it as an argument."""
    if not model.config.is_encoder_decoder:
        return batch
    return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def _logits(model: Any, batch: dict[str, Tensor]) -> Run:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return Call(lambda: model(**inputs).logits, [])


def _loss(model: Any, batch: dict[str, Tensor]) -> Run:
    def run() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach()]

    return run


def _all(tensor: Tensor) -> Tensor:
    return tensor


def _real(lengths: tuple[int, ...], longest: int, tensor: Tensor) -> Tensor:
    """The part of a tensor that is not padding. A tensor of another shape has no padding."""
    if tensor.shape[:2] != (len(lengths), longest):
        return tensor
    places = torch.arange(longest, device=tensor.device)
    return tensor[places < torch.tensor(lengths, device=tensor.device)[:, None]]


STUDY = TimedStudy(
    name="models",
    title="models compared with Hugging Face's, with the same weights",
    cases=cases,
    memory="everything",
    note=(
        "Sequences have natural lengths and are padded; tokens are counted without padding. Models are in evaluation "
        "mode, so that losses can be compared. Memory includes weights, gradients and everything that a run takes."
    ),
)
