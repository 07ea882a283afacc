"""T5's relative-position bias comes from its table, and is never formed for every pair of tokens."""

from __future__ import annotations

import pytest
import torch

from fastformer.ops import attention, relative_position_bias, t5_buckets


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("max_distance", [20, 128])
def test_is_transformers_t5(backend: str, decoder: bool, max_distance: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        num_heads=2,
        is_decoder=decoder,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=max_distance,
    )
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    table = module.relative_attention_bias.weight
    q, k, v = torch.randn(3, 1, 2, 35, 8).unbind()
    full = module.compute_bias(35, 35)
    expected = attention(q, k, v, bias=full, causal=decoder, scale=1.0)
    (wanted,) = torch.autograd.grad(expected.square().sum(), table)
    bias = relative_position_bias(table, t5_buckets(8, max_distance, bidirectional=not decoder), max_distance)
    assert bias.shape == (2, 2 * max_distance + 1)
    actual = attention(q, k, v, relative_bias=bias, causal=decoder, scale=1.0)
    (grad,) = torch.autograd.grad(actual.square().sum(), table)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad, wanted)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"table must have shape \(num_buckets, heads\); got \(3,\)"):
        relative_position_bias(torch.zeros(3), t5_buckets(), 128)
    with pytest.raises(ValueError, match="max_distance must be 0 or more; got -1"):
        relative_position_bias(torch.zeros(32, 2), t5_buckets(), -1)
    with pytest.raises(ValueError, match="num_buckets must leave a bucket"):
        t5_buckets(num_buckets=2)
