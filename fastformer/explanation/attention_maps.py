"""Attention weights of chosen blocks and heads, computed on the fused path, as arrays and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastformer.files import atomic_file
from fastformer.models import FastformerModel
from fastformer.models.context import AttentionRecord

ATTENTIONS = ("encoder", "decoder", "cross")
"""The kinds of attention: of the encoder, of the decoder, and of the decoder to the encoder's output."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one text.

    Attributes:
        queries: the tokens that attend.
        keys: the tokens that are attended to.
        layers, heads: the numbers of the blocks and heads.
        weights: (layers, heads, queries, keys) float32.
    """

    queries: list[str]
    keys: list[str]
    layers: list[int]
    heads: list[int]
    weights: np.ndarray


def attention_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    attention: str | None = None,
    target_text: str | None = None,
) -> AttentionMaps:
    """Run a text model on one text, and return the attention weights of the chosen blocks and heads.

    The weights are recomputed from the log-sum-exp of the fused attention, for the chosen blocks and heads only.

    Args:
        model: one of Fastformer's models, in evaluation mode, with any head or none.
        tokenizer: the model's tokenizer.
        text: the text; for an encoder-decoder, the source.
        layers, heads: numbers of blocks and heads, from 0; None for all.
        attention: one of `ATTENTIONS`. None stands for a model's only one, or for an encoder-decoder's encoder.
        target_text: the text that an encoder-decoder's decoder reads. The decoder's attention and its attention to the
            encoder need it.

    Raises:
        ValueError, IndexError: an argument is not accepted; the message names it.

    >>> maps = attention_maps(model, tokenizer, "The cat sat.", layers=[0], heads=[0, 3])
    >>> maps.weights.shape
    (1, 2, 6, 6)
    """
    base = model.base_model
    stacks = {each.role: each for each in base.modules() if isinstance(each, FastformerModel)}
    if not stacks or model.config.image_size:
        raise ValueError(f"model must be one of Fastformer's models of text; got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout; call model.eval()")
    attention = attention or next(iter(stacks))
    accepted = ATTENTIONS if len(stacks) == 2 else tuple(stacks)
    if attention not in accepted:
        raise ValueError(f"attention must be one of {', '.join(accepted)}; got {attention!r}")
    stack = stacks["decoder" if attention == "cross" else attention]
    layers = list(range(len(stack.layers)) if layers is None else layers)
    if wrong := [layer for layer in layers if not 0 <= layer < len(stack.layers)]:
        raise IndexError(f"layers must be from 0 to {len(stack.layers) - 1}; got {wrong[0]}")
    source = encode(model, tokenizer, text)
    target = None
    if len(stacks) == 2:
        if target_text is None and attention != "encoder":
            raise ValueError(f"target_text must be given for the attention {attention!r}")
        target = _decoder_input(model, tokenizer, target_text or "")
    elif target_text is not None:
        raise ValueError("target_text is for encoder-decoders")
    with torch.no_grad(), _recorded(stack, layers, heads) as record:
        base(**source, **({} if target is None else {"decoder_input_ids": target}))
    weights = record.source if attention == "cross" else record.own
    queries = source["input_ids"] if target is None or attention == "encoder" else target
    keys = queries if attention != "cross" else source["input_ids"]
    return AttentionMaps(
        queries=token_names(tokenizer, queries[0]),
        keys=token_names(tokenizer, keys[0]),
        layers=layers,
        heads=list(range(model.config.num_attention_heads) if heads is None else heads),
        weights=torch.stack([weights[layer][0] for layer in layers]).float().cpu().numpy(),
    )


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, torch.Tensor]:
    """`text` as the model's input ids and, if the model has them, token types, both (1, tokens)."""
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError(f"text must have at least one token; got {text!r}")
    names = ["input_ids", *(["token_type_ids"] if model.config.type_vocab_size else [])]
    return {name: encoded[name] for name in names if name in encoded}


def token_names(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """The tokens of `ids`, (tokens,), as the vocabulary spells them."""
    return [str(tokenizer.convert_ids_to_tokens(each)) for each in ids.tolist()]


def draw_attention(maps: AttentionMaps, path: Path) -> None:
    """Write a picture of `maps` to `path`, as PNG: a row for each block, a column for each head."""
    from matplotlib.figure import Figure

    rows, columns = len(maps.layers), len(maps.heads)
    width, height = (max(2.0, 0.6 + 0.16 * len(tokens)) for tokens in (maps.keys, maps.queries))
    # Matplotlib's limit is 2^16 pixels in each direction.
    dpi = min(100.0, 60000 / max(columns * width, rows * height))
    figure = Figure(figsize=(columns * width + 0.8, rows * height + 0.4), dpi=dpi, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, layer in enumerate(maps.layers):
        for column, head in enumerate(maps.heads):
            axis = axes[row, column]
            image = axis.imshow(maps.weights[row, column], cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
            axis.set_title(f"layer {layer}, head {head}", fontsize=8)
            axis.set_xticks(range(len(maps.keys)), maps.keys, rotation=90, fontsize=6, parse_math=False)
            axis.set_yticks(range(len(maps.queries)), maps.queries, fontsize=6, parse_math=False)
    axes[-1, 0].set_xlabel("attended to", fontsize=8)
    axes[-1, 0].set_ylabel("attends", fontsize=8)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


@contextmanager
def _recorded(stack: FastformerModel, layers: Sequence[int], heads: Sequence[int] | None) -> Iterator[AttentionRecord]:
    """Record the attention weights of these blocks and heads within the `with` block."""
    record = AttentionRecord(heads)

    def give(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, context, *patterns = inputs
        return hidden, context._replace(record=record), *patterns

    hooks = [stack.layers[layer].register_forward_pre_hook(give) for layer in dict.fromkeys(layers)]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _decoder_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The decoder's input when its target is `text`: the start token, and all tokens of the text but the last."""
    ids = tokenizer(text_target=text, return_tensors="pt")["input_ids"].to(torch.int64).to(model.device)
    start = model.config.decoder_start_token_id
    if start is None:
        raise ValueError("decoder_start_token_id must be set in the model's configuration; got None")
    return torch.cat([ids.new_full((1, 1), start), ids[:, :-1]], dim=1)
