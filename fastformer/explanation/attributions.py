"""The contribution of each token to a prediction: integrated gradients (Sundararajan et al. 2017), by captum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastformer.explanation.attention_maps import encode, token_names
from fastformer.extras import require
from fastformer.files import atomic_file
from fastformer.models import (
    FastformerForCausalLM,
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForSequenceClassification,
)
from fastformer.nn import TransformerEmbedding

STEPS_AT_ONCE = 16
"""The number of steps of the integral that are computed as one batch."""


@dataclass(frozen=True)
class Attributions:
    """The contribution of each token to a logit.

    Attributes:
        tokens: the tokens of the text.
        scores: for each token, the sum of the integrated gradients of its word embedding.
        target: the number of the class, or the id of the predicted token.
        label: the name of the target.
        output: the logit.
        baseline: the logit of the text without its tokens. The scores add up to the difference of both logits.
        error: the difference between that and the sum of the scores: the integral is a sum of few steps.
    """

    tokens: list[str]
    scores: list[float]
    target: int
    label: str
    output: float
    baseline: float
    error: float


def token_attributions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    target: int | None = None,
    steps: int = 50,
) -> Attributions:
    """Attribute a logit to the tokens of `text`: that of a class, of the masked token, or of the next token.

    The path of integration starts at a text with padding in place of every token that is not special, or with zeros if
    the tokenizer has no padding token.

    Args:
        model: a FastformerForSequenceClassification, FastformerForMaskedLM, FastformerForPreTraining or
            FastformerForCausalLM, in evaluation mode.
        tokenizer: the model's tokenizer.
        text: the text; for a masked language model, with exactly one mask token.
        target: the class, or the token's id, whose logit is explained; None for the most likely one.
        steps: the number of steps of the integral.

    Raises:
        ValueError, IndexError: an argument is not accepted; the message names it.
        ModuleNotFoundError: captum is not installed.
    """
    require("captum")
    from captum.attr import IntegratedGradients

    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout; call model.eval()")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more; got {steps}")
    encoded = encode(model, tokenizer, text)
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    logits_of = _logits(model, tokenizer, ids)

    def forward(embeddings: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        arguments = {} if types is None else {"token_type_ids": types}
        return logits_of(model(inputs_embeds=embeddings, **arguments))

    embeddings = model.base_model.embeddings
    assert isinstance(embeddings, TransformerEmbedding)
    words = embeddings.words
    with torch.no_grad():
        given = words(ids)
        baseline = _baseline(words, tokenizer, ids)
        extra = () if types is None else (types,)
        output, without = forward(given, *extra)[0], forward(baseline, *extra)[0]
    target = int(output.argmax()) if target is None else target
    if not 0 <= target < len(output):
        raise IndexError(f"target must be from 0 to {len(output) - 1}; got {target}")
    gradients = IntegratedGradients(forward).attribute(
        given,
        baseline,
        target=target,
        additional_forward_args=extra or None,
        n_steps=steps,
        internal_batch_size=min(steps, STEPS_AT_ONCE),
    )
    scores = gradients.sum(-1)[0]
    names: dict[Any, str] | None = None
    if isinstance(model, FastformerForSequenceClassification):
        names = model.config.id2label
    label = names[target] if names else token_names(tokenizer, torch.tensor([target]))[0]
    return Attributions(
        tokens=token_names(tokenizer, ids[0]),
        scores=scores.tolist(),
        target=target,
        label=label,
        output=output[target].item(),
        baseline=without[target].item(),
        error=(scores.sum() - (output - without)[target]).abs().item(),
    )


def draw_attributions(attributions: Attributions, path: Path) -> None:
    """Write a picture of `attributions` to `path`, as PNG: a bar for each token, in the order of the text."""
    from matplotlib.figure import Figure

    tokens, scores = attributions.tokens, attributions.scores
    figure = Figure(figsize=(6, min(600.0, 1.2 + 0.2 * len(tokens))), dpi=100, layout="constrained")
    axis = figure.subplots()
    # Okabe and Ito's palette, which colour-blind readers can distinguish.
    axis.barh(range(len(tokens)), scores, color=["#0072B2" if score >= 0 else "#D55E00" for score in scores])
    axis.set_yticks(range(len(tokens)), tokens, fontsize=8, parse_math=False)
    axis.set_ylim(len(tokens) - 0.4, -0.6)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_xlabel("added to the logit")
    axis.set_title(f"{attributions.label}: logit {attributions.output:.2f}", fontsize=9, parse_math=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """A function that takes the logits to explain, (batch, classes), out of the model's output for `ids`."""
    if isinstance(model, FastformerForSequenceClassification):
        return lambda output: output.logits
    if isinstance(model, FastformerForCausalLM):
        return lambda output: output.logits[:, -1]
    if not isinstance(model, (FastformerForMaskedLM, FastformerForPreTraining)):
        raise ValueError(
            "model must be a FastformerForSequenceClassification, FastformerForMaskedLM, FastformerForPreTraining or "
            f"FastformerForCausalLM; got {type(model).__name__}"
        )
    masked = (ids[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if len(masked) != 1:
        raise ValueError(f"text must have one {tokenizer.mask_token}, whose prediction is explained; got {len(masked)}")
    field = "logits" if isinstance(model, FastformerForMaskedLM) else "prediction_logits"
    return lambda output: output[field][:, masked[0]]


def _baseline(
    words: Callable[[torch.Tensor], torch.Tensor], tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor
) -> torch.Tensor:
    """Word embeddings of an empty text: only the special tokens stay; the others become padding, or zeros."""
    special = torch.tensor([token in tokenizer.all_special_ids for token in ids[0].tolist()], device=ids.device)
    if tokenizer.pad_token_id is not None:
        return words(ids.where(special, tokenizer.pad_token_id))
    return words(ids) * special[None, :, None]
