"""Relations between an operator's own results hold, which needs no reference.

Where the two sides add the same terms in another order, they differ by the roundings of that sum. Where they do the
same arithmetic, they are equal.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings

import fastformer
from fastformer.ops.attention.attention import attention

few_examples = settings(max_examples=5)


def close(actual: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Fail unless equal up to the order of sums of `terms` float32 terms, as large as the largest result."""
    magnitude = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, atol=4 * terms**0.5 * torch.finfo(torch.float32).eps * magnitude, rtol=0.0
    )


def with_gradients(
    tensors: list[torch.Tensor], grad_output: torch.Tensor, backend: str, **options: Any
) -> list[torch.Tensor]:
    """Return output and gradients of attention."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with fastformer.backend(backend):
        output = attention(*leaves, **options)
        assert isinstance(output, torch.Tensor)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def draw_tensors(data: st.DataObject, queries: int | None = None, keys: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    queries = queries or data.draw(st.integers(1, 40))
    keys = keys or data.draw(st.integers(2, 50))
    return [torch.randn(1, heads, size, 8) for heads, size in ((4, queries), (2, keys), (2, keys))]


@few_examples
@given(data=st.data())
def test_the_order_of_keys_does_not_matter(backend_name: str, data: st.DataObject) -> None:
    query, key, value = draw_tensors(data)
    order = torch.randperm(key.shape[2])
    mask = torch.rand(query.shape[2], key.shape[2]) > 0.3
    grad = torch.randn_like(query)
    plain = with_gradients([query, key, value], grad, backend_name, mask=mask)
    permuted = with_gradients([query, key[:, :, order], value[:, :, order]], grad, backend_name, mask=mask[:, order])
    terms = max(query.shape[2] * 2, key.shape[2])
    close(permuted[0], plain[0], terms)
    close(permuted[1], plain[1], terms)
    close(permuted[2], plain[2][:, :, order], terms)
    close(permuted[3], plain[3][:, :, order], terms)


@pytest.mark.quick
@few_examples
@given(data=st.data())
def test_queries_are_independent(backend_name: str, data: st.DataObject) -> None:
    """A causal sequence cut in two gives the same: the first part's queries see its keys, the second part's see all."""
    size = data.draw(st.integers(2, 45))
    query, key, value = draw_tensors(data, size, size)
    cut = data.draw(st.integers(1, size - 1))
    with fastformer.backend(backend_name):
        whole = attention(query, key, value, causal=True)
        first = attention(query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], causal=True)
        second = attention(query[:, :, cut:], key, value, causal=True)
    close(torch.cat([first, second], 2), whole, size)


@few_examples
@given(data=st.data())
def test_parts_of_the_keys_merge(backend_name: str, data: st.DataObject) -> None:
    tensors = draw_tensors(data)
    keys = tensors[1].shape[2]
    cut = data.draw(st.integers(1, keys - 1))
    with fastformer.backend(backend_name):
        whole, whole_lse = attention(*tensors, return_lse=True)
        parts = [
            attention(tensors[0], tensors[1][:, :, part], tensors[2][:, :, part], return_lse=True)
            for part in (slice(0, cut), slice(cut, keys))
        ]
        merged, lse = fastformer.merge_attention(*(torch.stack(each) for each in zip(*parts, strict=True)))
    close(merged, whole, keys)
    close(lse, whole_lse, keys)


@few_examples
@given(data=st.data())
def test_splits_of_decoding_merge(backend_name: str, data: st.DataObject) -> None:
    query, key, value = draw_tensors(data, data.draw(st.integers(1, 3)), data.draw(st.integers(3, 90)))
    lengths = torch.tensor([key.shape[2]], dtype=torch.int32)
    with fastformer.backend(backend_name):
        whole = attention(query, key, value, causal=True)
        for splits in (1, data.draw(st.integers(2, 9))):
            close(fastformer.decode_attention(query, key, value, lengths=lengths, splits=splits), whole, key.shape[2])


@pytest.mark.quick
@few_examples
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4), causal=st.booleans(), seed=st.integers(0, 99))
def test_packing_is_padding_with_key_lengths(backend_name: str, lengths: list[int], causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    longest = max(max(lengths), 1)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = [torch.randn(len(lengths), 2, longest, 8) for _ in range(3)]
    real = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    packed = [tensor.transpose(1, 2)[real] for tensor in padded]
    with fastformer.backend(backend_name):
        dense = attention(
            *padded, causal=causal, alignment="top_left", key_lengths=torch.tensor(lengths, dtype=torch.int32)
        )
        flat = attention(*packed, causal=causal, cu_seqlens_q=boundaries, max_seqlen_q=longest)
    close(flat, dense.transpose(1, 2)[real], longest)


@few_examples
@given(data=st.data())
def test_a_constant_added_to_all_scores_changes_nothing(backend_name: str, data: st.DataObject) -> None:
    tensors = draw_tensors(data)
    bias = torch.randn(tensors[0].shape[2], tensors[1].shape[2])
    with fastformer.backend(backend_name):
        # A shift by 2 to the 4 leaves the bias 4 bits fewer: an error of 16 roundings.
        close(attention(*tensors, bias=bias + 16.0), attention(*tensors, bias=bias), 16 * tensors[1].shape[2])


@few_examples
@given(data=st.data())
def test_values_are_weighted_linearly(backend_name: str, data: st.DataObject) -> None:
    query, key, value = draw_tensors(data)
    with fastformer.backend(backend_name):
        # Powers of two are exact.
        assert torch.equal(attention(query, key, value * 4.0), attention(query, key, value) * 4.0)
        ones = attention(query, key, torch.ones_like(value))
    close(ones, torch.ones_like(ones), key.shape[2])


@few_examples
@given(data=st.data())
def test_heads_that_share_keys_are_heads_with_their_own(backend_name: str, data: st.DataObject) -> None:
    query, key, value = draw_tensors(data)
    with fastformer.backend(backend_name):
        shared = attention(query, key, value)
        repeated = attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
    if query.is_cuda and backend_name == "torch":
        # The order of cuBLAS's additions depends on the shapes.
        close(shared, repeated, key.shape[2])
    else:
        assert torch.equal(shared, repeated)


def draw_masked(data: st.DataObject) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value of two sequences, and a mask of more than one tile for each head and sequence."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    queries, keys = data.draw(st.integers(1, 12)), data.draw(st.integers(129, 140))
    tensors = [torch.randn(2, heads, size, 8) for heads, size in ((2, queries), (2, keys), (2, keys))]
    mask = torch.rand(2, 2, queries, keys) > 0.5
    mask[data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1)), :, :128] = data.draw(st.booleans())
    return tensors, mask


@settings(max_examples=1)
@given(data=st.data())
def test_a_block_mask_is_its_elements(backend_name: str, data: st.DataObject) -> None:
    tensors, mask = draw_masked(data)
    tensors, mask = [each[:1] for each in tensors], mask[:1]
    grad = torch.randn_like(tensors[0])
    dense, blocks = (
        with_gradients(tensors, grad, backend_name, mask=each) for each in (mask, fastformer.BlockMask.from_mask(mask))
    )
    for a, b in zip(blocks, dense, strict=True):
        close(a, b, mask.shape[-1])


@settings(max_examples=3)
@given(data=st.data())
def test_heads_and_sequences_have_their_own_block_masks(backend_name: str, data: st.DataObject) -> None:
    tensors, mask = draw_masked(data)
    with fastformer.backend(backend_name):
        whole = attention(*tensors, mask=fastformer.BlockMask.from_mask(mask))
        swapped = attention(*(each.flip(1) for each in tensors), mask=fastformer.BlockMask.from_mask(mask.flip(1)))
        alone = attention(*(each[1:] for each in tensors), mask=fastformer.BlockMask.from_mask(mask[1:]))
    close(swapped.flip(1), whole, mask.shape[-1])
    close(alone, whole[1:], mask.shape[-1])


@triton.jit
def more(score, b, h, q, k):
    return score + 16.0


@triton.jit
def same(dscore, score, b, h, q, k):
    return dscore


@triton.jit
def nearer(score, b, h, q, k):
    return score - tl.exp2(-1.0 - h) * tl.abs(q - k)


MORE = fastformer.ScoreMod(more, same, lambda score, b, h, q, k: score + 16.0)
NEARER = fastformer.ScoreMod(nearer, same, lambda score, b, h, q, k: score - 2.0 ** (-1.0 - h) * (q - k).abs())


@settings(max_examples=2)
@given(data=st.data())
def test_a_score_mod_is_what_it_computes(backend_name: str, data: st.DataObject) -> None:
    """One that adds a constant changes nothing. One that makes scores fall with the distance is ALiBi."""
    tensors = draw_tensors(data)
    grad = torch.randn_like(tensors[0])
    plain, alibi = {}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}
    for mod, options in ((MORE, plain), (NEARER, alibi)):
        wanted = with_gradients(tensors, grad, backend_name, alignment="top_left", **options)
        actual = with_gradients(tensors, grad, backend_name, alignment="top_left", score_mod=mod)
        # As for a bias, the sum with 16 is 4 bits coarser.
        terms = 16 * 2 * max(tensors[0].shape[2], tensors[1].shape[2])
        for a, b in zip(actual, wanted, strict=True):
            close(a, b, terms)


def test_no_dropout_is_dropout_of_nothing(backend_name: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, size, 8) for size in (35, 41, 41))
    with fastformer.backend(backend_name):
        plain = attention(query, key, value)
        assert torch.equal(attention(query, key, value, dropout_p=0.0), plain)
        # 2 to the -40 rounds to a threshold of zero: the generator runs, and drops nothing.
        close(attention(query, key, value, dropout_p=2.0**-40), plain, 41)


def dropped(backend_name: str, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the weights that attention's dropout keeps, and the results, with tiles of this size."""
    from fastformer_kernels.attention import launch
    from fastformer_kernels.launch import INTERPRETER

    configuration = launch.AttentionConfiguration(*tiles, 1, 1)
    monkeypatch.setattr(launch, "_INTERPRETER", configuration)
    monkeypatch.setattr("fastformer_kernels.launch._target", INTERPRETER)  # also on a GPU
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 50, 8), torch.randn(1, 2, 45, 8)
    value = torch.eye(45)[None, None].expand(1, 2, 45, 45)
    torch.manual_seed(7)
    return with_gradients([query, key, value], torch.ones(1, 2, 50, 45), backend_name, dropout_p=0.4)


