"""Fast generation: continuous batching over a contiguous or paged cache, sampling, streaming, speculative decoding."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastformer.generation.batch import Statistics
    from fastformer.generation.generator import Generator
    from fastformer.generation.parameters import SamplingParameters
    from fastformer.generation.requests import Generation, Piece

__all__ = ["Generation", "Generator", "Piece", "SamplingParameters", "Statistics"]

_HOMES = {
    "Generation": "fastformer.generation.requests",
    "Generator": "fastformer.generation.generator",
    "Piece": "fastformer.generation.requests",
    "SamplingParameters": "fastformer.generation.parameters",
    "Statistics": "fastformer.generation.batch",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that `fastformer generate --help` needs no model."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastformer.generation' has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(_HOMES[name]), name))
