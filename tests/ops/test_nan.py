"""The rule for NaN: a NaN that a row may see makes the row NaN, and one that it may not see has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastformer
import fastformer.nn

NAN, INFINITY = float("nan"), float("inf")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def visible_part(queries: int, keys: int, masked: str) -> tuple[dict[str, Any], Tensor]:
    """Return options of a call that hide keys, and a mask of the keys that each query sees."""
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    distance = column - row - (keys - queries)
    shown = (row * 7 + column * 5) % 3 > 0
    shown[:, 0] = True
    bias = torch.zeros(queries, keys).masked_fill(~shown, -INFINITY)
    table = torch.zeros(2, 2 * keys + 1)
    table[:, keys - 1] = -INFINITY  # the key before a query's own
    everything = torch.ones(queries, keys, dtype=torch.bool)
    cases: dict[str, tuple[dict[str, Any], Tensor]] = {
        "nothing": ({}, everything),
        "causal": ({"causal": True}, distance <= 0),
        "window": ({"window": (1, 0)}, (distance <= 0) & (distance >= -1)),
        "mask": ({"mask": shown}, shown),
        "bias": ({"bias": bias}, shown),
        "relative_bias": ({"relative_bias": table}, distance != -1),
        "chunk": ({"chunk": 2}, column // 2 == (row + keys - queries) // 2),
        "key_lengths": (
            {"key_lengths": torch.tensor([keys - 1], dtype=torch.int32), "alignment": "top_left"},
            column < keys - 1 + 0 * row,
        ),
        "causal, softcap": ({"causal": True, "softcap": 5.0}, distance <= 0),
    }
    return cases[masked]


# The interpreter is slow and gets few sizes.
@pytest.mark.parametrize(
    "strange, keys, backend",
    [(NAN, 3, "torch"), (NAN, 40, "torch"), (INFINITY, 40, "torch"), (NAN, 3, "triton"), (INFINITY, 3, "triton")],
)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize(
    "masked",
    ["nothing", "causal", "window", "mask", "bias", "relative_bias", "chunk", "key_lengths", "causal, softcap"],
)
def test_attention(masked: str, which: str, strange: float, keys: int, backend: str) -> None:
    queries = 3 if keys == 3 else 37
    options, sees = visible_part(queries, keys, masked)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, n, 64) for n in (queries, keys, keys)]
    place = keys - 2 if keys == 40 else 1
    row = min(place, queries - 1)
    place = row if which == "query" else place
    spoilt = [tensor.clone() for tensor in tensors]
    spoilt[["query", "key", "value"].index(which)][0, 0, place, 3] = strange
    affected = torch.zeros(2, queries, dtype=torch.bool)
    affected[0] = sees.any(1) & (torch.arange(queries) == row) if which == "query" else sees[:, place]

    def run(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and the gradients of a loss of the rows that the NaN or infinity must not reach."""
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with fastformer.backend(backend):
            output = fastformer.attention(*leaves, **options, ignore_masked_nan=True)
            assert isinstance(output, Tensor)
            (output[0].masked_fill(affected[..., None], 0.0) ** 2).sum().backward()
        return output.detach()[0], [leaf.grad[0] for leaf in leaves if leaf.grad is not None]

    found, gradients = run(spoilt)
    expected, wanted = run(tensors)
    torch.testing.assert_close(found[~affected], expected[~affected], rtol=2e-5, atol=2e-5)
    if strange != strange:  # an infinite key only takes all of the weight, or none
        columns = found[affected][:, 3] if which == "value" else found[affected]
        assert columns.isnan().all()
    if which == "value":
        assert not found[affected].isfinite().all(-1).any() or not affected.any()
    # The gradients of rows that see it are NaN, and so are those of all keys that these rows see.
    torch.testing.assert_close(gradients[0][~affected], wanted[0][~affected], rtol=2e-4, atol=2e-5)
    spared = ~(affected[:, :, None] & sees).any(1)
    for found_gradient, wanted_gradient in zip(gradients[1:], wanted[1:], strict=True):
        torch.testing.assert_close(found_gradient[spared], wanted_gradient[spared], rtol=2e-4, atol=2e-5)


