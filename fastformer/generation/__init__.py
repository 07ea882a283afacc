"""Fast generation: continuous batching over a contiguous or paged cache, sampling, streaming, speculative decoding."""

from fastformer.generation.batch import Statistics
from fastformer.generation.generator import Generator
from fastformer.generation.parameters import SamplingParameters
from fastformer.generation.requests import Generation, Piece

__all__ = ["Generation", "Generator", "Piece", "SamplingParameters", "Statistics"]
