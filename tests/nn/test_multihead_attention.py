"""MultiheadAttention gives the same as torch.nn's in the same calls."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from accuracy import assert_as_accurate
from einops import rearrange
from hypothesis import given, settings
from twins import causal_mask, draw_mask, outputs_and_gradients, share_parameters

from fastformer.nn import MultiheadAttention

EMBED, HEADS = 12, 3
SPLIT_HEADS = "batch tokens (heads dim) -> batch heads tokens dim"
MERGE_HEADS = "batch heads tokens dim -> batch tokens (heads dim)"


def twins(heads: int = HEADS, **options) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    theirs, ours = (kind(EMBED, heads, **options) for kind in (torch.nn.MultiheadAttention, MultiheadAttention))
    share_parameters(theirs, ours)
    return theirs, ours


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=120)
@given(data=st.data())
def test_equals_pytorch_on_the_same_calls(data: st.DataObject) -> None:
    flag = st.booleans()
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    training, batched = data.draw(flag, label="training"), data.draw(flag, label="batched")
    options = {name: data.draw(flag, label=name) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    # The input of query, key and value: equal numbers are the same tensor.
    order = data.draw(st.sampled_from([(0, 0, 0), (0, 1, 1), (0, 1, 2), (0, 0, 1), (0, 1, 0)]), label="same tensors")
    features = [EMBED, EMBED, EMBED]
    if order == (0, 1, 2):
        features[1:] = (data.draw(st.sampled_from([EMBED, other]), label="features") for other in (5, 7))
        options |= {"kdim": features[1], "vdim": features[2]}
    batch = data.draw(st.integers(1, 3), label="batch") if batched else 1
    queries = data.draw(st.integers(1, 9), label="queries")
    keys = queries if order.count(0) > 1 else data.draw(st.integers(1, 9), label="keys")
    attn_shape = data.draw(st.sampled_from([(queries, keys), (batch * HEADS, queries, keys)]), label="attn_mask shape")
    call = {
        "key_padding_mask": draw_mask(data, "key_padding_mask", (batch, keys) if batched else (keys,)),
        "attn_mask": draw_mask(data, "attn_mask", attn_shape),
        "need_weights": data.draw(flag, label="need_weights"),
        "average_attn_weights": data.draw(flag, label="average_attn_weights"),
    }
    if data.draw(flag, label="causal"):
        # With the hint, some of PyTorch's paths forget that extra keys are visible to every query.
        hint = not (options["add_bias_kv"] or options["add_zero_attn"])
        call |= {"attn_mask": causal_mask(data, "boolean causal mask", queries, keys), "is_causal": hint}
    lengths = [queries, *(queries if order[argument] == 0 else keys for argument in (1, 2))]
    inputs = []
    for index in range(max(order) + 1):
        argument = order.index(index)
        x = torch.randn(batch, lengths[argument], features[argument])
        inputs.append(x.squeeze(0) if not batched else x if options["batch_first"] else x.transpose(0, 1))
    theirs, ours = (module.train(training) for module in twins(dropout=0.0 if training else 0.2, **options))
    expected = outputs_and_gradients(theirs, *inputs, order=order, **call)
    torch.testing.assert_close(outputs_and_gradients(ours, *inputs, order=order, **call), expected)


@pytest.mark.cpu  # a default device is a mode, which disables PyTorch's fast path
@settings(max_examples=30)
@given(data=st.data())
def test_equals_pytorchs_fast_path(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    # The fast path needs an even number of heads, self-attention, no gradients and boolean masks.
    theirs, ours = (module.eval() for module in twins(heads=4, batch_first=True))
    x = torch.randn(2, 6, EMBED)
    padding, mask = torch.rand(2, 6) < 0.4, torch.rand(6, 6) < 0.4
    padding[:, 0] = mask[:, 0] = False
    call = {"need_weights": data.draw(st.booleans()), "average_attn_weights": data.draw(st.booleans())}
    call |= data.draw(st.sampled_from([{}, {"key_padding_mask": padding}, {"attn_mask": mask}]))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, x, x, **call), theirs(x, x, x, **call))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=40)
@given(data=st.data())
def test_rows_with_nothing_to_attend_to_are_zero_and_all_others_pytorchs(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    need_weights = data.draw(st.booleans(), label="need_weights")
    theirs, ours = twins(batch_first=True)
    q, k = torch.randn(3, 4, EMBED), torch.randn(3, 2, EMBED)
    call = {
        "key_padding_mask": draw_mask(data, "key_padding_mask", (3, 2), empty_rows=True),
        "attn_mask": draw_mask(data, "attn_mask", (3 * HEADS, 4, 2), empty_rows=True),
        "average_attn_weights": False,
    }
    _, weights = theirs(q, k, k, **call)
    # Where PyTorch's weights are NaN, ours are zero.
    expected_weights = weights.nan_to_num(0.0)
    value = torch.nn.functional.linear(k, ours.in_proj_weight[-EMBED:], ours.in_proj_bias[-EMBED:])
    attended = expected_weights @ rearrange(value, SPLIT_HEADS, heads=HEADS)
    expected = ours.out_proj(rearrange(attended, MERGE_HEADS))
    output, weights = ours(q, k, k, need_weights=need_weights, **call)
    torch.testing.assert_close(output, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    gradients = outputs_and_gradients(ours, q, k, order=(0, 1, 1), need_weights=need_weights, **call)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_as_accurate_as_pytorch_in_half_precision(dtype: torch.dtype, need_weights: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = (module.to(dtype) for module in twins(batch_first=True))
    exact = copy.deepcopy(theirs).double()
    x, mask = torch.randn(2, 9, EMBED, dtype=dtype), torch.randn(9, 9, dtype=dtype)
    results = [
        outputs_and_gradients(module, x.to(mask.dtype), order=(0, 0, 0), need_weights=need_weights, attn_mask=mask)
        for module, mask in ((ours, mask), (theirs, mask), (exact, mask.double()))
    ]
    for name, actual in results[0].items():
        assert_as_accurate(name, actual, results[1][name], results[2][name])


@pytest.mark.quick
def test_state_dict_goes_both_ways() -> None:
    for options in ({}, {"kdim": 5, "vdim": 7, "add_bias_kv": True, "bias": False}):
        theirs, ours = twins(**options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
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


@pytest.mark.quick
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
    x = torch.randn(1, 6, EMBED)
    expected = theirs.eval()(x, x, x)[0]
    torch.testing.assert_close(ours.eval()(x, x, x, need_weights=need_weights)[0], expected)
    draws, _ = ours.train()(*[x.expand(8000, -1, -1)] * 3, need_weights=need_weights)
    assert not torch.equal(draws[0], draws[1])
    # The output is linear in the dropped weights, so dropout keeps its mean, here within 4.5 standard errors.
    error = (draws.mean(0) - expected[0]).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 4.5


def test_weights_returned_with_dropout_are_those_the_output_was_made_with() -> None:
    _, module = twins(dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, EMBED)
    output, weights = module(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).float().mean() < 0.8
    value = torch.nn.functional.linear(x, module.in_proj_weight[-EMBED:], module.in_proj_bias[-EMBED:])
    attended = weights @ rearrange(value, SPLIT_HEADS, heads=HEADS)
    torch.testing.assert_close(output, module.out_proj(rearrange(attended, MERGE_HEADS)))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_inputs(batch: int, queries: int, keys: int, need_weights: bool) -> None:
    theirs, ours = twins(batch_first=True)
    inputs = torch.randn(batch, queries, EMBED), torch.randn(batch, keys, EMBED)
    call = {"order": (0, 1, 1), "need_weights": need_weights}
    torch.testing.assert_close(
        outputs_and_gradients(ours, *inputs, **call), outputs_and_gradients(theirs, *inputs, **call)
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_without_graph_break(need_weights: bool) -> None:
    _, module = twins(add_bias_kv=True, add_zero_attn=True)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((5, 7), (9, 4)):
        inputs = torch.randn(queries, 2, EMBED), torch.randn(keys, 2, EMBED)
        call = {"key_padding_mask": torch.rand(2, keys) < 0.5, "attn_mask": torch.rand(queries, keys) < 0.5}
        torch.testing.assert_close(
            outputs_and_gradients(compiled, *inputs, order=(0, 1, 1), need_weights=need_weights, **call),
            outputs_and_gradients(module, *inputs, order=(0, 1, 1), need_weights=need_weights, **call),
        )


def test_what_replaces_the_output_projection_is_called() -> None:
    class Negated(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return -super().forward(input)

    _, module = twins(batch_first=True)
    x = torch.randn(2, 4, EMBED)
    expected = -module(x, x, x)[0]
    replacement = Negated(EMBED, EMBED)
    replacement.load_state_dict(module.out_proj.state_dict())
    module.out_proj = replacement
    torch.testing.assert_close(module(x, x, x)[0], expected)


def test_parametrized_input_projection() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    x = torch.randn(4, EMBED)
    results = []
    for module in twins():
        torch.nn.utils.parametrize.register_parametrization(module, "in_proj_weight", Doubled())
        results.append(module(x, x, x))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refuses_what_it_cannot_do() -> None:
    module = MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(2, 4, EMBED)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 4\); got \(2, 3\)"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(4, 4\) or \(6, 4, 4\); got \(4, 3\)"):
        module(x, x, x, attn_mask=torch.zeros(4, 3))
    with pytest.raises(
        TypeError, match=r"attn_mask must be boolean .*, float32, float16 or bfloat16 .*; got torch.int64"
    ):
        module(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"value must be .*, with 12 features; got shape \(2, 4, 11\)"):
        module(x, x, x[..., 1:])
    with pytest.raises(ValueError, match=r"query must be 3-D .*; got shape \(12,\)"):
        module(x[0, 0], x, x)
    with pytest.raises(TypeError, match=r"query must be a dense tensor, .*; got a nested tensor"):
        module(*[torch.nested.nested_tensor([x[0], x[1, :2]])] * 3)
    with pytest.raises(ValueError, match=r"the same length; got shapes \(2, 4, 12\), \(2, 4, 12\) and \(2, 3, 12\)"):
        module(x, x, x[:, 1:])
