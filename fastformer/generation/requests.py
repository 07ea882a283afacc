"""Requests, their results, and the state of a running sequence on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastformer.generation.parameters import SamplingParameters
from fastformer.generation.text import TextStream


class Request(NamedTuple):
    """A request to generate one sequence.

    Attributes:
        number: the number of its prompt in the call, from 0.
        prompt: the tokens to continue; for an encoder-decoder, its start token.
        source: the tokens of an encoder-decoder's source.
        parameters: how the sequence is continued.
        end_tokens: tokens that end the sequence.
        seed: the seed of its draws.
    """

    number: int
    prompt: Sequence[int]
    source: Sequence[int] | None
    parameters: SamplingParameters
    end_tokens: frozenset[int]
    seed: int

    @property
    def most_cached(self) -> int:
        """The most tokens that the sequence has in a cache: its last token is never read again."""
        return len(self.prompt) + self.parameters.max_new_tokens - 1


class Piece(NamedTuple):
    """The tokens and text that a step added to a sequence.

    Attributes:
        request: the number of its prompt, from 0.
        tokens: the new tokens.
        text: the text that can no longer change; empty without a tokenizer.
        logprobs: the log-probabilities of the tokens, if requested.
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
        tokens: the new tokens, including the one that ended the sequence.
        text: the new text, before the stop string and without special tokens; None without a tokenizer. It continues
            the prompt: prompt and text together are the whole text.
        finish_reason: "eos", "stop" (a stop string) or "length".
        logprobs: the log-probabilities of the tokens, if requested.
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    logprobs: list[float] | None = None

    def add(self, piece: Piece) -> None:
        """Append the next piece."""
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason
        if self.text is not None:
            self.text += piece.text
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs


def collected(pieces: Iterable[Piece], prompts: int, text: bool = True) -> list[Generation]:
    """Put the pieces of `prompts` prompts together, each prompt's in order; without text if there is no tokenizer."""
    generations = [Generation(text="" if text else None) for _ in range(prompts)]
    for piece in pieces:
        generations[piece.request].add(piece)
    return generations


@dataclass
class Running:
    """A running sequence, which has a slot."""

    request: Request
    text: TextStream | None
    generated: int = 0

    def take(self, tokens: list[int], logprobs: list[float]) -> Piece:
        """Make a piece of the new tokens, without tokens after the sequence's end."""
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
