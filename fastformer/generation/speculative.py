"""Speculative decoding: a small model drafts tokens, and the large model checks them all in one step.

Leviathan, Kalman and Matias 2023, "Fast inference from transformers via speculative decoding",
https://arxiv.org/abs/2211.17192. The tokens have exactly the large model's distribution; greedy ones are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.generation.sampling import draw


def verify(
    drafted: Tensor, proposals: Tensor, targets: Tensor, usable: Tensor, acceptance: Tensor, final: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens so that the result has the distribution of `targets` (algorithm 1 of the paper).

    A token is accepted with probability ``min(1, target / proposal)``. The first rejected token is drawn again from
    ``max(target - proposal, 0)``. After a fully accepted draft one more token is drawn from the target.

    Args:
        drafted: (rows, drafted) int64, drawn from `proposals`.
        proposals: (rows, drafted, classes), the small model's probabilities at each place.
        targets: (rows, drafted + 1, classes), the large model's probabilities.
        usable: (rows,) the number of drafted tokens that may be accepted; the rest are padding.
        acceptance: (rows, drafted) float64, uniform in [0, 1), to accept tokens.
        final: (rows, drafted + 1) float64, uniform in [0, 1), to draw the last token at each possible place.

    Returns:
        The accepted tokens of each row and one more, (rows, drafted + 1) int64, and their number, (rows,) int64; later
        entries have no meaning.
    """
    count = drafted.shape[1]
    places = torch.arange(count, device=drafted.device)
    proposed, target = (p[:, :count].gather(-1, drafted[..., None]).squeeze(-1) for p in (proposals, targets))
    accepted = (acceptance * proposed < target) & (places < usable[:, None])
    accepts = accepted.long().cumprod(-1).sum(-1)

    rows = torch.arange(len(drafted), device=drafted.device)
    target_there = targets[rows, accepts]
    proposed_there = proposals[rows, accepts.clamp(max=count - 1)]
    above = (target_there - proposed_there).clamp(min=0.0)
    # If rounding leaves nothing to draw from, both distributions are equal.
    rejected = (accepts < usable) & (above.sum(-1) > 0.0)
    last = draw(torch.where(rejected[:, None], above, target_there), final[rows, accepts])
    tokens = torch.cat([drafted, drafted[:, :1]], dim=1).scatter(1, accepts[:, None], last[:, None])
    return tokens, accepts + 1
