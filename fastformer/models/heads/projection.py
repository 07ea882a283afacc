"""The loss of a projection to the vocabulary, whose logits are never all held at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.nn.plain import is_plain_linear
from fastformer.ops.linear_cross_entropy import linear_cross_entropy

IGNORED_LABEL = -100


def projection_loss(projection: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of ``projection(hidden)`` against `labels`, float32.

    `hidden` is (tokens, hidden_size), `labels` (tokens,). A projection replaced by another module is called.
    """
    if not is_plain_linear(projection):
        return F.cross_entropy(projection(hidden).float(), labels, ignore_index=IGNORED_LABEL)
    return linear_cross_entropy(hidden, projection.weight, labels, bias=projection.bias, ignore_index=IGNORED_LABEL)


def next_token_labels(labels: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """`labels` (total_tokens,) of packed sequences moved to the token that predicts them; the last predicts nothing."""
    # An empty sequence's end is the end of the one before it, or -1, the end of all.
    ends = (cu_seqlens[1:] - 1) % labels.shape[0]
    return labels.roll(-1).index_fill(0, ends.long(), IGNORED_LABEL)
