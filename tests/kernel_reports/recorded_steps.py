"""A program, run without the interpreter, that prints the kernels of steps that a CUDA graph records.

The steps must not use the host. They run as on a GPU, up to the launches, on meta tensors, which have no values.
"""

import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from recorded_graphs import nothing_on_the_host
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from fastformer import models
from fastformer.data.packing import pack, pack_pairs
from fastformer.data.shapes import padded
from fastformer.generation import Generator, SamplingParameters, generator, workspace
from fastformer.generation.batch import ContinuousBatch, NewTokens
from fastformer.generation.requests import Request
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in
from fastformer.models import FastformerConfig, FastformerForCausalLM
from fastformer.training.cuda_graphs import RecordedSteps
from fastformer.training.pretraining import MODULES

SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
PROMPTS = [[5, 6, 7], [4], [8, 9]]
# Every option of sampling.
SAMPLED = SamplingParameters(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, logprobs=True, max_new_tokens=9
)


def decoding(draft: bool, **options: Any) -> list[str]:
    """Return the kernels of a step of three sequences and an empty slot, in a generator with these options."""
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
        patch.object(workspace, "CudaRecorder", lambda device: None),
        patch.object(workspace.StepGraphs, "run", lambda graphs, key, step: run(key, step)),
        patch.object(ContinuousBatch, "_prefill", prefill),
    ):
        stream = Generator(model, slots=4, draft=model if draft else None, **options).stream(PROMPTS, SAMPLED)
        for _ in range(len(PROMPTS) + 1):
            next(stream)
    return kernels


def static_cache(model: Any, masked: bool) -> list[str]:
    """Return the kernels of a step of Hugging Face's generation with a static cache, which is compiled on a GPU."""
    model, cache = model.to("meta", torch.bfloat16).eval(), StaticCache(config=model.config, max_cache_len=64)
    tokens = torch.empty(2, 4, dtype=torch.int64, device="meta")
    mask = torch.empty(2, 4, dtype=torch.int64, device="meta") if masked else None
    positions = torch.empty(2, 1, dtype=torch.int64, device="meta")
    with torch.inference_mode(), stand_in("sm_90") as launched, kernels_of_meta_operators():
        model(tokens[:, :3], past_key_values=cache, use_cache=True)
        launched.clear()
        with nothing_on_the_host():
            model(tokens[:, 3:], mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return [kernel.name for kernel in launched]


def ours(position_embedding: str) -> FastformerForCausalLM:
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7, "num_hidden_layers": 2}
    return FastformerForCausalLM(
        FastformerConfig(**{**SIZES, **layers}, stack="decoder", position_embedding=position_embedding)
    )


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, attn_implementation="fastformer"))


def training(objective: str, **options: Any) -> list[str]:
    """Return the kernels of a step's first batch and of another one, for a model with these options."""
    module = MODULES[objective]()
    stack = module.default_settings.get("stack", "encoder")
    config = FastformerConfig(**{**module.default_settings, "stack": stack, **SIZES, **options})
    module.model = getattr(models, module._architecture())(config).to("meta", torch.bfloat16).train()
    module._trainer = SimpleNamespace(accumulate_grad_batches=2, distributed_sampler_kwargs=None)
    parts = len(module.losses)
    batch = {name: on_meta(value) for name, value in packed(objective).items()}
    steps = RecordedSteps(module, Counting())
    kernels: list[str] = []
    for begins in (True, False):
        counts = torch.empty(parts, device="meta")
        no_autocast = patch.object(torch, "autocast", lambda *arguments, **options: nullcontext())  # meta has none
        with stand_in("sm_90") as launched, nothing_on_the_host(), kernels_of_meta_operators(), no_autocast:
            steps.run(dict(batch), counts, counts, begins)
        kernels.extend(kernel.name for kernel in launched)
    return kernels


class Counting:
    """A recorder that runs every step as it is."""

    def warm_up(self, step: Any) -> Any:
        return step()


def packed(objective: str) -> dict[str, Any]:
    """Return three sequences and padding, in the format of the objective."""
    sequences = [np.arange(1, length) for length in (20, 9, 31)]
    if objective in ("span-corruption", "denoising"):
        batch = dict(pack_pairs(sequences, sequences[::-1], 0))
    else:
        batch = pack(sequences)
        batch["labels"] = torch.arange(len(batch["input_ids"]))
    if objective == "mlm":
        batch |= {"next_sentence_label": torch.ones(3, dtype=torch.int64), "masked_positions": torch.arange(5)}
        batch["labels"][5:] = -100
    batch = padded(batch, 128)
    del batch["real_tokens"]
    return batch


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def prefill(batch: ContinuousBatch, requests: list[Request], first: int) -> NewTokens:
    """Admit the sequences to their slots, as if their prompts were in the cache."""
    for slot, request in enumerate(requests, first):
        batch.table.admit(slot, request.prompt, request.parameters, request.seed)
    return NewTokens(torch.zeros(len(requests), 1, dtype=torch.int64), None, torch.zeros(len(requests), 1))


print(
    json.dumps(
        {
            "decoding": Counter(decoding(draft=False)),
            "paged decoding": Counter(decoding(draft=False, page_size=16)),
            "speculative decoding": Counter(decoding(draft=True)),
            "static cache": Counter(static_cache(ours("rotary"), masked=False)),
            "masked static cache": Counter(static_cache(ours("alibi"), masked=True)),
            "Llama's static cache": Counter(static_cache(llama(), masked=False)),
            "Llama's masked static cache": Counter(static_cache(llama(), masked=True)),
            "mlm": Counter(training("mlm", attention_probs_dropout_prob=0.1)),
            "clm": Counter(training("clm", hidden_dropout_prob=0.1, position_embedding="learned", sliding_window=9)),
            "span-corruption": Counter(training("span-corruption")),
            "denoising": Counter(training("denoising")),
        }
    )
)