@BACKENDS
def test_neighbours_of_a_packed_sequence(backend: str) -> None:
    torch.manual_seed(0)
    tensors = torch.randn(3, 9, 2, 64)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    spoilt = tensors.clone()
    spoilt[:, :4] = NAN
    with fastformer.backend(backend):
        found, expected = (
            fastformer.attention(*each, cu_seqlens_q=cu_seqlens, max_seqlen_q=5) for each in (spoilt, tensors)
        )
    assert found[:4].isnan().all()
    torch.testing.assert_close(found[4:], expected[4:])


@pytest.mark.parametrize(
    "queries, keys, backend", [(2, 3, "torch"), (20, 20, "torch"), (300, 300, "torch"), (2, 3, "triton")]
)
def test_a_negative_scale_and_one_that_is_nan(queries: int, keys: int, backend: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 64, requires_grad=True) for n in (queries, keys, keys))
    with fastformer.backend(backend):
        found = fastformer.attention(query, key, value, causal=True, scale=-0.1)
        turned = fastformer.attention(-query, key, value, causal=True, scale=0.1)
        for result in (found, turned):
            result.square().sum().backward()
        torch.testing.assert_close(found, turned, rtol=1e-5, atol=1e-5)
        assert query.grad is not None and query.grad.isfinite().all()
        assert fastformer.attention(query, key, value, scale=NAN).isnan().all()


@pytest.mark.parametrize("dtype, head_dim", [(torch.float64, 16), (torch.float32, 288)])
def test_what_pytorch_computes(dtype: torch.dtype, head_dim: int) -> None:
    """The rule holds where PyTorch computes: in float64, and for heads wider than the operator takes."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, head_dim, dtype=dtype) for n in (3, 5, 5))
    shown = torch.tensor([True] * 4 + [False])
    expected = fastformer.scaled_dot_product_attention(query, key, value, shown)
    for spoilt in (key, value):
        kept = spoilt.clone()
        spoilt[:, :, 4] = NAN
        torch.testing.assert_close(fastformer.scaled_dot_product_attention(query, key, value, shown), expected)
        spoilt.copy_(kept)
    turned = fastformer.scaled_dot_product_attention(-query, key, value, is_causal=True, scale=0.1)
    found = fastformer.scaled_dot_product_attention(query, key, value, is_causal=True, scale=-0.1)
    torch.testing.assert_close(found, turned)
    assert fastformer.scaled_dot_product_attention(query, key, value, scale=NAN).isnan().all()
    query[0, 0, 1, 3] = NAN
    found = fastformer.scaled_dot_product_attention(query, key, value)
    assert found.isnan().any(-1).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("keys, backend", [(6, "torch"), (40, "torch"), (6, "triton")])
def test_scores_that_overflow(keys: int, backend: str) -> None:
    torch.manual_seed(0)
    query, key, value = (1e20 * torch.randn(1, 2, n, 16) for n in (4, keys, keys))
    with fastformer.backend(backend):
        output, lse = fastformer.attention(query, key, value, return_lse=True)
    assert output.isnan().all() and lse.isnan().all()


@BACKENDS
def test_each_head_s_scale(backend: str) -> None:
    def gradient(hidden: float) -> Tensor:
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 1, 2, 3, 16).unbind()
        key[:, :, 2], query[:, :, 1] = hidden, 1.0 if hidden == 1.0 else hidden
        shown = torch.tensor([[True, True, False], [False, False, False], [True, True, False]])
        scale = torch.full((2,), 0.3, requires_grad=True)
        output = fastformer.attention(query, key, value, scale=scale, mask=shown, ignore_masked_nan=True)
        assert isinstance(output, Tensor)
        output.square().sum().backward()
        assert scale.grad is not None
        return scale.grad

    with fastformer.backend(backend):
        torch.testing.assert_close(gradient(NAN), gradient(1.0))


@BACKENDS
def test_a_row_that_sees_nothing_beside_one_that_sees_a_nan(backend: str) -> None:
    query, key = torch.randn(2, 1, 1, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    with fastformer.backend(backend):
        shown = torch.tensor([[True, True], [False, False]])
        found = fastformer.attention(query, key, key * NAN, mask=shown, ignore_masked_nan=True)
        assert isinstance(found, Tensor)
        assert found[0, 0, 0].isnan().all() and not found[0, 0, 1].any()
    lengths = torch.tensor([1], dtype=torch.int32)
    with fastformer.backend("torch"):
        padded = fastformer.decode_attention(query, key, key * NAN, lengths=lengths, query_lengths=lengths)
        assert padded[0, 0, 0].isnan().all() and not padded[0, 0, 1].any()


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("masked", ["causal", "mask", "bias", "window"])
def test_derivatives_of_higher_order(masked: str, which: str) -> None:
    """Higher derivatives of rows that do not see the NaN are right, in forward mode and twice backward."""
    options, sees = visible_part(4, 6, masked)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, n, 8) for n in (4, 6, 6)]
    spoilt = [tensor.clone() for tensor in tensors]
    spoilt[["query", "key", "value"].index(which)][0, :, 4] = NAN
    unaware = ~sees[:, 4]

    def results(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        def rows(q: Tensor) -> Tensor:
            output = fastformer.attention(q, key, value, **options)
            assert isinstance(output, Tensor)
            return output[:, :, unaware]

        tangent = torch.func.jvp(rows, (query,), (query.cos(),))[1]
        leaf = query.clone().requires_grad_()
        (first,) = torch.autograd.grad(rows(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first[:, :, unaware].square().sum(), leaf)
        return [tangent, first.detach()[:, :, unaware], second[:, :, unaware]]

    for found, expected in zip(results(*spoilt), results(*tensors), strict=True):
        torch.testing.assert_close(found, expected)


@BACKENDS
@pytest.mark.parametrize("keys", [3, 40])
def test_decoding(keys: int, backend: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 64) for n in (1, 50, 50))
    lengths = torch.tensor([keys, keys], dtype=torch.int32)
    with fastformer.backend(backend):
        expected = fastformer.decode_attention(query, key, value, lengths=lengths)
        key[:, :, keys:], value[:, :, keys:] = NAN, NAN  # slots that are not written yet
        query[0, 1, 0, 5] = NAN
        found = fastformer.decode_attention(query, key, value, lengths=lengths)
    assert found[0, 1].isnan().all()
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0, 0], expected[0, 0])


def test_decoding_of_several_queries() -> None:
    """A NaN reaches only the queries that see it, on a CPU; on a GPU it reaches all, without ignore_masked_nan."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 64) for n in (3, 9, 9))
    lengths = torch.tensor([9], dtype=torch.int32)
    with fastformer.backend("torch"):
        expected = fastformer.decode_attention(query, key, value, lengths=lengths)
        key[:, :, 8], value[:, :, 8] = NAN, NAN
        found = fastformer.decode_attention(query, key, value, lengths=lengths)
    torch.testing.assert_close(found[:, :, :2], expected[:, :, :2])
    assert found[:, :, 2].isnan().all()


