"""Tokens behind those in one of Hugging Face's caches have the positions that they would have without a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForSeq2SeqLM

pytestmark = pytest.mark.cpu

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
}
POSITIONS = {
    "learned": {"position_embedding": "learned"},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "rotary": {"position_embedding": "rotary"},
    "alibi": {"position_embedding": "alibi"},
    "relative": {"position_embedding": "relative", "norm": "rms"},
    "windows": {
        "position_embedding": "learned",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 3,
    },
}
CACHES: dict[str, Callable[[FastformerConfig], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}
PIECES = [(0, 4), (4, 5), (5, 8), (8, 9), (9, 12)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_pieces_without_position_ids(positions: str, cache: str, padded: bool) -> None:
    torch.manual_seed(0)
    model = FastformerForCausalLM(FastformerConfig(stack="decoder", **SIZES, **POSITIONS[positions])).eval()
    tokens = torch.randint(60, (2, 12))
    real = torch.ones_like(tokens)
    if padded:
        real[1, :3] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=real).logits
        places = torch.arange(12)[None]
        for given in (False, True):
            past, found = CACHES[cache](model.config), []
            for start, stop in PIECES:
                own = {"position_ids": places[:, start:stop]} if given else {}
                output = model(tokens[:, start:stop], attention_mask=real[:, :stop], past_key_values=past, **own)
                found.append(output.logits)
            torch.testing.assert_close(torch.cat(found, 1)[real.bool()], expected[real.bool()])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "relative"])
def test_pieces_of_an_encoder_decoder(positions: str, cache: str) -> None:
    torch.manual_seed(0)
    model = FastformerForSeq2SeqLM(FastformerConfig(stack="encoder_decoder", **SIZES, **POSITIONS[positions])).eval()
    source, target = torch.randint(60, (2, 7)), torch.randint(60, (2, 12))
    with torch.no_grad():
        expected = model(source, decoder_input_ids=target).logits
        past = EncoderDecoderCache(*(CACHES[cache](model.config) for _ in range(2)))
        if cache == "static":
            past.cross_attention_cache = StaticCache(config=model.config, max_cache_len=7)
        found = [
            model(source, decoder_input_ids=target[:, start:stop], past_key_values=past).logits
            for start, stop in PIECES
        ]
    torch.testing.assert_close(torch.cat(found, 1), expected)
