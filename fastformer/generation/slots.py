"""The state of each running sequence, in tensors that are allocated once, so that a step allocates none of them.

A slot without a sequence looks like one with a finished sequence, so that a step may include it: it may get no more
tokens, it is greedy, and it has valid data to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastformer.generation.devices import on_device
from fastformer.generation.parameters import SamplingParameters
from fastformer.generation.sampling import Settings

DRAWS = 3
"""The number of uniform numbers for each new token: to draw it, to accept it, to draw it again."""


class Slots:
    """The state of the running sequences, which are in the first slots.

    Attributes:
        history: (slots, width) int64, all tokens of each sequence, including its prompt.
        lengths: (slots,) int32, the number of these tokens minus one: the last need not be in the cache yet.
        generated: (slots,) int64, the number of new tokens so far.
        most_new: (slots,) int64, the most new tokens.
        uniforms: (slots, most new tokens, DRAWS) float64 in [0, 1), from each sequence's own seed.
        seen: (slots, vocab_size) boolean, the tokens in `history`; None if no sequence has a repetition penalty.
    """

    def __init__(
        self, slots: int, width: int, most_new: int, vocab_size: int, penalised: bool, device: torch.device
    ) -> None:
        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.history = zeros(slots, width, dtype=torch.int64)
        # 1 for an empty slot, since a draft model reads one token back.
        self.lengths = torch.ones(slots, dtype=torch.int32, device=device)
        self.generated = zeros(slots, dtype=torch.int64)
        self.most_new = zeros(slots, dtype=torch.int64)
        self.uniforms = zeros(slots, most_new, DRAWS, dtype=torch.float64)
        self.seen = zeros(slots, vocab_size, dtype=torch.bool) if penalised else None
        self._numbers = zeros(slots, 4, dtype=torch.float32)
        self._top_k = torch.full((slots,), vocab_size, dtype=torch.int64, device=device)

    def fits(self, width: int, most_new: int, penalised: bool) -> bool:
        """Whether the tensors are large enough for such sequences."""
        has_seen = self.seen is not None or not penalised
        return width <= self.history.shape[1] and most_new <= self.uniforms.shape[1] and has_seen

    def clear(self, slots: slice = slice(None)) -> None:
        """Empty `slots`."""
        self.lengths[slots] = 1
        self.generated[slots] = 0
        self.most_new[slots] = 0
        self._numbers[slots] = 0.0

    def admit(self, slot: int, prompt: Sequence[int], parameters: SamplingParameters, seed: int) -> None:
        """Add a sequence whose prompt is in the cache."""
        device, new = self.history.device, parameters.max_new_tokens
        tokens = on_device(torch.tensor(prompt, device="cpu"), device)
        self.history[slot, : len(prompt)] = tokens
        self.lengths[slot] = len(prompt) - 1
        self.generated[slot] = 0
        self.most_new[slot] = new
        if parameters.temperature > 0.0:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.rand(new, DRAWS, generator=generator, dtype=torch.float64, device="cpu")
            self.uniforms[slot, :new] = on_device(drawn, device)
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, tokens] = True
        numbers = (
            parameters.temperature,
            1.0 if parameters.top_p is None else parameters.top_p,
            parameters.min_p or 0.0,
            parameters.repetition_penalty,
        )
        self._numbers[slot] = on_device(torch.tensor(numbers, device="cpu"), device)
        self._top_k[slot] = min(parameters.top_k or self.vocab_size, self.vocab_size)

    def move(self, source: int, target: int) -> None:
        """Move the sequence in slot `source` to slot `target`."""
        for tensor in (
            self.history,
            self.lengths,
            self.generated,
            self.most_new,
            self.uniforms,
            self.seen,
            self._numbers,
            self._top_k,
        ):
            if tensor is not None:
                tensor[target] = tensor[source]

    def settings(self, rows: slice, parameters: Sequence[SamplingParameters]) -> Settings:
        """Return the settings for `rows`: the first have these `parameters`, the others are empty slots."""
        temperature, top_p, min_p, penalty = self._numbers[rows].unbind(1)
        penalty_or_none = penalty if any(each.repetition_penalty != 1.0 for each in parameters) else None
        if all(each.temperature == 0.0 for each in parameters):
            return Settings(repetition_penalty=penalty_or_none)
        return Settings(
            temperature,
            self._top_k[rows] if any(each.top_k for each in parameters) else None,
            min(1 << (max(each.top_k or 1 for each in parameters) - 1).bit_length(), self.vocab_size),
            top_p if any(each.top_p is not None for each in parameters) else None,
            min_p if any(each.min_p for each in parameters) else None,
            penalty_or_none,
        )

    def left(self, rows: slice) -> Tensor:
        """The number of tokens that the sequences in `rows` may still get, (rows,) int64; 0 for empty slots."""
        return self.most_new[rows] - self.generated[rows]

    def last(self, rows: slice, count: int) -> Tensor:
        """Return the last tokens of the sequences in `rows`, (rows, count)."""
        places = self.lengths[rows, None] + torch.arange(1 - count, 1, device=self.lengths.device)
        return self.history[rows].gather(1, places.long())

    def draws(self, rows: slice, count: int) -> Tensor:
        """Return the uniform numbers of the next `count` tokens of the sequences in `rows`, (rows, count, DRAWS)."""
        places = self.generated[rows, None] + torch.arange(count, device=self.generated.device)
        places = places.clamp(max=self.uniforms.shape[1] - 1)
        return self.uniforms[rows].gather(1, places[..., None].expand(-1, -1, DRAWS))

    def append(self, rows: slice, tokens: Tensor, counts: Tensor | None = None) -> None:
        """Add new tokens (rows, new) to the sequences in `rows`: all, or the first `counts` (rows,) of each."""
        places = self.lengths[rows, None] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        self.history[rows].scatter_(1, places.long(), tokens)
        if counts is None:
            self.lengths[rows].add_(tokens.shape[1])
            self.generated[rows].add_(tokens.shape[1])
        else:
            self.lengths[rows].add_(counts.int())
            self.generated[rows].add_(counts)
            real = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
            tokens = torch.where(real, tokens, tokens[:, :1])
        if self.seen is not None:
            self.seen[rows].scatter_(1, tokens, True)
