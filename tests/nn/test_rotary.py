"""The rotary module keeps its table through conversions, and accepts frequencies of other scalings."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from fastformer.nn import RotaryEmbedding


def test_table_stays_float32_and_out_of_the_state_dict() -> None:
    module = RotaryEmbedding(8, 100)
    cos = module.cos.clone()
    module.to(torch.bfloat16)
    assert module.cos.dtype == module.sin.dtype == torch.float32
    assert torch.equal(module.cos, cos)
    assert module.state_dict() == {}


def test_materialises_from_the_meta_device(device: torch.device) -> None:
    with torch.device("meta"):
        module = RotaryEmbedding(8, 100)
    module.to_empty(device=device)
    assert torch.equal(module.cos, RotaryEmbedding(8, 100).cos)


def test_equals_llama_with_its_scaling() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    torch.manual_seed(0)
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=scaling
    )
    theirs = modeling_llama.LlamaRotaryEmbedding(config)
    ours = RotaryEmbedding(16, 64, frequencies=theirs.inv_freq, magnitude=theirs.attention_scaling)
    query, key = torch.randn(2, 4, 64, 16), torch.randn(2, 2, 64, 16)
    expected = modeling_llama.apply_rotary_pos_emb(query, key, *theirs(query, torch.arange(64)[None]))
    torch.testing.assert_close(ours(query, key), expected, atol=1e-4, rtol=1e-4)


def test_packed_equals_dense() -> None:
    module = RotaryEmbedding(6, 10, interleaved=True)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    dense = module(query, key)
    boundaries = torch.tensor([0, 5, 10], dtype=torch.int32)
    pack = "batch heads tokens dim -> (batch tokens) heads dim"
    packed = module(*(rearrange(tensor, pack) for tensor in (query, key)), cu_seqlens=boundaries)
    for d, p in zip(dense, packed, strict=True):
        torch.testing.assert_close(p, rearrange(d, pack))


def test_refuses_frequencies_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"frequencies must have shape \(4,\); got \(3,\)"):
        RotaryEmbedding(8, 10, frequencies=torch.ones(3))
