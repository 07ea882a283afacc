"""What T5 and BART learn to undo: spans left out, text infilling and sentences in another order.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section
3.1.4; Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training" (2020), section 2.2. Pure functions of tokens
and a random generator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]


class SpanNoise(NamedTuple):
    """How much of a text T5's spans cover.

    Attributes:
        density: share of the tokens that are left out, in (0, 1).
        mean_length: of a span, at least 1.
    """

    density: float = 0.15
    mean_length: float = 3.0

    def counts(self, length: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens left out of texts of these lengths, and the spans they are in; at least one of each."""
        noise = np.clip(np.rint(self.density * length), 1, np.maximum(length - 1, 1)).astype(np.int64)
        spans = np.rint(noise / self.mean_length).astype(np.int64)
        return noise, np.clip(spans, 1, np.minimum(noise, np.maximum(length - noise, 1)))

    def source_lengths(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the sources, with the end token."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1

    def target_lengths(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the targets, with the end token."""
        noise, spans = self.counts(length)
        return noise + spans + 1


def corrupt_spans(
    tokens: Tokens, sentinels: Tokens, end: int, noise: SpanNoise, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Replaces random spans by one sentinel each; the target is what was left out, span after span behind its sentinel.

    Kept and left-out stretches alternate, a kept one first, all divisions of the lengths being equally likely.

    Args:
        tokens: (n,) at least one.
        sentinels: ids of the sentinels, as many as there are spans or more.
        end: id that ends source and target.
    """
    lost, spans = (int(count) for count in noise.counts(np.int64(len(tokens))))  # type: ignore[arg-type]
    kept_lengths = _divide(len(tokens) - lost, spans, random)
    lost_lengths = _divide(lost, spans, random)
    lengths = np.stack([kept_lengths, lost_lengths], axis=1).ravel()
    is_lost = np.repeat(np.tile([False, True], spans), lengths)
    before_span = np.cumsum(kept_lengths)
    source = np.insert(tokens[~is_lost].astype(np.int64), before_span, sentinels[:spans])
    target = np.insert(tokens[is_lost].astype(np.int64), np.cumsum(lost_lengths) - lost_lengths, sentinels[:spans])
    return np.append(source, end), np.append(target, end)


def _divide(total: int, parts: int, random: np.random.Generator) -> NDArray[np.int64]:
    """`parts` lengths of at least 1 (0 only where the total is 0) that add up to the total."""
    if total == 0:
        return np.zeros(parts, np.int64)
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def infill(
    tokens: Tokens, mask: int, random: np.random.Generator, probability: float = 0.3, mean_length: float = 3.0
) -> NDArray[np.int64]:
    """Replaces spans of a length drawn from a Poisson distribution by one mask each; one of length 0 is only inserted.

    Exactly ``max(1, round(probability * n))`` of the n tokens go; there are at most as many masks, so that the result
    is never longer.
    """
    lost = max(1, round(probability * len(tokens)))
    lengths = random.poisson(mean_length, size=lost + 1)
    lengths[-1] = lost  # however short those before it are, the spans cover all that is to go
    spans = int(np.searchsorted(np.cumsum(lengths), lost)) + 1
    lengths = lengths[:spans]
    lengths[-1] -= lengths.sum() - lost
    if spans > lost:
        lengths = lengths[lengths > 0]
    random.shuffle(lengths)
    gaps = np.sort(random.integers(0, len(tokens) - lost, size=len(lengths), endpoint=True))
    starts = gaps + np.cumsum(lengths) - lengths
    gone = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.add.at(gone, starts, 1)
    np.add.at(gone, starts + lengths, -1)
    return np.insert(tokens[np.cumsum(gone[:-1]) == 0].astype(np.int64), gaps, mask)
