"""Settings of how a sequence is continued: how tokens are drawn, and when the sequence ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

_WHOLE, _NUMBER = (Integral, "a whole number"), (Real, "a number")
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("max_new_tokens", "top_k", "seed"), _WHOLE),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER),
    "stop": (Sequence, "a sequence of strings"),
    "eos_token_ids": (Sequence, "a sequence of token numbers"),
    "logprobs": (bool, "true or false"),
}


@dataclass(frozen=True)
class SamplingParameters:
    """Settings of how one sequence is continued. By default the likeliest token is taken each time (greedy).

    Filters apply in this order: repetition penalty, temperature, `top_k`, `top_p`, `min_p`. Tokens of equal probability
    are all kept or all left out.

    Args:
        max_new_tokens: the most tokens to generate.
        temperature: divides the logits before they become probabilities, 1e-6 or more; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751).
        min_p: draw from the tokens with at least this fraction of the likeliest one's probability (Nguyen et al. 2024,
            https://arxiv.org/abs/2407.01082).
        repetition_penalty: divides positive logits of tokens in prompt and continuation and multiplies negative ones
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858); for an encoder-decoder, only of tokens in its
            output.
        seed: the seed of this sequence's draws, which depend on nothing else, not even on its batch. None draws a seed.
        stop: strings that end the sequence when they appear in its text; the text is cut before them. Needs a
            tokenizer.
        eos_token_ids: tokens that end the sequence and are its last token; None for the model's own.
        logprobs: whether to return the log-probability of each token under the unchanged model, before any filter.

    Raises:
        ValueError: a value is out of range, or has no effect.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    eos_token_ids: Sequence[int] | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, accepted = _KINDS[field.name]
            value = getattr(self, field.name)
            may_be = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not may_be and (value is not None or field.default is not None):
                raise ValueError(f"{field.name} must be {accepted}; got {value!r}")
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature == 0.0 or 1e-6 <= self.temperature < float("inf"), "0, or 1e-6 or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more, or None"),
            "top_p": (self.top_p is None or 0.0 < self.top_p <= 1.0, "in (0, 1], or None"),
            "min_p": (self.min_p is None or 0.0 <= self.min_p <= 1.0, "in [0, 1], or None"),
            "repetition_penalty": (0.0 < self.repetition_penalty < float("inf"), "positive"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63), or None"),
            "stop": (
                not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop),
                "a sequence of strings, none of them empty",
            ),
            "eos_token_ids": (
                all(isinstance(token, Integral) and token >= 0 for token in self.eos_token_ids or ()),
                "a sequence of token numbers, or None",
            ),
        }
        for name, (holds, accepted) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {accepted}; got {getattr(self, name)!r}")
        if self.temperature == 0.0:
            for name in ("top_k", "top_p", "min_p", "seed"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect at temperature 0; got {getattr(self, name)!r}")
