"""Run outside the interpreter: prints the kernels of steps that a CUDA graph records, which must not use the host.

The steps run as on a GPU, up to the launches, on meta tensors, whose values nobody knows.
"""

import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from recorded_graphs import nothing_on_the_host

from fastformer.generation import Generator, SamplingParameters, generator
from fastformer.generation.batch import ContinuousBatch, NewTokens
from fastformer.generation.requests import Request
from fastformer.inspection.meta_operators import kernels_of_meta_operators
from fastformer.inspection.stand_in import stand_in
from fastformer.models import FastformerConfig, FastformerForCausalLM

SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
PROMPTS = [[5, 6, 7], [4], [8, 9]]
# Every way of drawing.
SAMPLED = SamplingParameters(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, logprobs=True, max_new_tokens=9
)


def decoding(draft: bool, **options: Any) -> list[str]:
    """A step of three sequences, and an empty slot, in a generator with these options."""
    config = FastformerConfig(stack="decoder", position_embedding="rotary", sliding_window=7, **SIZES)
    model = FastformerForCausalLM(config).to("meta", torch.bfloat16).eval()
    kernels: list[str] = []

    def run(key: Any, step: Any) -> torch.Tensor:
        with stand_in("sm_90") as launched, nothing_on_the_host(), kernels_of_meta_operators():
            packed = step()
        kernels.extend(kernel.name for kernel in launched)
        return torch.zeros(packed.shape)

    with (
        patch.object(generator, "why_no_graph", lambda model, device: None),
        patch.object(generator, "CudaRecorder", lambda device: None),
        patch.object(generator.StepGraphs, "run", lambda graphs, key, step: run(key, step)),
        patch.object(ContinuousBatch, "_prefill", prefill),
    ):
        stream = Generator(model, slots=4, draft=model if draft else None, **options).stream(PROMPTS, SAMPLED)
        for _ in range(len(PROMPTS) + 1):
            next(stream)
    return kernels


def prefill(batch: ContinuousBatch, requests: list[Request], first: int) -> NewTokens:
    """Sequences run, their prompts in the cache as far as a step knows."""
    for slot, request in enumerate(requests, first):
        batch.table.admit(slot, request.prompt, request.parameters, request.seed)
    return NewTokens(torch.zeros(len(requests), 1, dtype=torch.int64), None, torch.zeros(len(requests), 1))


print(
    json.dumps(
        {
            "decoding": Counter(decoding(draft=False)),
            "paged decoding": Counter(decoding(draft=False, page_size=16)),
            "speculative decoding": Counter(decoding(draft=True)),
        }
    )
)
