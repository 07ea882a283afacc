"""Our twins of torch.nn's modules compared with torch.nn: training steps and inference, with and without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastformer.nn
from fastformer.benchmarking.calls import Call, compiled, same
from fastformer.benchmarking.lengths import natural_lengths
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run

TORCH, COMPILED = "torch.nn", "torch.compile(torch.nn)"


@dataclass(frozen=True)
class Shape:
    """The shape of the modules and of their batch. `device` and `dtype` are those of both."""

    features: int
    heads: int
    layers: int
    batch: int
    sequence: int
    device: torch.device
    dtype: torch.dtype

    def real(self, padded: bool) -> Tensor:
        """A (batch, sequence) boolean mask of the tokens that are not padding."""
        lengths = natural_lengths(self.batch, self.sequence) if padded else (self.sequence,) * self.batch
        return torch.arange(self.sequence, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]


Apply = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""Calls a module with (batch, sequence, features) and a mask of the padding, or None without padding."""


@dataclass(frozen=True)
class Twin:
    """A module that both libraries have.

    Attributes:
        build: builds the module from `torch.nn` or from `fastformer.nn`.
        call: calls the module.
        takes_padding: whether the module treats padding in a special way.
    """

    build: Callable[[Any, Shape], nn.Module]
    call: Apply
    takes_padding: bool = True


def _layer_options(shape: Shape) -> dict[str, Any]:
    # Without dropout, so that gradients can be compared.
    return {
        "d_model": shape.features,
        "nhead": shape.heads,
        "dim_feedforward": 4 * shape.features,
        "dropout": 0.0,
        "batch_first": True,
    }


def _encoder(library: Any, shape: Shape) -> nn.Module:
    return library.TransformerEncoder(library.TransformerEncoderLayer(**_layer_options(shape)), shape.layers)


def _decoder(library: Any, shape: Shape) -> nn.Module:
    return library.TransformerDecoder(library.TransformerDecoderLayer(**_layer_options(shape)), shape.layers)


def _transformer(library: Any, shape: Shape) -> nn.Module:
    layers = {"num_encoder_layers": shape.layers, "num_decoder_layers": shape.layers}
    return library.Transformer(**layers, **_layer_options(shape))


def _causal(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)


def _call_decoder(module: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    masks = {"tgt_key_padding_mask": _floating(padding, x), "memory_key_padding_mask": padding}
    return module(x, x, tgt_mask=_causal(x), tgt_is_causal=True, **masks)


def _call_transformer(module: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    masks["tgt_key_padding_mask"] = _floating(padding, x)
    return module(x, x, tgt_mask=_causal(x), tgt_is_causal=True, **masks)


def _floating(padding: Tensor | None, x: Tensor) -> Tensor | None:
    """The padding as a floating-point mask, which PyTorch requires if the other mask is a floating-point one."""
    return None if padding is None else torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, float("-inf"))


TWINS = {
    "TransformerEncoder": Twin(_encoder, lambda module, x, padding: module(x, src_key_padding_mask=padding)),
    "TransformerDecoder": Twin(_decoder, _call_decoder),
    "Transformer": Twin(_transformer, _call_transformer),
    "TransformerEncoderLayer": Twin(
        lambda library, shape: library.TransformerEncoderLayer(**_layer_options(shape)),
        lambda module, x, padding: module(x, src_key_padding_mask=padding),
    ),
    "MultiheadAttention": Twin(
        lambda library, shape: library.MultiheadAttention(shape.features, shape.heads, batch_first=True),
        lambda module, x, padding: module(x, x, x, key_padding_mask=padding, need_weights=False)[0],
    ),
    "LayerNorm": Twin(lambda library, shape: library.LayerNorm(shape.features), lambda module, x, _: module(x), False),
    "RMSNorm": Twin(lambda library, shape: library.RMSNorm(shape.features), lambda module, x, _: module(x), False),
}


def cases(setting: Setting) -> Iterator[Case]:
    gpu = setting.device.type == "cuda"
    if setting.quick:
        shape = Shape(32, 2, 1, 2, 16, setting.device, torch.float32)
    elif gpu:
        shape = Shape(1024, 16, 6, 16, 512, setting.device, torch.bfloat16)
    else:
        shape = Shape(256, 4, 2, 8, 256, setting.device, torch.float32)
    for name, twin in TWINS.items():
        for padded in (False, True) if twin.takes_padding else (False,):
            for training in (True, False):
                title = f"{name}, {'training step' if training else 'inference'}{', padding' if padded else ''}"
                run = partial(_run, twin, shape, padded, training)
                peers = {OURS: Peer(partial(run, fastformer.nn)), TORCH: Peer(partial(run, nn))}
                # On a CPU, compiling takes longer than everything else.
                if gpu or (name == "TransformerEncoderLayer" and not padded and not setting.quick):
                    peers[COMPILED] = Peer(partial(run, nn, compile_it=True), compiled=True)
                tokens = float(shape.real(padded).sum())
                agree = same(shape.dtype, partial(_real, shape.real(padded)))
                yield Case(title, peers, {"tokens": tokens}, agree, memory=gpu)


def _run(twin: Twin, shape: Shape, padded: bool, training: bool, library: Any, compile_it: bool = False) -> Run:
    torch.manual_seed(0)
    # Both start with PyTorch's initial weights: the twins have the same parameter names.
    initial = twin.build(nn, shape).state_dict()
    module = twin.build(library, shape).to(shape.device, shape.dtype).train(training)
    module.load_state_dict(initial)
    parameters = [parameter for _, parameter in sorted(module.named_parameters())]
    real = shape.real(padded)
    padding = ~real if padded else None
    x, gradient = (torch.randn(shape.batch, shape.sequence, shape.features) for _ in range(2))
    x = x.to(shape.device, shape.dtype)
    call = compiled(twin.call) if compile_it else twin.call

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return call(module, x, padding)

    if not training:
        return Call(function, [x])
    # Gradients of the padding are zero.
    gradient = gradient.to(shape.device, shape.dtype) * real[:, :, None]
    return Call(function, [x.requires_grad_(), *parameters], [gradient])


def _real(real: Tensor, tensor: Tensor) -> Tensor:
    """The part of a tensor that is not padding. PyTorch's padding is zero, ours is undefined."""
    return tensor[real] if tensor.shape[:2] == real.shape else tensor


STUDY = TimedStudy(
    name="modules",
    title="twins of torch.nn's modules, in training and inference",
    cases=cases,
    memory="run",
    note="Tokens are counted without padding. Dropout is 0, so that gradients can be compared.",
)
