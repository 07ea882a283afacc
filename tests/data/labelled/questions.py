"""Questions about one context of forty lines."""

from __future__ import annotations

from fastformer.data.labelled.examples import Answer, Question

CONTEXT = " ".join(f"The file {n} is of line {n + 100}." for n in range(40))


def question(text: str | None, identity: str = "q") -> Question:
    """Return a question whose answer is the first such text of the context; None for no answer."""
    answers = () if text is None else (Answer(text, CONTEXT.index(text)),)
    return Question(identity, "Which line?", CONTEXT, answers)
