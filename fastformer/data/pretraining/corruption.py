"""Corrupt texts as T5 and BART learn to repair them: T5 leaves spans out, BART masks spans (text infilling).

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section
3.1.4; Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training" (2020), section 2.2. All functions depend
only on tokens and a random generator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]


class SpanNoise(NamedTuple):
    """The share of a text that T5's spans cover, and their length.

    Attributes:
        density: share of the tokens that are left out, in (0, 1).
        mean_length: mean number of tokens of a span, at least 1.
    """

    density: float = 0.15
    mean_length: float = 3.0

    def counts(self, length: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of tokens and of spans to leave out of texts of these lengths, each at least one."""
        noise = np.clip(np.rint(self.density * length), 1, np.maximum(length - 1, 1)).astype(np.int64)
        spans = np.rint(noise / self.mean_length).astype(np.int64)
        return noise, np.clip(spans, 1, np.minimum(noise, np.maximum(length - noise, 1)))

    def source_lengths(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each source, with the end token."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1

    def target_lengths(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each target, with the end token."""
        noise, spans = self.counts(length)
        return noise + spans + 1


def corrupt_spans(
    tokens: Tokens, sentinels: Tokens, end: int, noise: SpanNoise, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Replace random spans by one sentinel each; the target is each sentinel followed by the tokens of its span.

    Kept and left-out parts alternate, beginning with a kept part. All divisions into such parts are equally likely.

    Args:
        tokens: (n,) with n at least 1.
        sentinels: ids of the sentinels, at least one for each span.
        end: id that ends source and target.
        noise: the share of tokens to leave out, and the length of spans.
        random: chooses the spans.

    Returns:
        The source and the target.
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
    """Draw `parts` lengths of at least 1 that add up to `total`; all are 0 if the total is 0."""
    if total == 0:
        return np.zeros(parts, np.int64)
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def infill(
    tokens: Tokens, mask: int, random: np.random.Generator, probability: float = 0.3, mean_length: float = 3.0
) -> NDArray[np.int64]:
    """Replace spans, of lengths drawn from a Poisson distribution, by one mask each; length 0 only inserts a mask.

    Exactly ``max(1, round(probability * n))`` of the n tokens are removed, and at most as many masks are added, so the
    result is never longer.
    """
    lost = max(1, round(probability * len(tokens)))
    lengths = random.poisson(mean_length, size=lost + 1)
    lengths[-1] = lost  # the last span may cover all, so that the spans are always long enough together
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
