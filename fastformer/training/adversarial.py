"""Adversarial training: a second loss, with the word embeddings moved in the direction that increases the loss most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastformer.ops.packing import packed_sequences


class Losses(NamedTuple):
    """The losses of a batch with its own embeddings and with moved embeddings."""

    clean: torch.Tensor
    adversarial: torch.Tensor


@dataclass(frozen=True)
class Adversary:
    """Move each sequence's word embeddings, taken as one vector x, by r so that the loss L grows.

    fgm: r = epsilon · g / ‖g‖₂ with g = ∇ₓL (Miyato et al., "Adversarial Training Methods for Semi-Supervised Text
    Classification", 2017). pgd: `steps` times r ← Π(r + step_size · g / ‖g‖₂) with g = ∇ᵣL(x + r) and Π the projection
    onto ‖r‖₂ ≤ epsilon (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018).

    Args:
        method: fgm or pgd.
        epsilon: the largest norm of r.
        step_size: length of each step of pgd.
        steps: number of steps of pgd.
        weight: factor of the adversarial loss, which is added to the plain loss.

    Raises:
        ValueError: an argument is out of range.
    """

    method: Literal["fgm", "pgd"] = "fgm"
    epsilon: float = 1.0
    step_size: float = 0.3
    steps: int = 3
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("fgm", "pgd"):
            raise ValueError(f"method must be fgm or pgd; got {self.method!r}")
        for name in ("epsilon", "step_size", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more; got {self.steps}")

    def losses(
        self, embedding: nn.Module, loss: Callable[[], torch.Tensor], cu_seqlens: Sequence[torch.Tensor]
    ) -> Losses:
        """Return the loss of a batch with its own and with moved embeddings; train on ``clean + weight * adversarial``.

        Args:
            embedding: the model's word embedding, which each call of `loss` calls.
            loss: computes the loss of the batch.
            cu_seqlens: the offsets of the sequences in each packed output of `embedding`, in the order of its calls;
                not needed for dense outputs, (batch, sequence, hidden_size).
        """
        clean, points = _at(embedding, loss, None)
        gradients = torch.autograd.grad(clean, points, retain_graph=True)
        moves = [torch.zeros_like(point) for point in points]
        steps, size = (self.steps, self.step_size) if self.method == "pgd" else (1, self.epsilon)
        for step in range(steps):
            if step:
                gradients = torch.autograd.grad(*_at(embedding, loss, moves))
            packings = [*cu_seqlens, *[None] * len(moves)]
            moves = [
                self._projected(move + size * _scaled_to_one(gradient, packing), packing)
                for move, gradient, packing in zip(moves, gradients, packings, strict=False)
            ]
        return Losses(clean, _at(embedding, loss, moves)[0])

    def _projected(self, move: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return move * (self.epsilon / _norms(move, cu_seqlens)).clamp(max=1.0)


def _at(
    embedding: nn.Module, loss: Callable[[], torch.Tensor], moves: list[torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss with moved embeddings, and the moved embeddings."""
    points: list[torch.Tensor] = []

    def move(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        point = output if moves is None else output + moves[len(points)]
        if not point.requires_grad:  # the embedding is frozen
            point = point.detach().requires_grad_()
        points.append(point)
        return point

    handle = embedding.register_forward_hook(move)
    try:
        return loss(), points
    finally:
        handle.remove()


def _scaled_to_one(gradient: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Divide each sequence's gradient by its norm; a zero gradient stays zero."""
    return gradient / _norms(gradient, cu_seqlens).clamp(min=torch.finfo(gradient.dtype).tiny)


def _norms(vectors: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Return the L2 norm of each sequence's vectors together, in a shape that broadcasts over `vectors`."""
    if cu_seqlens is None:
        return vectors.flatten(1).norm(dim=1).view(-1, *[1] * (vectors.dim() - 1))
    sequence = packed_sequences(cu_seqlens, len(vectors))
    squares = vectors.float().square().sum(dim=1)
    sums = squares.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, squares)
    return sums.sqrt()[sequence].unsqueeze(1).to(vectors.dtype)
