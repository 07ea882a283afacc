"""ROUGE of summaries, by rouge-score (Lin, "ROUGE", 2004)."""

from __future__ import annotations

from collections.abc import Sequence

from fastformer.evaluation.checks import check_as_many

_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def summary_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2, -L and -Lsum (a line is a sentence), with stemming, from 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    check_as_many(predictions, references)
    scorer = RougeScorer(list(_KINDS), use_stemmer=True)
    scores = [scorer.score(reference, predicted) for predicted, reference in zip(predictions, references, strict=True)]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in _KINDS}
