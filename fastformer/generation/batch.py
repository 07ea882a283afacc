"""Continuous batching: in each step, finished sequences make room for waiting ones (Orca, Yu et al. 2022)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastformer.cuda_graphs import StepGraphs
from fastformer.generation.cached_model import CachedModel
from fastformer.generation.requests import Piece, Request, Running
from fastformer.generation.sampling import Settings, choose, distribution, draw, log_probabilities
from fastformer.generation.slots import Slots
from fastformer.generation.speculative import verify
from fastformer.generation.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PREFILLED = 8192
"""The most tokens of prompts and sources that one step takes in, unless it takes in a single prompt."""


class NewTokens(NamedTuple):
    """The new tokens of each sequence of a step.

    Attributes:
        tokens: (sequences, new) int64.
        counts: (sequences,) int64, the number of valid tokens of each sequence; None if all are valid.
        logprobs: (sequences, new) float32; None if no sequence needs them.
    """

    tokens: Tensor
    counts: Tensor | None = None
    logprobs: Tensor | None = None

    def packed(self) -> Tensor:
        """Pack all into (sequences, columns) float64: counts, tokens and, if there are any, log-probabilities."""
        rows, new = self.tokens.shape
        counts = self.tokens.new_full((rows,), new) if self.counts is None else self.counts
        columns = [counts[:, None], self.tokens, *([] if self.logprobs is None else [self.logprobs])]
        return torch.cat([column.double() for column in columns], dim=1)


def on_host(packed: Tensor, new: int) -> list[tuple[list[int], list[float]]]:
    """Read each sequence's tokens, at most `new`, and log-probabilities. Here a step waits for a GPU."""
    return [
        ([int(token) for token in row[1 : 1 + int(row[0])]], row[1 + new : 1 + new + int(row[0])])
        for row in packed.tolist()
    ]


