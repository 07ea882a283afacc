"""The kernel launches of a whole model: its training and evaluation steps on meta tensors, without weights or data."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import fastformer.models
from fastformer.models.configuration import FastformerConfig
from fastformer.models.loading import load_configuration
from fastformer.models.modeling import ModelOptions

_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def known_model(name: str) -> tuple[FastformerConfig, str]:
    """The configuration of a preset, or of a folder in Hugging Face's format, and the name of its model's class.

    Raises:
        ValueError: `name` is neither, or the folder's model is not one of Fastformer's.
    """
    if name in fastformer.models.PRESETS:
        return fastformer.models.preset(name), fastformer.models.PRESETS[name].model
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"the model must be a folder with a config.json or a preset ({', '.join(fastformer.models.PRESETS)}); "
            f"got {name!r}"
        )
    config = load_configuration(name)
    kind = (config.architectures or ["FastformerModel"])[0]
    if kind not in fastformer.models.__all__:
        raise ValueError(f"the model in {name} is a {kind}, which is not one of Fastformer's models")
    return config, kind


def named_steps(name: str, precision: str) -> list[tuple[str, Callable[[], object]]]:
    """The steps of `model_work` for a preset or a model's folder, at most two blocks deep, each with a name."""
    config, kind = known_model(name)
    steps = model_work(meta_model(two_blocks(config), kind, precision), precision)
    return [(f"{name}, step {number}", step) for number, step in enumerate(steps, 1)]


def meta_model(config: FastformerConfig, kind: str, precision: str) -> PreTrainedModel:
    """Build a model of class `kind` on meta, in the dtype that its weights have at `precision`."""
    with torch.device("meta"):
        model = getattr(fastformer.models, kind)(config)
    # Rotary tables are built on the CPU and must be moved.
    return model.to("meta", _DTYPES.get(precision, torch.float32))


def two_blocks(config: FastformerConfig) -> FastformerConfig:
    """`config` with at most two blocks in each stack: one block of each kind launches every kernel of the model."""
    fewer = copy.deepcopy(config)
    if config.layer_types is not None:
        # One block of each kind, if there are two kinds.
        kinds = [*dict.fromkeys(config.layer_types), *config.layer_types]
        fewer.layer_types = kinds[: min(2, len(config.layer_types))]
        fewer.num_hidden_layers = len(fewer.layer_types)
        fewer.num_decoder_layers = None
        return fewer
    fewer.num_hidden_layers = min(config.num_hidden_layers, 2)
    if config.num_decoder_layers is not None:
        fewer.num_decoder_layers = min(config.num_decoder_layers, 2)
    return fewer


@dataclass(frozen=True)
class Batch:
    """The sizes of a packed batch.

    Attributes:
        sequences: the number of sequences; for an image model, of images.
        tokens: tokens of all sequences together; for an encoder-decoder, of its sources.
        max_seqlen: tokens of the longest sequence; for an encoder-decoder, of its sources.
        target_tokens: tokens of all targets of an encoder-decoder together.
        target_max_seqlen: tokens of the longest target.
        labelled: the number of tokens that a masked-LM head predicts.
        token_types: whether token types are given.
    """

    sequences: int
    tokens: int
    max_seqlen: int
    target_tokens: int
    target_max_seqlen: int
    labelled: int
    token_types: bool = False


def model_work(model: PreTrainedModel, precision: str) -> list[Callable[[], object]]:
    """Training and evaluation steps of `model` that together launch every kernel of a batch of several sequences.

    Triton compiles a different kernel when a size, or a number of tiles, is one or a multiple of 16, and short rows
    share a tile. So the longest sequence and the number of labelled tokens take every power of two, and every power of
    two minus three. The numbers of tokens, of their tiles and of sequences are one, a multiple of 16 or neither.
    Batches are packed. A dense batch launches the same kernels, since it is packed at the model's input.
    """
    config = model.config
    batches = _image_batches() if config.image_size else _batches(config.max_position_embeddings)
    if config.is_encoder_decoder:
        # Combine targets of every kind with sources of every kind.
        batches = [
            _with_target(each, batches[(i + by) % len(batches)]) for by in (1, 2) for i, each in enumerate(batches)
        ]
    return [partial(_step, model, precision, training, batch) for batch in batches for training in (True, False)]


