"""A function of the scores, as a user writes one: they shrink with the distance of query and key."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import ScoreMod
from fastformer.backends import HAS_TRITON


def _reference(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * torch.exp2(-0.1 * (q - k).abs()) + h


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward(score, b, h, q, k):
        return score * tl.exp2(-0.1 * tl.abs(q - k).to(tl.float32)) + h

    @triton.jit
    def _backward(dscore, score, b, h, q, k):
        return dscore * tl.exp2(-0.1 * tl.abs(q - k).to(tl.float32))

    DECAY = ScoreMod(_forward, _backward, _reference)
else:
    DECAY = ScoreMod(reference=_reference)