@BACKENDS
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("masked", ["mask", "floating mask", "causal"])
def test_softmax(masked: str, log: bool, backend: str) -> None:
    function = fastformer.log_softmax if log else fastformer.softmax
    shown = torch.ones(6, 6, dtype=torch.bool).tril()
    options: dict[str, Any] = {
        "mask": {"mask": shown},
        "floating mask": {"mask": torch.zeros(6, 6).masked_fill(~shown, -INFINITY)},
        "causal": {"causal": True},
    }[masked]
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    spoilt = x.clone()
    spoilt[1, 4] = spoilt[4, 2] = NAN  # the first is hidden, the second is not
    with fastformer.backend(backend):
        leaf, clean = spoilt.requires_grad_(), x.requires_grad_()
        found, expected = function(leaf, **options), function(clean, **options)
        assert found[4].masked_select(shown[4]).isnan().all()
        others = torch.arange(6) != 4
        torch.testing.assert_close(found[others], expected[others])
        for result in (found, expected):
            result[others].masked_select(shown[others]).square().sum().backward()
    assert leaf.grad is not None and clean.grad is not None
    torch.testing.assert_close(leaf.grad[others], clean.grad[others])


Rows = Callable[[Tensor], Tensor]
torch.manual_seed(0)
WEIGHT, UP, DOWN = torch.randn(16), torch.randn(24, 16), torch.randn(16, 24)
ROWS: dict[str, Rows] = {
    "layer_norm": lambda x: fastformer.layer_norm(x, (16,), WEIGHT, residual=x)[0],
    "rms_norm": lambda x: fastformer.rms_norm(x, (16,), WEIGHT),
    "feed_forward": lambda x: fastformer.feed_forward(x, UP, DOWN),
    "softmax": lambda x: fastformer.softmax(x),
    "cross_entropy": lambda x: fastformer.cross_entropy(x, torch.arange(5), reduction="none", label_smoothing=0.1),
    "linear_cross_entropy": lambda x: fastformer.linear_cross_entropy(x, UP, torch.arange(5), reduction="none"),
}


