"""Generation of continuations of prompts."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from fastformer.cuda_graphs import why_no_graph
from fastformer.generation.batch import ContinuousBatch, Statistics
from fastformer.generation.cached_model import LanguageModel
from fastformer.generation.packed_linear import can_pack, refresh_packed_weights, with_packed_weights
from fastformer.generation.parameters import SamplingParameters
from fastformer.generation.requests import Generation, Piece, Request, collected
from fastformer.generation.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int]
GREEDY = SamplingParameters()

# Settings of Hugging Face's generation configuration that would change tokens but are ignored, with harmless values.
_NOT_TAKEN_OVER: dict[str, tuple[object, ...]] = {
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "num_beams": (None, 1),
}


class Generator:
    """Continue prompts with a causal or sequence-to-sequence model.

    Sequences run together without padding, each with its own length. One that finishes makes room for the next prompt
    (continuous batching). Keys and values are stored in memory that is allocated once: one piece for each slot or, with
    `page_size`, pages that sequences share. At its start a sequence gets the pages for all tokens it may have, and it
    waits until enough pages are free.

    Args:
        model: in evaluation mode. The end tokens come from its `generation_config`. Other settings there that would
            change the output raise a warning; sampling comes only from `SamplingParameters`.
        tokenizer: needed for prompts that are strings, for text and for stop strings.
        slots: the most sequences at once; 1 if there is only ever one, since weights are then packed differently.
        capacity: the most tokens of a sequence, including its prompt but not its last token, to which nothing attends;
            None for the most that the longest sequence of a call may need.
        page_size: the number of tokens of a page; None for a contiguous cache.
        pages: the number of pages; None for as many as the longest sequence needs in every slot.
        draft: a small model with the same vocabulary that drafts tokens for the model to check (speculative decoding,
            Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). The distribution of the tokens does not change,
            and greedy tokens stay the same.
        draft_tokens: the number of tokens drafted each time.
        pack_weights: keep a second copy of the weights of all linear layers, in the order in which products of `slots`
            rows read them. This is up to three times faster, and only for float32 on a CPU. None: wherever possible.
        cuda_graphs: record the kernels of each kind of decoding step on its second run, and launch them together after
            that, which takes almost no time on the host. None: on a GPU, unless something such as the model's hooks
            prevents it.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.

    >>> model = FastformerForCausalLM.from_pretrained("runs/gpt")
    >>> generator = Generator(model, AutoTokenizer.from_pretrained("runs/gpt"))
    >>> generator.generate(["The capital of France is"], SamplingParameters(max_new_tokens=8))[0].text
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        slots: int = 8,
        capacity: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        draft: LanguageModel | None = None,
        draft_tokens: int = 4,
        pack_weights: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        sizes = {"slots": slots, "capacity": capacity, "page_size": page_size, "pages": pages}
        for name, size in (sizes | {"draft_tokens": draft_tokens}).items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more; got {size}")
        if pages is not None and page_size is None:
            raise ValueError("pages is for a paged cache; give page_size with it")
        _check_model("model", model)
        if page_size is not None and model.config.position_embedding == "relative":
            raise ValueError("page_size must be None with relative positions: attention to pages takes no such bias")
        if draft is not None:
            _check_draft(draft, model)
        packs = [can_pack(each) if pack_weights is None else pack_weights for each in (model, draft) if each]
        if pack_weights and not all(can_pack(each) for each in (model, draft) if each):
            raise ValueError("pack_weights is for models whose parameters are all float32 and on a CPU")
        self.tokenizer = tokenizer
        self.slots, self.capacity, self.page_size, self.pages = slots, capacity, page_size, pages
        self.draft_tokens = draft_tokens
        self.models: list[LanguageModel] = [
            with_packed_weights(each, slots) if packed else each
            for each, packed in zip([each for each in (model, draft) if each], packs, strict=True)
        ]
        self.statistics = Statistics()
        """Counts of the last call's work."""
        self.cuda_graphs = cuda_graphs
        # At most one workspace: that of the stream that ended last. Two threads never take the same one.
        self._unused: deque[Workspace] = deque(maxlen=1)
        self._wants_graphs()
        self._end_tokens = _end_tokens(model)
        _warn_of_what_is_not_taken_over(model)

    def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters | Sequence[SamplingParameters] = GREEDY
    ) -> list[Generation]:
        """Continue each prompt.

        Args:
            prompts: strings or token ids; for an encoder-decoder these are its sources.
            parameters: one for all prompts, or one for each.

        Returns:
            The continuations, in the order of the prompts.

        Raises:
            TypeError, ValueError: a prompt cannot be used. The error is raised before anything is generated. The prompt
                is empty, or with its new tokens it exceeds the model's positions, `capacity` or all pages.
        """
        return collected(self.stream(prompts, parameters), len(prompts), text=self.tokenizer is not None)

    def stream(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters | Sequence[SamplingParameters] = GREEDY
    ) -> Iterator[Piece]:
        """Generate like `generate`, but yield what each step adds to a sequence at once, for any sequence.

        Several streams of a generator may run at a time, even in several threads. Each has its own caches, which the
        next stream reuses after its end.
        """
        requests = self._requests(prompts, parameters)
        if not requests:
            return iter(())
        workspace = self._workspace()
        batch = self._batch(requests, workspace)
        batch.submit(requests)
        self.statistics = batch.statistics
        return self._pieces(batch, workspace)

    def _pieces(self, batch: ContinuousBatch, workspace: Workspace) -> Iterator[Piece]:
        try:
            while pieces := batch.step():
                yield from pieces
        finally:
            self._unused.append(workspace)

    def _workspace(self) -> Workspace:
        """Return a workspace that no stream uses."""
        try:
            return self._unused.pop()
        except IndexError:
            return Workspace(self.models, self.slots, self.page_size, self.pages)

    def _requests(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters | Sequence[SamplingParameters]
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise TypeError("prompts must be a sequence of prompts; got a single string")
        each = [parameters] * len(prompts) if isinstance(parameters, SamplingParameters) else list(parameters)
        if len(each) != len(prompts):
            raise ValueError(f"parameters must be one for all prompts or {len(prompts)}; got {len(each)}")
        return [self._request(*numbered) for numbered in zip(range(len(prompts)), prompts, each, strict=True)]

    def _request(self, index: int, prompt: Prompt, parameters: SamplingParameters) -> Request:
        tokens, source = self._tokens(index, prompt), None
        config = self.models[0].config
        if config.is_encoder_decoder:
            source, tokens = tokens, [self._start_token()]
        if parameters.stop and self.tokenizer is None:
            raise ValueError("stop needs a tokenizer; the generator has none")
        ends = self._end_tokens if parameters.eos_token_ids is None else frozenset(parameters.eos_token_ids)
        # Draw a number: the default generator's own seed would be the same for all prompts.
        seed = int(torch.randint(2**62, (), device="cpu")) if parameters.seed is None else parameters.seed
        request = Request(index, tokens, source, parameters, ends, seed)
        self._check_size(request)
        return request

    def _tokens(self, index: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TypeError(f"prompt {index} is a string, which needs a tokenizer; the generator has none")
            tokens = self.tokenizer(prompt)["input_ids"]
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise ValueError(f"prompt {index} has no tokens")
        size = self.models[0].config.vocab_size
        if not 0 <= min(tokens) <= max(tokens) < size:
            raise ValueError(
                f"prompt {index} must have tokens in [0, vocab_size = {size}); got {min(tokens)} to {max(tokens)}"
            )
        return tokens

    def _start_token(self) -> int:
        config = self.models[0].config
        start = config.decoder_start_token_id
        if start is None:
            raise ValueError("decoder_start_token_id must be set in the model's configuration; got None")
        return start

    def _check_size(self, request: Request) -> None:
        limits = {
            "the model's max_position_embeddings": self.models[0].config.position_limit,
            "the draft model's max_position_embeddings": self.models[-1].config.position_limit,
            "capacity": self.capacity,
            "all pages": None if self.page_size is None or self.pages is None else self.pages * self.page_size,
        }
        for name, limit in limits.items():
            if limit is not None and request.most_cached > limit:
                raise ValueError(
                    f"prompt {request.number} has {len(request.prompt)} tokens and may get "
                    f"{request.parameters.max_new_tokens}, more together than {name}, {limit}, can hold"
                )
        limit = self.models[0].config.position_limit
        if request.source is not None and limit is not None and len(request.source) > limit:
            raise ValueError(
                f"prompt {request.number} has {len(request.source)} tokens, more than the model's "
                f"max_position_embeddings, {limit}"
            )

    def _batch(self, requests: list[Request], workspace: Workspace) -> ContinuousBatch:
        """Make a batch with room for each of the requests."""
        ahead = self.draft_tokens if len(self.models) > 1 else 0
        # An empty slot takes part in steps as if it had two tokens.
        capacity = max(self.capacity or max(request.most_cached for request in requests), 2) + ahead
        source_capacity = max(len(request.source or ()) for request in requests)
        for model in self.models:
            refresh_packed_weights(model)
        cached, *drafts = workspace.caches(capacity, source_capacity)
        table = workspace.table(requests, capacity + 1)
        graphs = workspace.graphs() if self._wants_graphs() else None
        draft = drafts[0] if drafts else None
        return ContinuousBatch(cached, draft, self.draft_tokens, self.slots, table, self.tokenizer, graphs)

    def _wants_graphs(self) -> bool:
        if self.cuda_graphs is False:
            return False
        reason = next(filter(None, (why_no_graph(model, self.models[0].device) for model in self.models)), None)
        if self.cuda_graphs and reason:
            raise ValueError(f"cuda_graphs must be None or False here, since {reason}; got True")
        return reason is None


def _check_model(name: str, model: LanguageModel) -> None:
    if not isinstance(model, LanguageModel):
        raise TypeError(f"{name} must be a FastformerForCausalLM or FastformerForSeq2SeqLM; got {type(model).__name__}")
    if model.training:
        raise ValueError(f"{name} must be in evaluation mode, without dropout: call its eval()")


def _check_draft(draft: LanguageModel, model: LanguageModel) -> None:
    _check_model("draft", draft)
    for name in ("vocab_size", "stack"):
        own, given = getattr(model.config, name), getattr(draft.config, name)
        if own != given:
            raise ValueError(f"draft must have the model's {name}, {own!r}; got {given!r}")
    if draft.device != model.device:
        raise ValueError(f"draft must be on the model's device, {model.device}; got {draft.device}")


def _end_tokens(model: LanguageModel) -> frozenset[int]:
    ends = None if model.generation_config is None else model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _warn_of_what_is_not_taken_over(model: LanguageModel) -> None:
    ignored = [
        name
        for name, without_effect in _NOT_TAKEN_OVER.items()
        if getattr(model.generation_config, name, None) not in without_effect
    ]
    if ignored:
        warnings.warn(
            f"the model's generation_config sets {', '.join(ignored)}, which has no effect here", stacklevel=3
        )
