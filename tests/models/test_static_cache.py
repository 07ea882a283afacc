"""A step with Hugging Face's static cache is one graph for torch.compile, which records it as a CUDA graph on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from fastformer.models import FastformerConfig, FastformerForCausalLM

pytestmark = pytest.mark.cpu

SIZES = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def ours(**options) -> FastformerForCausalLM:
    return FastformerForCausalLM(FastformerConfig(**{**SIZES, "stack": "decoder", "initializer_range": 0.3, **options}))


MODELS = {
    "rotary": lambda: ours(position_embedding="rotary"),
    "alibi, windows": lambda: ours(
        position_embedding="alibi",
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=5,
    ),
    "relative": lambda: ours(position_embedding="relative", norm="rms"),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, attn_implementation="fastformer")),
}


@pytest.mark.parametrize(
    ("name", "masked"),
    [("rotary", False), ("rotary", True), ("alibi, windows", True), ("relative", True), ("Llama", False)],
)
def test_steps_are_one_graph(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    tokens, steps = torch.randint(90, (2, 9)), 5
    mask = torch.ones_like(tokens)
    if masked:
        mask[1, :2] = 0
    expected = logits(model, model.forward, tokens, mask if masked else None, steps)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    found = logits(model, compiled, tokens, mask if masked else None, steps)
    torch.testing.assert_close(found, expected)
    assert not counters["graph_break"]
    # A cache of windows counts its tokens on the host, and needs a second graph when it is full.
    assert counters["stats"]["unique_graphs"] == (2 if "windows" in name else 1)


def logits(
    model: PreTrainedModel, forward, tokens: torch.Tensor, mask: torch.Tensor | None, steps: int
) -> list[torch.Tensor]:
    """Return the logits of the last `steps` tokens, which come one at a time behind the others."""
    cache, prompt = StaticCache(config=model.config, max_cache_len=16), tokens.shape[1] - steps
    real = torch.ones_like(tokens) if mask is None else mask
    positions = (real.cumsum(1) - 1).clamp(min=0)
    found = []
    with torch.no_grad():
        model(
            tokens[:, :prompt],
            attention_mask=None if mask is None else mask[:, :prompt],
            position_ids=positions[:, :prompt],
            past_key_values=cache,
        )
        for place in range(prompt, tokens.shape[1]):
            some = None if mask is None else mask[:, : place + 1]
            if some is not None:
                some = model.create_masks_for_generate(attention_mask=some, past_key_values=cache)
            each = slice(place, place + 1)
            output = forward(
                tokens[:, each], attention_mask=some, position_ids=positions[:, each], past_key_values=cache
            )
            found.append(output.logits)
    return found
