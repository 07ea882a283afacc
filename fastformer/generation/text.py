"""Text of a growing sequence of tokens, in pieces, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""The character that a decoder writes for bytes that form no character, or none yet."""
KNOWN_TOKENS = 5


class TextStream:
    """The text of tokens that arrive one by one.

    The pieces together are the decoded tokens, without special ones. A character is held back until its last byte has
    arrived. Text that may become a stop string is held back too.

    Args:
        tokenizer: decodes the tokens.
        stop: the text ends before the first of these strings.
        prompt: tokens that the text continues. Without them the text starts from nothing, and some tokenizers then
            drop its leading space.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped: str | None = None
        """The stop string that ended the text."""
        # Tokens decode differently at the beginning of a text, so new tokens are decoded after a few known ones.
        self._tokens = list(prompt[-KNOWN_TOKENS:])
        self._before, self._decoded = 0, len(self._tokens)
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that can no longer change."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT):
            return ""
        if text:
            self._before = self._decoded
        self._decoded = len(self._tokens)
        return self._until_stop(text)

    def finish(self) -> str:
        """Return the text that was held back, since no more tokens follow."""
        text = "" if self.stopped is not None else self._until_stop(self._new_text())
        text, self._held = text + self._held, ""
        return text

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._before : self._decoded])
        return self._decode(self._tokens[self._before :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        # Cleaning up spaces could change text that has already been returned.
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _until_stop(self, text: str) -> str:
        if not self.stop:
            return text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self.stop if stop in text]
        if found:
            end, self.stopped = min(found)
            self._held = ""
            return text[:end]
        certain = len(text) - max(_overlap(text, stop) for stop in self.stop)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
