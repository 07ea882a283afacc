"""Our models work behind Hugging Face's caches without given positions: a token's position follows from the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from fastformer.models import FastformerConfig, FastformerForCausalLM

pytestmark = pytest.mark.cpu

SIZES = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("pieces", [(9,), (5, 1, 1, 1, 1), (3, 4, 2), (1, 8)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("position_embedding", ["learned", "sinusoidal", "rotary", "alibi", "relative"])
def test_pieces_without_positions_are_the_whole(
    position_embedding: str, kind: str, padded: bool, pieces: tuple[int, ...]
) -> None:
    # Attention is far from uniform, and no two positions are alike.
    config = FastformerConfig(
        **SIZES,
        stack="decoder",
        initializer_range=0.5,
        position_embedding=position_embedding,
        max_position_embeddings=16,
    )
    model = FastformerForCausalLM(config).eval()
    tokens = torch.randint(90, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0 if padded else 1
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=12)
    found, start = [], 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        shifted = model(tokens, attention_mask=mask, position_ids=torch.arange(1, 10)[None].expand(2, 9)).logits
        for piece in pieces:
            end = start + piece
            output = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            found.append(output.logits)
            start = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], rtol=0.0, atol=2e-5)
    # Where positions are absolute, a position that is off by one changes the result.
    absolute = position_embedding in ("learned", "sinusoidal")
    assert ((shifted - expected)[0].abs().max() > 1e-3) == absolute
