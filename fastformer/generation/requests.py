"""What is asked for, what comes back, and what is kept of a sequence on the host while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastformer.generation.parameters import SamplingParameters
from fastformer.generation.text import TextStream


class Request(NamedTuple):
    """A sequence to generate.

    Attributes:
        number: of its prompt among those given, from 0.
        prompt: tokens that are continued: an encoder-decoder's start token.
        source: tokens of an encoder-decoder's source.
        parameters: how to.
        end_tokens: tokens that end it.
        seed: of its draws.
    """

    number: int
    prompt: Sequence[int]
    source: Sequence[int] | None
    parameters: SamplingParameters
    end_tokens: frozenset[int]
    seed: int

    @property
    def most_cached(self) -> int:
        """The most tokens it has in a cache: the last one is never read again."""
        return len(self.prompt) + self.parameters.max_new_tokens - 1


class Piece(NamedTuple):
    """What a step added to a sequence.

    Attributes:
        request: the number of its prompt, from 0.
        tokens: the new tokens.
        text: the text that has become certain, empty without a tokenizer.
        logprobs: of the tokens, if asked for.
        finish_reason: why the sequence is finished, None if it is not: "eos", "stop" (a stop string) or "length".
    """

    request: int
    tokens: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str | None


@dataclass
class Generation:
    """A finished sequence.

    Attributes:
        tokens: the new tokens, with the one that ended it.
        text: the new text, before the stop string and without special tokens; None without a tokenizer. It continues
            the prompt: prompt and text together are the whole text.
        finish_reason: "eos", "stop" (a stop string) or "length".
        logprobs: of the tokens, if asked for.
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    logprobs: list[float] | None = None

    def add(self, piece: Piece) -> None:
        """What came next."""
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason
        if self.text is not None:
            self.text += piece.text
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs


@dataclass
class Running:
    """A sequence that has a slot."""

    request: Request
    text: TextStream | None
    generated: int = 0

    def take(self, tokens: list[int], logprobs: list[float]) -> Piece:
        """The piece that new tokens make, as far as they count: none behind the end of the sequence does."""
        text, reason = "", None
        count = 0
        for count, token in enumerate(tokens, 1):
            ends = token in self.request.end_tokens
            if self.text is not None and not ends:
                text += self.text.push(token)
            reason = self._finish_reason(self.generated + count, ends)
            if reason is not None:
                break
        self.generated += count
        if self.text is not None and reason is not None:
            text += self.text.finish()
        wanted = self.request.parameters.logprobs
        return Piece(self.request.number, tokens[:count], text, logprobs[:count] if wanted else None, reason)

    def _finish_reason(self, generated: int, ends: bool) -> str | None:
        if ends:
            return "eos"
        if self.text is not None and self.text.stopped is not None:
            return "stop"
        return "length" if generated == self.request.parameters.max_new_tokens else None
