"""Turn features into batches, in one of two forms; the argument `form` chooses.

``packed``: sequences end to end without padding, the input of this package's models. ``dense``: sequences padded on
the right, with an attention mask, the input of Hugging Face's models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fastformer.data.labelled.features import Feature, PairFeature, QuestionFeature, SimilarFeature
from fastformer.data.packing import IGNORE_INDEX, pack, pack_pairs

Form = Literal["packed", "dense"]


def collate(features: Sequence[Feature], form: Form, pad_token_id: int) -> dict[str, Any]:
    """Return a batch of single sequences.

    Args:
        features: at least one; either all have labels or none has.
        form: see the module.
        pad_token_id: used in the dense form only.

    Returns:
        Packed: input_ids, position_ids, cu_seqlens, max_seqlen (see `PackedBatch`), and token_type_ids if the tokenizer
        makes them. Dense: input_ids and attention_mask, both (B, T) int64, and likewise token_type_ids. If the features
        have labels: labels, (B,) int64 classes or float32 numbers, or one per token in the shape of input_ids, -100 at
        padding. For questions instead: start_positions and end_positions, (B,) int64, in tokens of the sequence.
    """
    check_form(form)
    sequences = [np.array(feature.input_ids) for feature in features]
    batch = pack(sequences) if form == "packed" else _pad_with_mask(sequences, pad_token_id)
    if features[0].token_type_ids is not None:
        types = [np.array(feature.token_type_ids) for feature in features]
        batch["token_type_ids"] = _join(types, form, 0)
    return {**batch, **_labels(features, form)}


def collate_pairs(
    features: Sequence[PairFeature], form: Form, pad_token_id: int, decoder_start_token_id: int
) -> dict[str, Any]:
    """Return a batch of sources and targets.

    Args:
        features: at least one; either all have targets or none has.
        form: see the module.
        pad_token_id: used in the dense form only.
        decoder_start_token_id: the decoder's first token; in the dense form the model adds it itself.

    Returns:
        Packed: see `PackedPairBatch`. Dense: input_ids, attention_mask and labels, -100 at padding. Without targets,
        only the inputs of the encoder.
    """
    check_form(form)
    sources = [np.array(feature.source) for feature in features]
    targets = [np.array(feature.target) for feature in features if feature.target is not None]
    if targets and len(targets) < len(features):
        raise ValueError(f"{len(targets)} of {len(features)} features have a target; give a target to all or to none")
    if form == "packed":
        return dict(pack_pairs(sources, targets, decoder_start_token_id)) if targets else pack(sources)
    batch = _pad_with_mask(sources, pad_token_id)
    return {**batch, "labels": _join(targets, form, IGNORE_INDEX)} if targets else batch


def collate_similar(features: Sequence[SimilarFeature], form: Form, pad_token_id: int) -> dict[str, dict[str, Any]]:
    """Return the batches "anchor", "positive" and, if every feature has one, "negative"; see `collate`."""
    batches = {
        name: collate([getattr(feature, name) for feature in features], form, pad_token_id)
        for name in ("anchor", "positive")
    }
    negatives = [feature.negative for feature in features if feature.negative is not None]
    if negatives and len(negatives) < len(features):
        raise ValueError(
            f"{len(negatives)} of {len(features)} features have a negative; give a negative to all or to none"
        )
    return {**batches, "negative": collate(negatives, form, pad_token_id)} if negatives else batches


def check_form(form: str) -> None:
    """Raise ValueError unless `form` is packed or dense."""
    if form not in ("packed", "dense"):
        raise ValueError(f"form must be packed or dense, got {form!r}")


def _labels(features: Sequence[Feature], form: Form) -> dict[str, torch.Tensor]:
    first = features[0]
    if isinstance(first, QuestionFeature):
        if first.start is None:
            return {}
        ends = [(feature.start, feature.end) for feature in features if isinstance(feature, QuestionFeature)]
        starts, stops = torch.tensor(ends).unbind(1)
        return {"start_positions": starts, "end_positions": stops}
    labels = [feature.labels for feature in features]
    if all(label is None for label in labels):
        return {}
    if any(label is None for label in labels):
        raise ValueError("some features have labels and others have none; give labels to all or to none")
    if isinstance(labels[0], list):
        return {"labels": _join([np.array(label) for label in labels], form, IGNORE_INDEX)}
    dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
    return {"labels": torch.tensor(labels, dtype=dtype)}


def _join(sequences: Sequence[np.ndarray], form: Form, padding: int) -> torch.Tensor:
    if form == "packed":
        return torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    return _pad(sequences, padding)


def _pad(sequences: Sequence[np.ndarray], padding: int) -> torch.Tensor:
    padded = np.full((len(sequences), max(map(len, sequences))), padding, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(padded)


def _pad_with_mask(sequences: Sequence[np.ndarray], pad_token_id: int) -> dict[str, Any]:
    ones = [np.ones(len(sequence), np.int64) for sequence in sequences]
    return {"input_ids": _pad(sequences, pad_token_id), "attention_mask": _pad(ones, 0)}
