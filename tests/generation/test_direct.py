"""A step without the operators' calls gives the same result as with them, and is not taken where it would differ."""

import pytest
import torch
from torch.testing import assert_close

from fastformer.generation import cached_model
from fastformer.generation.cached_model import CachedModel
from fastformer.generation.direct import DirectContext, DirectLayerNorm, direct
from fastformer.models import FastformerConfig, FastformerForCausalLM
from fastformer.nn import LayerNorm

pytestmark = pytest.mark.cpu

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11], [12, 13, 14]]


def causal_lm(**options) -> FastformerForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = FastformerConfig(stack="decoder", vocab_size=50, initializer_range=0.4, **sizes, **options)
    return FastformerForCausalLM(config).eval()


def steps(model: FastformerForCausalLM, page_size: int | None = None) -> torch.Tensor:
    """Return the logits of three steps behind the prompts, with the same tokens in each step."""
    with torch.inference_mode():
        pages = None if page_size is None else 20
        cached = CachedModel(model, len(PROMPTS), 12, page_size=page_size, pages=pages)
        for slot in range(len(PROMPTS)):
            cached.cache.reserve(slot, 12)
        cached.prefill(PROMPTS, 0)
        lengths = torch.tensor([len(prompt) for prompt in PROMPTS], dtype=torch.int32)
        tokens = torch.arange(20, 20 + len(PROMPTS))[:, None]
        return torch.stack([cached.decode(tokens, lengths + step) for step in range(3)])


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "pre", "embedding_norm": False},
        {"position_embedding": "rotary", "num_key_value_heads": 2, "norm": "rms"},
        {"sliding_window": 3, "attention_scale": 0.3},
    ],
)
def test_logits_are_those_of_the_operators(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = causal_lm(**options), []

    def watched(context, position_embedding):
        taken.append(direct(context, position_embedding))
        return taken[-1]

    monkeypatch.setattr(cached_model, "direct", watched)
    found = steps(model)
    assert all(isinstance(context, DirectContext) for context in taken)
    monkeypatch.setattr(cached_model, "direct", lambda context, position_embedding: context)
    assert_close(found, steps(model))


@pytest.mark.parametrize("options", [{"position_embedding": "alibi"}, {"position_embedding": "relative"}])
def test_biases_are_the_operators(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def watched(context, position_embedding):
        taken.append(direct(context, position_embedding))
        return taken[-1]

    monkeypatch.setattr(cached_model, "direct", watched)
    steps(causal_lm(**options))
    assert not any(isinstance(context, DirectContext) for context in taken)


def test_norm() -> None:
    norm = LayerNorm(6).eval()
    torch.nn.init.normal_(norm.weight)
    input, residual = torch.randn(2, 3, 6)
    lean = DirectLayerNorm(norm)
    assert_close(lean(input), norm(input))
    assert_close(lean(input, residual=residual), norm(input, residual=residual))
    assert_close(lean(input, residual=residual, return_sum=False), norm(input, residual=residual, return_sum=False))
