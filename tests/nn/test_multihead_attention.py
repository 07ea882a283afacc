"""MultiheadAttention against torch.nn's, driven with the same calls."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fastformer.nn import MultiheadAttention

EMBED, HEADS = 12, 3


def twins(**options) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw_mask(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """PyTorch's mask; the first key is never masked, so that no row is empty (there PyTorch gives NaN)."""
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(shape)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_equals_pytorch_on_the_same_calls(data: st.DataObject) -> None:
    flag = st.booleans()
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    self_attention, batched = data.draw(flag, label="self-attention"), data.draw(flag, label="batched")
    options = {name: data.draw(flag, label=name) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    if not self_attention:
        options |= {"kdim": data.draw(st.sampled_from([EMBED, 5])), "vdim": data.draw(st.sampled_from([EMBED, 7]))}
    batch = data.draw(st.integers(1, 3)) if batched else 1
    queries = data.draw(st.integers(1, 9), label="queries")
    keys = queries if self_attention else data.draw(st.integers(1, 9), label="keys")
    attn_shape = data.draw(st.sampled_from([(queries, keys), (batch * HEADS, queries, keys)]))
    kinds = st.sampled_from(["none", "bool", "float"])
    call = {
        "key_padding_mask": draw_mask(data.draw(kinds), (batch, keys) if batched else (keys,)),
        "attn_mask": draw_mask(data.draw(kinds), attn_shape),
        "need_weights": data.draw(flag, label="need_weights"),
        "average_attn_weights": data.draw(flag, label="average_attn_weights"),
    }
    if data.draw(flag, label="causal"):
        # With the hint PyTorch forgets, on some of its paths, that extra keys may always be attended to.
        extra_keys = options["add_bias_kv"] or options["add_zero_attn"]
        call |= {"attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1), "is_causal": not extra_keys}

    results = []
    modules = twins(**options)
    if self_attention:
        inputs = [torch.randn(batch, queries, EMBED)]
    else:
        inputs = [torch.randn(batch, queries, EMBED), torch.randn(batch, keys, modules[0].kdim)]
        inputs.append(torch.randn(batch, keys, modules[0].vdim))
    if not batched:
        inputs = [x.squeeze(0) for x in inputs]
    elif not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]
    for module in modules:
        leaves = [x.clone().requires_grad_() for x in inputs]
        output, weights = module(*(leaves * 3 if self_attention else leaves), **call)
        output.square().mean().backward()
        gradients = [leaf.grad for leaf in leaves] + [parameter.grad for parameter in module.parameters()]
        results.append((output.detach(), None if weights is None else weights.detach(), gradients))
    torch.testing.assert_close(results[1], results[0])


def test_state_dict_goes_both_ways() -> None:
    for options in ({}, {"kdim": 5, "vdim": 7, "add_bias_kv": True, "bias": False}):
        theirs, ours = twins(**options)
        theirs.load_state_dict(ours.state_dict())
        assert isinstance(ours, torch.nn.MultiheadAttention)


def test_same_seed_same_parameters() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS)
    torch.manual_seed(0)
    torch.testing.assert_close(dict(MultiheadAttention(EMBED, HEADS).state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("need_weights", [False, True])
def test_fully_masked_row_is_the_projection_of_zeros(need_weights: bool) -> None:
    _, module = twins(batch_first=True)
    x = torch.randn(2, 4, EMBED, requires_grad=True)
    padding = torch.tensor([[True] * 4, [False] * 4])
    output, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(output[0], module.out_proj.bias.expand(4, EMBED))
    if need_weights:
        assert torch.equal(weights[0], torch.zeros(4, 4))
    output.sum().backward()
    assert torch.equal(x.grad[0], torch.zeros(4, EMBED))
    assert x.grad[1].isfinite().all() and x.grad[1].abs().sum() > 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_needs_no_mask_and_drops_none(need_weights: bool) -> None:
    _, module = twins(batch_first=True)
    x = torch.randn(2, 5, EMBED)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    bias = torch.randn(5, 5)
    for mask, full in [(None, causal), (bias, bias.masked_fill(causal, float("-inf")))]:
        output, weights = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        expected = module(x, x, x, attn_mask=full, need_weights=need_weights)
        torch.testing.assert_close((output, weights), expected)


def test_a_float_mask_gets_its_gradient() -> None:
    theirs, ours = twins()
    x = torch.randn(5, 2, EMBED)
    gradients = []
    for module in (theirs, ours):
        mask = torch.linspace(-1, 1, 25).view(5, 5).requires_grad_()
        module(x, x, x, attn_mask=mask, need_weights=False)[0].square().mean().backward()
        gradients.append(mask.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_drops_in_training_only(need_weights: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(dropout=0.5, batch_first=True)
    x = torch.randn(4, 6, EMBED)
    expected = theirs.eval()(x, x, x)[0]
    torch.testing.assert_close(ours.eval()(x, x, x, need_weights=need_weights)[0], expected)
    ours.train()
    draws = torch.stack([ours(x, x, x, need_weights=need_weights)[0] for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    # The output is linear in the dropped weights, so dropout leaves its mean; four standard errors and a half.
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 4.5


def test_refuses_what_it_cannot_do() -> None:
    module = MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(2, 4, EMBED)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 4\); got \(2, 3\)"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(4, 4\) or \(6, 4, 4\); got \(4, 3\)"):
        module(x, x, x, attn_mask=torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"attn_mask must be boolean .* or floating .*; got torch.int64"):
        module(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"value must be .*, with 12 features; got shape \(2, 4, 11\)"):
        module(x, x, x[..., 1:])
    with pytest.raises(ValueError, match=r"query must be 3-D .*; got shape \(12,\)"):
        module(x[0, 0], x, x)
    with pytest.raises(ValueError, match=r"the same length; got shapes \(2, 4, 12\), \(2, 4, 12\) and \(2, 3, 12\)"):
        module(x, x, x[:, 1:])
