"""The memory that a stream of sequences works in: caches, the table of the sequences, recorded steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fastformer.cuda_graphs import CudaRecorder, StepGraphs, recorded_state
from fastformer.generation.cached_model import CachedModel, LanguageModel
from fastformer.generation.requests import Request
from fastformer.generation.slots import Slots


class Workspace:
    """The memory of one stream at a time. The next stream reuses it if it is large enough.

    Args:
        models: the model that continues sequences and, if any, a draft model after it.
        slots: the most sequences at once.
        page_size, pages: sizes of paged caches. `page_size` None: contiguous caches. `pages` None: as many as all slots
            may need.
    """

    def __init__(self, models: Sequence[LanguageModel], slots: int, page_size: int | None, pages: int | None) -> None:
        self.models, self.slots, self.page_size, self.pages = models, slots, page_size, pages
        self._cached: list[CachedModel] = []
        self._table: Slots | None = None
        self._graphs: StepGraphs | None = None
        self._recorded: Hashable = None

    def caches(self, capacity: int, source_capacity: int) -> list[CachedModel]:
        """Return the models with empty caches for sequences and sources of these sizes."""
        if not self._cached or not all(model.fits(capacity, source_capacity) for model in self._cached):
            self._cached, self._graphs = [], None  # free the old caches' memory first
            pages = self.pages
            if self.page_size is not None and pages is None:
                pages = self.slots * -(-capacity // self.page_size)
            self._cached = [
                CachedModel(model, self.slots, capacity, source_capacity, self.page_size, pages)
                for model in self.models
            ]
        for cached in self._cached:
            cached.clear()
        return self._cached

    def table(self, requests: Sequence[Request], width: int) -> Slots:
        """Return the table of the sequences, with all slots empty."""
        most_new = max(request.parameters.max_new_tokens for request in requests)
        penalised = any(request.parameters.repetition_penalty != 1.0 for request in requests)
        if self._table is None or not self._table.fits(width, most_new, penalised):
            self._graphs = None
            vocab_size, device = self.models[0].config.vocab_size, self.models[0].device
            self._table = Slots(self.slots, width, most_new, vocab_size, penalised, device)
        self._table.clear()
        return self._table

    def graphs(self) -> StepGraphs:
        """Return the steps recorded in earlier streams; none if they no longer fit the models' state."""
        state = recorded_state(self.models)
        if self._graphs is None or state != self._recorded:
            self._graphs, self._recorded = StepGraphs(CudaRecorder(self.models[0].device)), state
        return self._graphs