@BACKENDS
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_its_own(name: str, backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    spoilt = x.clone()
    spoilt[2, 7] = NAN
    others = torch.arange(5) != 2
    with fastformer.backend(backend):
        leaf = spoilt.requires_grad_()
        found, expected = ROWS[name](leaf), ROWS[name](x)
        assert found[2].isnan().all()
        torch.testing.assert_close(found[others], expected[others])
        found[others].square().sum().backward()
    assert leaf.grad is not None and leaf.grad[others].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_row_that_a_loss_ignores(smoothing: float, backend: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 300)
    logits[1] = NAN
    target = torch.tensor([5, -100, 7, 2])
    kept = target >= 0
    with fastformer.backend(backend):
        leaf = logits.requires_grad_()
        loss = fastformer.cross_entropy(leaf, target, label_smoothing=smoothing)
        expected = fastformer.cross_entropy(leaf[kept], target[kept], label_smoothing=smoothing)
        loss.backward()
    torch.testing.assert_close(loss, expected)
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[1].any()


@BACKENDS
@pytest.mark.parametrize("memory_budget", [None, 1 << 20, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_that_a_loss_of_products_ignores(reduction: str, memory_budget: int | None, backend: str) -> None:
    target = torch.tensor([0, -100, 2, 3])

    def gradients(strange: float) -> list[Tensor]:
        torch.manual_seed(0)
        rows, weight, bias = (
            torch.randn(4, 3),
            torch.randn(5, 3, requires_grad=True),
            torch.randn(5, requires_grad=True),
        )
        rows[1] = strange
        rows.requires_grad_()
        options: dict[str, Any] = {"reduction": reduction, "memory_budget": memory_budget}
        loss = fastformer.linear_cross_entropy(rows, weight, target, bias, **options)
        return list(torch.autograd.grad(loss.square().sum(), [rows, weight, bias]))

    with fastformer.backend(backend):
        for strange in (NAN, INFINITY):
            for found, expected in zip(gradients(strange), gradients(0.0), strict=True):
                torch.testing.assert_close(found, expected)


def test_second_derivatives_of_a_loss_that_ignores_a_row() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(4, 5), torch.randn(5, 5, requires_grad=True)
    logits[1] = NAN
    target, leaf = torch.tensor([0, -100, 2, 3]), logits.requires_grad_()
    for loss in (fastformer.cross_entropy(leaf, target), fastformer.linear_cross_entropy(leaf, weight, target)):
        assert isinstance(loss, Tensor)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        assert second.isfinite().all() and not second[1].any() and second[0].any()


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_padded_token_of_a_module_that_drops_weights(need_weights: bool) -> None:
    torch.manual_seed(0)
    module = fastformer.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    tokens, padding = torch.randn(1, 4, 8), torch.tensor([[False, False, False, True]])
    tokens[0, 3] = NAN
    output, _ = module(tokens, tokens, tokens, key_padding_mask=padding, need_weights=need_weights)
    assert output.isnan().any(-1).tolist() == [[False, False, False, True]]


@BACKENDS
def test_a_part_without_keys(backend: str) -> None:
    outputs, lses = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3)
    outputs[0, 1], lses[0, 1] = NAN, -INFINITY
    outputs[0, 2] = NAN
    with fastformer.backend(backend):
        merged, _ = fastformer.merge_attention(outputs, lses)
    torch.testing.assert_close(merged[1], outputs[1, 1])
    assert merged[0].isfinite().all() and merged[2].isnan().all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_number_as_a_mask(dtype: torch.dtype, backend: str) -> None:
    """The smallest number hides a key among others. A row full of it is finite, whether it sees all keys or none."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 16).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    bias = torch.zeros(5, 5, dtype=dtype)
    bias[:4, 3:], bias[4] = torch.finfo(dtype).min, torch.finfo(dtype).min
    with fastformer.backend(backend):
        output = fastformer.attention(*leaves, bias=bias)
        assert isinstance(output, Tensor)
        few = fastformer.attention(query[:, :, :4], key[:, :, :3], value[:, :, :3])
        torch.testing.assert_close(output[:, :, :4], few)
        alone = torch.zeros_like(value[:, :, 0]) if backend == "triton" else value.mean(2)
        torch.testing.assert_close(output[:, :, 4], alone)
        output.square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
