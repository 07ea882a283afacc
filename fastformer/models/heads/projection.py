"""The loss of a projection to the vocabulary, without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.data.packing import IGNORE_INDEX
from fastformer.nn.plain import is_plain_linear
from fastformer.ops.linear_cross_entropy import linear_cross_entropy


def projection_loss(projection: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the float32 mean cross-entropy of ``projection(hidden)`` and `labels`.

    `hidden` is (tokens, hidden_size), `labels` (tokens,). If another module replaces the projection, it is called.
    """
    if not is_plain_linear(projection):
        return F.cross_entropy(projection(hidden).float(), labels, ignore_index=IGNORE_INDEX)
    return linear_cross_entropy(hidden, projection.weight, labels, bias=projection.bias, ignore_index=IGNORE_INDEX)


def next_token_labels(labels: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Move packed `labels` (total_tokens,) to the tokens that predict them; a sequence's last token predicts none."""
    # The end of an empty sequence is the end of the one before it, or -1, which is the end of all tokens.
    ends = (cu_seqlens[1:] - 1) % labels.shape[0]
    return labels.roll(-1).index_fill(0, ends.long(), IGNORE_INDEX)