@dataclass
class Statistics:
    """Counts of the work that a batch has done.

    Attributes:
        prompt_tokens, new_tokens: the sums over all sequences.
        steps: passes through the model that continued sequences.
        drafted, accepted: the numbers of tokens in speculative decoding.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


class ContinuousBatch:
    """Waiting requests, and running sequences in the first slots of the caches.

    A step either takes in waiting requests or continues all running sequences, by one token or, with a draft model, by
    up to `draft_tokens` + 1. It waits for a GPU once, for the tokens.
    With `graphs` a step continues a power of two of slots, empty ones too, so that there are few kinds of steps. The
    results of empty slots are discarded.

    Args:
        model: continues the sequences.
        draft: drafts tokens; its cache is as large as the model's.
        draft_tokens: the number of tokens drafted in each step.
        slots: the number of slots in the caches.
        table: the state of the sequences.
        tokenizer: decodes text; None for no text.
        graphs: recorded steps that continue sequences; None to launch every kernel of every step.
    """

    def __init__(
        self,
        model: CachedModel,
        draft: CachedModel | None,
        draft_tokens: int,
        slots: int,
        table: Slots,
        tokenizer: PreTrainedTokenizerBase | None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model, self.draft, self.draft_tokens = model, draft, draft_tokens
        self.slots, self.table, self.tokenizer, self.graphs = slots, table, tokenizer, graphs
        self.statistics = Statistics()
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []

    def submit(self, requests: Iterable[Request]) -> None:
        """Add requests to the end of the queue for slots."""
        self._waiting.extend(requests)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Run one step and return its new pieces; an empty list once all requests are finished."""
        first = len(self._running)
        requests = self._admit()
        if requests:
            new = on_host(self._prefill(requests, first).packed(), 1)
        elif self._running:
            first = 0
            new = self._continue()
        else:
            return []
        pieces = [
            running.take(tokens, logprobs)
            for running, (tokens, logprobs) in zip(self._running[first:], new, strict=True)
        ]
        self.statistics.new_tokens += sum(len(piece.tokens) for piece in pieces)
        for slot in reversed(range(first, len(self._running))):
            if pieces[slot - first].finish_reason is not None:
                self._remove(slot)
        return pieces

    def _admit(self) -> list[Request]:
        """Take waiting requests in order, as long as there is room, and reserve their slots."""
        admitted: list[Request] = []
        tokens = 0
        while self._waiting and len(self._running) < self.slots:
            request = self._waiting[0]
            size = len(request.prompt) + len(request.source or ())
            if not self.model.cache.has_room(request.most_cached) or (admitted and tokens + size > MOST_PREFILLED):
                break
            tokens += size
            for model in self._models():
                model.cache.reserve(len(self._running), request.most_cached)
            admitted.append(self._waiting.popleft())
            self._running.append(Running(request, self._text(request)))
        return admitted

    def _text(self, request: Request) -> TextStream | None:
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer, request.parameters.stop, request.prompt if request.source is None else ())

    def _prefill(self, requests: list[Request], first: int) -> NewTokens:
        prompts = [request.prompt for request in requests]
        sources = [request.source for request in requests if request.source is not None] or None
        logits = self.model.prefill(prompts, first, sources)
        if self.draft is not None:
            self.draft.prefill(prompts, first, sources)
        for slot, request in enumerate(requests, first):
            self.table.admit(slot, request.prompt, request.parameters, request.seed)
        self.statistics.prompt_tokens += sum(map(len, prompts)) + sum(map(len, sources or ()))
        rows = slice(first, first + len(requests))
        return self._sample(logits, rows, self._settings(rows), self._wants_logprobs(rows))

    def _continue(self) -> list[tuple[list[int], list[float]]]:
        """Continue all running sequences and return their new tokens and log-probabilities."""
        running = len(self._running)
        rows = slice(0, running if self.graphs is None else min(1 << (running - 1).bit_length(), self.slots))
        settings, logprobs = self._settings(rows), self._wants_logprobs(rows)

        def step() -> Tensor:
            if self.draft is None:
                return self._decode(rows, settings, logprobs).packed()
            return self._speculate(self.draft, rows, settings, logprobs).packed()

        key = (rows.stop, settings.kind, logprobs)
        packed = step() if self.graphs is None else self.graphs.run(key, step)
        new = on_host(packed[:running], 1 if self.draft is None else self.draft_tokens + 1)
        self.statistics.steps += 1
        if self.draft is not None:
            self.statistics.drafted += sum(self._usable(each) for each in self._running)
            self.statistics.accepted += sum(len(tokens) - 1 for tokens, _ in new)
        return new

    def _decode(self, rows: slice, settings: Settings, logprobs: bool) -> NewTokens:
        counts = self._counts(rows, 1)
        logits = self.model.decode(self.table.last(rows, 1), self.table.lengths[rows], counts)
        return self._sample(logits[:, 0], rows, settings, logprobs, counts)

    def _counts(self, rows: slice, most: int) -> Tensor | None:
        """The number of new tokens for each slot, (rows,) int32: `most`, or 0 if it is empty; None if none is empty."""
        return None if self.graphs is None else (self.table.left(rows).clamp(max=1) * most).int()

    def _sample(
        self, logits: Tensor, rows: slice, settings: Settings, logprobs: bool, counts: Tensor | None = None
    ) -> NewTokens:
        """Draw a token for each of the sequences in `rows` and append it."""
        seen = None if self.table.seen is None else self.table.seen[rows]
        tokens = choose(logits, settings, seen, self.table.draws(rows, 1)[:, 0, 0])
        self.table.append(rows, tokens[:, None], counts)
        found = log_probabilities(logits, tokens)[:, None] if logprobs else None
        return NewTokens(tokens[:, None], counts, found)

    def _speculate(self, draft: CachedModel, rows: slice, settings: Settings, logprobs: bool) -> NewTokens:
        count, table = self.draft_tokens, self.table
        lengths, draws, left = table.lengths[rows], table.draws(rows, count + 1), table.left(rows)
        seen = [None if table.seen is None else table.seen[rows]]

        drafted: list[Tensor] = []
        proposals: list[Tensor] = []
        # The draft's cache may lack the token before the last: an accepted last draft token was never read.
        logits = draft.decode(table.last(rows, 2), lengths - 1, self._counts(rows, 2))[:, -1]
        for place in range(count):
            if place > 0:
                # A sequence that is about to end must not exceed its positions.
                ahead = (left - 1).clamp(max=place).int()
                logits = draft.decode(drafted[-1], lengths + ahead, (left > place).int())[:, 0]
            proposals.append(distribution(logits, settings, seen[-1]))
            drafted.append(draw(proposals[-1], draws[:, place, 0])[:, None])
            last_seen = seen[-1]
            seen.append(None if last_seen is None else last_seen.scatter(1, drafted[-1], True))

        tokens = torch.cat([table.last(rows, 1), *drafted], dim=1)
        logits = self.model.decode(tokens, lengths, left.clamp(max=count + 1).int())
        targets = torch.stack([distribution(logits[:, at], settings, seen[at]) for at in range(count + 1)], dim=1)
        usable = (left - 1).clamp(max=count)
        new, counts = verify(
            tokens[:, 1:], torch.stack(proposals, dim=1), targets, usable, draws[:, :count, 1], draws[:, :, 2]
        )
        counts = torch.minimum(counts, left)  # none for an empty slot
        table.append(rows, new, counts)
        found = log_probabilities(logits.flatten(0, 1), new.flatten()).view_as(new) if logprobs else None
        return NewTokens(new, counts, found)

    def _usable(self, running: Running) -> int:
        """The number of drafted tokens that a sequence can use."""
        return min(self.draft_tokens, running.request.parameters.max_new_tokens - running.generated - 1)

    def _remove(self, slot: int) -> None:
        """Free `slot` and move the last sequence into it, so that running sequences stay together."""
        last = len(self._running) - 1
        for model in self._models():
            model.cache.release(slot)
        if slot != last:
            length = len(self._running[last].request.prompt) + self._running[last].generated
            for model in self._models():
                model.move(last, slot, length)
            self.table.move(last, slot)
            self._running[slot] = self._running[last]
        self.table.clear(slice(last, last + 1))
        self._running.pop()

    def _models(self) -> list[CachedModel]:
        return [self.model] if self.draft is None else [self.model, self.draft]

    def _settings(self, rows: slice) -> Settings:
        return self.table.settings(rows, [running.request.parameters for running in self._running[rows]])

    def _wants_logprobs(self, rows: slice) -> bool:
        return any(running.request.parameters.logprobs for running in self._running[rows])
