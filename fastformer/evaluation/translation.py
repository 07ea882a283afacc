"""BLEU and chrF of translations, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

from fastformer.evaluation.checks import check_as_many


def translation_metrics(
    predictions: Sequence[str], references: Sequence[str], language: str | None = None
) -> dict[str, float]:
    """Corpus BLEU and chrF, from 0 to 100.

    Post, "A Call for Clarity in Reporting BLEU Scores" (2018); Popović, "chrF" (2015).

    Args:
        language: the language of the references. Chinese (``zh``), Japanese (``ja``) and Korean (``ko``) have no spaces
            between words, or long words, and are compared by characters; all others by sacrebleu's words ("13a").
    """
    import sacrebleu

    check_as_many(predictions, references)
    by_character = (language or "").replace("_", "-").split("-")[0] in ("zh", "ja", "ko")
    tokenizer = {"zh": "zh"}.get((language or "")[:2], "char") if by_character else "13a"
    bleu = sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokenizer)
    chrf = sacrebleu.corpus_chrf(list(predictions), [list(references)])
    return {"bleu": float(bleu.score), "chrf": float(chrf.score)}
