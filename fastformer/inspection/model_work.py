"""What a whole model launches: its training and evaluation steps on meta tensors, with no weights and no data."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel

import fastformer.models

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SEQUENCES = 8


def meta_model(name: str, precision: str) -> PreTrainedModel:
    """The model of a folder in Hugging Face's format, or of a preset (with its pretraining heads), on meta.

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
    with torch.device("meta"):
        return getattr(fastformer.models, kind)(config).to(_DTYPES.get(precision, torch.float32))


def model_work(model: PreTrainedModel, precision: str) -> list[Callable[[], object]]:
    """Training and evaluation steps of `model` that together launch what a batch of several sequences does.

    Triton specialises a kernel on whether a size, or a number of tiles, is one or a multiple of 16, and short rows
    share a tile; so the longest sequence and the number of labelled tokens run through the powers of two, each also
    less by three, and the number of tokens is a multiple of 16 or is not. Batches are packed; a dense batch launches
    the same kernels, since it is packed on the way in.
    """
    longest = model.config.max_position_embeddings
    batches = list(
        itertools.product(
            [size for size in _sizes(longest) if size >= 13], (_SEQUENCES * longest, _SEQUENCES * longest - 5)
        )
    )
    labelled = _sizes(256)
    rounds = range(max(len(batches), len(labelled)))
    return [
        partial(_step, model, precision, training, *batches[i % len(batches)], labelled[i % len(labelled)])
        for i in rounds
        for training in (True, False)
    ]


def _sizes(most: int) -> list[int]:
    """The powers of two from 4 to `most`, and each less by three."""
    return [(1 << exponent) - less for exponent in range(2, most.bit_length()) for less in (0, 3)]


def _step(model: PreTrainedModel, precision: str, training: bool, max_seqlen: int, tokens: int, labelled: int) -> None:
    model.train(training)
    with _precision(precision), torch.set_grad_enabled(training):
        output = model(**_batch(model, max_seqlen, tokens, labelled))
        if training:
            result = output["loss"] if "loss" in output else output[0]
            result.backward(torch.empty_like(result))
    model.zero_grad()


def _batch(model: PreTrainedModel, max_seqlen: int, tokens: int, labelled: int) -> dict[str, Any]:
    def integers(size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    accepted = inspect.signature(model.forward).parameters
    per_token = "masked_positions" in accepted
    arguments = {
        "input_ids": integers(tokens),
        "token_type_ids": integers(tokens),
        "position_ids": integers(tokens),
        "cu_seqlens": integers(_SEQUENCES + 1, torch.int32),
        "max_seqlen": max_seqlen,
        "labels": integers(tokens if per_token else _SEQUENCES),
        "masked_positions": integers(labelled),
        "next_sentence_label": integers(_SEQUENCES),
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
