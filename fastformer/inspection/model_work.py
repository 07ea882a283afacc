"""What a whole model launches: its training and evaluation steps on meta tensors, with no weights and no data."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel

import fastformer.models
from fastformer.models.modeling import ModelOptions

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def meta_model(name: str, precision: str) -> PreTrainedModel:
    """The model of a folder in Hugging Face's format, or of a preset (with its pretraining heads), on meta.

    It has two blocks at most: all of a model's blocks launch the same kernels.

    Raises:
        ValueError: it is neither, or the folder's model is not one of Fastformer's.
    """
    if name in fastformer.models.PRESETS:
        config, kind = fastformer.models.preset(name), "FastformerForPreTraining"
    elif (Path(name) / "config.json").is_file():
        config = AutoConfig.from_pretrained(name)
        kind = (config.architectures or ["FastformerModel"])[0]
    else:
        raise ValueError(
            f"--model must be a folder with a config.json or a preset ({', '.join(fastformer.models.PRESETS)}); "
            f"got {name!r}"
        )
    if kind not in fastformer.models.__all__:
        raise ValueError(f"the model in {name} is a {kind}, which is none of Fastformer's")
    config.num_hidden_layers = min(config.num_hidden_layers, 2)
    with torch.device("meta"):
        return getattr(fastformer.models, kind)(config).to(_DTYPES.get(precision, torch.float32))


@dataclass(frozen=True)
class _Batch:
    """The sizes of a packed batch: its longest sequence, tokens, sequences, and labelled tokens; whether types are
    given."""

    max_seqlen: int
    tokens: int
    sequences: int
    labelled: int
    token_types: bool


def model_work(model: PreTrainedModel, precision: str) -> list[Callable[[], object]]:
    """Training and evaluation steps of `model` that together launch what a batch of several sequences does.

    Triton specialises a kernel on whether a size, or a number of tiles, is one or a multiple of 16, and short rows
    share a tile; so the longest sequence and the number of labelled tokens run through the powers of two, each also
    less by three, and tokens, their tiles and sequences number one, a multiple of 16 or neither. Batches are packed; a
    dense batch launches the same kernels, since it is packed on the way in.
    """
    return [
        partial(_step, model, precision, training, batch)
        for batch in _batches(model.config.max_position_embeddings)
        for training in (True, False)
    ]


# Tokens that are a multiple of 16 and that are not, in tiles of up to 256 that number neither one nor a multiple of 16;
# then the same for one tile and for multiples of 16.
_TOKENS = (4144, 4139)
_OTHER_TOKENS = (48, 43, 4096, 4091)


def _batches(longest: int) -> list[_Batch]:
    lengths = [size for size in _sizes(longest) if size >= 13]
    sizes = [(*each, True) for each in itertools.product(lengths, _TOKENS, (16, 3))]
    sizes += [(lengths[0], tokens, 16, types) for tokens in _OTHER_TOKENS for types in (True, False)]
    sizes += [(lengths[0], tokens, 16, False) for tokens in _TOKENS]
    labelled = _sizes(256)
    chosen = [(sizes[i % len(sizes)], labelled[i % len(labelled)]) for i in range(max(len(sizes), len(labelled)))]
    return [_Batch(length, tokens, sequences, n, types) for (length, tokens, sequences, types), n in chosen]


def _sizes(most: int) -> list[int]:
    """The powers of two from 4 to `most`, and each less by three."""
    return [(1 << exponent) - less for exponent in range(2, most.bit_length()) for less in (0, 3)]


def _step(model: PreTrainedModel, precision: str, training: bool, batch: _Batch) -> None:
    model.train(training)
    with _precision(precision), torch.set_grad_enabled(training):
        output = model(**_arguments(model, batch))
        if training:
            result = output["loss"] if "loss" in output else output[0]
            result.backward(torch.empty_like(result))
    model.zero_grad()


def _arguments(model: PreTrainedModel, batch: _Batch) -> dict[str, Any]:
    def integers(size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    accepted = {*inspect.signature(model.forward).parameters, *ModelOptions.__annotations__}
    per_token = "masked_positions" in accepted
    arguments = {
        "input_ids": integers(batch.tokens),
        "token_type_ids": integers(batch.tokens) if batch.token_types else None,
        "position_ids": integers(batch.tokens),
        "cu_seqlens": integers(batch.sequences + 1, torch.int32),
        "max_seqlen": batch.max_seqlen,
        "labels": integers(batch.tokens if per_token else batch.sequences),
        "masked_positions": integers(batch.labelled),
        "next_sentence_label": integers(batch.sequences),
    }
    return {name: argument for name, argument in arguments.items() if name in accepted}


def _precision(precision: str) -> AbstractContextManager[None]:
    return _gpu_autocast(_AUTOCAST[precision]) if precision in _AUTOCAST else nullcontext()


@contextmanager
def _gpu_autocast(dtype: torch.dtype) -> Iterator[None]:
    """A GPU's autocast for tensors on meta, which PyTorch's own does not reach."""
    enabled, previous = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with _LinearInAutocastDtype(dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", previous)


class _LinearInAutocastDtype(TorchFunctionMode):
    """PyTorch's projections, the one operation of a Transformer that autocast narrows and Fastformer leaves to it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [argument.to(self.dtype) if isinstance(argument, torch.Tensor) else argument for argument in args]
        return func(*args, **(kwargs or {}))