# Numbers of tokens that are and are not a multiple of 16. In tiles of up to 256 tokens, the first two make a number of
# tiles that is neither one nor a multiple of 16. The others make one tile, which short rows share, or a multiple of 16.
_TOKENS = (4144, 4139)
_OTHER_TOKENS = (16, 13, 32, 29, 48, 43, 4096, 4091)


def _batches(longest: int) -> list[Batch]:
    lengths = [size for size in _sizes(longest) if size >= 13]
    sizes = [(*each, True) for each in itertools.product(lengths, _TOKENS, (16, 3))]
    sizes += [(lengths[0], tokens, 16, types) for tokens in _OTHER_TOKENS for types in (True, False)]
    sizes += [(lengths[0], tokens, 16, False) for tokens in _TOKENS]
    labelled = _sizes(256)
    chosen = [(sizes[i % len(sizes)], labelled[i % len(labelled)]) for i in range(max(len(sizes), len(labelled)))]
    return [
        Batch(sequences, tokens, length, tokens, length, n, types) for (length, tokens, sequences, types), n in chosen
    ]


def _image_batches() -> list[Batch]:
    """Batches of images. Each image has the same number of tokens, so only the number of images varies."""
    return [Batch(images, 0, 0, 0, 0, 0) for images in (*range(1, 33), 48, 64, 128, 256)]


def _with_target(batch: Batch, target: Batch) -> Batch:
    return replace(batch, target_tokens=target.tokens, target_max_seqlen=target.max_seqlen)


def _sizes(most: int) -> list[int]:
    """The powers of two from 4 to `most`, and each of them minus three."""
    return [(1 << exponent) - less for exponent in range(2, most.bit_length()) for less in (0, 3)]


def _step(model: PreTrainedModel, precision: str, training: bool, batch: Batch) -> None:
    model.train(training)
    with autocast(precision), torch.set_grad_enabled(training):
        output = model(**arguments(model, batch))
        if training:
            result = output["loss"] if "loss" in output else output[0]
            result.backward(torch.empty_like(result))
    model.zero_grad()


def arguments(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of a call of `model` for `batch`, with labels, on meta."""

    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    config = model.config
    if config.image_size:
        images = torch.empty(batch.sequences, config.num_channels, config.image_size, config.image_size, device="meta")
        return {"pixel_values": images, "labels": integers(batch.sequences)}
    accepted = {*inspect.signature(model.forward).parameters, *ModelOptions.__annotations__}
    labelled = batch.target_tokens if config.is_encoder_decoder else batch.tokens
    if isinstance(model, fastformer.models.FastformerForSequenceClassification):
        labelled = batch.sequences
    boundaries = integers(batch.sequences + 1, dtype=torch.int32)
    known = {
        "input_ids": integers(batch.tokens),
        "token_type_ids": integers(batch.tokens) if batch.token_types and config.type_vocab_size else None,
        "position_ids": integers(batch.tokens),
        "cu_seqlens": boundaries,
        "max_seqlen": batch.max_seqlen,
        "decoder_input_ids": integers(batch.target_tokens),
        "decoder_position_ids": integers(batch.target_tokens),
        "decoder_cu_seqlens": boundaries,
        "decoder_max_seqlen": batch.target_max_seqlen,
        "labels": integers(labelled),
        "masked_positions": integers(batch.labelled),
        **dict.fromkeys(("next_sentence_label", "start_positions", "end_positions"), integers(batch.sequences)),
    }
    return {name: argument for name, argument in known.items() if name in accepted}


def autocast(precision: str) -> AbstractContextManager[None]:
    """A context that does for meta tensors what a GPU's autocast does at `precision`; an empty one without autocast."""
    return _gpu_autocast(_AUTOCAST[precision]) if precision in _AUTOCAST else nullcontext()


@contextmanager
def _gpu_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Apply a GPU's autocast to meta tensors, which PyTorch's own autocast ignores."""
    enabled, previous = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with _ProductsInAutocastDtype(dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", previous)


class _ProductsInAutocastDtype(TorchFunctionMode):
    """Casts the inputs of projections, GPT-2's and patch embeddings included, to the autocast dtype.

    They are the only operations of a Transformer that autocast narrows and that Fastformer leaves to PyTorch.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.conv2d, torch.addmm):
            args = [argument.to(self.dtype) if isinstance(argument, torch.Tensor) else argument for argument in args]
        return func(*args, **(kwargs or {}))