def test_tile_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (dropped("triton", tiles, monkeypatch) for tiles in ((16, 16), (64, 32)))
    assert torch.equal(small[0] == 0, large[0] == 0)
    assert 0.3 < (small[0] == 0).float().mean() < 0.5
    for a, b in zip(small, large, strict=True):
        close(a, b, 100)


def test_backends_drop_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, pytorch = (dropped(name, (32, 16), monkeypatch) for name in ("triton", "torch"))
    assert torch.equal(kernel[0] == 0, pytorch[0] == 0)


def test_a_call_repeats_itself(backend_name: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, size, 8) for size in (50, 45, 45)]
    bias, grad = torch.randn(1, 1, 50, 45), torch.randn(1, 2, 50, 8)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(with_gradients(tensors, grad, backend_name, bias=bias, dropout_p=0.2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@few_examples
@given(
    rows=st.integers(1, 20),
    columns=st.integers(2, 70),
    seed=st.integers(0, 99),
    name=st.sampled_from(["softmax", "layer_norm", "rms_norm"]),
)
def test_rows_are_independent_and_their_order_does_not_matter(
    backend_name: str, rows: int, columns: int, seed: int, name: str
) -> None:
    torch.manual_seed(seed)
    x, order = torch.randn(rows, columns), torch.randperm(rows)
    extra = () if name == "softmax" else ((columns,),)
    with fastformer.backend(backend_name):
        function = getattr(fastformer, name)
        assert torch.equal(function(x[order], *extra), function(x, *extra)[order])


@few_examples
@given(columns=st.integers(2, 70), seed=st.integers(0, 99), exponent=st.integers(-3, 3))
def test_norms_do_not_see_scale(backend_name: str, columns: int, seed: int, exponent: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4, columns)
    with fastformer.backend(backend_name):
        for function in (fastformer.layer_norm, fastformer.rms_norm):
            # A factor of a power of two, also on eps, leaves the arithmetic the same.
            close(
                function(x * 2.0**exponent, (columns,), eps=4.0**exponent * 1e-5), function(x, (columns,), eps=1e-5), 4
            )
        close(fastformer.layer_norm(x + 1.0, (columns,)), fastformer.layer_norm(x, (columns,)), 16 * columns)


@few_examples
@given(columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_softmax_sums_to_one_and_does_not_see_a_shift(backend_name: str, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, columns)
    with fastformer.backend(backend_name):
        y = fastformer.softmax(x)
        close(y.sum(-1), torch.ones(5), columns)
        close(fastformer.softmax(x + 8.0), y, 16 * columns)
        close(fastformer.log_softmax(x).exp(), y, 16 * columns)


@few_examples
@given(tokens=st.integers(2, 40), seed=st.integers(0, 99))
def test_tokens_are_independent_in_the_feed_forward(backend_name: str, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, up, down = torch.randn(tokens, 12), torch.randn(30, 12), torch.randn(12, 30)
    with fastformer.backend(backend_name):
        whole = fastformer.feed_forward(x, up, down)
        parts = [fastformer.feed_forward(part, up, down) for part in (x[:1], x[1:])]
        # Another order of hidden features changes the order of the sum in the second product.
        order = torch.randperm(30)
        close(fastformer.feed_forward(x, up[order], down[:, order]), whole, 30)
    close(torch.cat(parts), whole, 30)


@few_examples
@given(rows=st.integers(2, 30), classes=st.integers(2, 60), seed=st.integers(0, 99))
def test_losses_of_rows_add_up(backend_name: str, rows: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 8), torch.randn(classes, 8)
    target = torch.randint(0, classes, (rows,))
    with fastformer.backend(backend_name):
        each = fastformer.linear_cross_entropy(x, weight, target, reduction="none")
        close(fastformer.linear_cross_entropy(x, weight, target, reduction="sum"), each.sum(), rows * classes)
        order = torch.randperm(classes)
        place = torch.argsort(order)
        permuted = fastformer.linear_cross_entropy(x, weight[order], place[target], reduction="none")
    close(permuted, each, classes)
