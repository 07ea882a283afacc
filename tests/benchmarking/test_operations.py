"""No operator is forgotten, and the work of each operation, from which rates are computed, is right."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fastformer import ops
from fastformer.benchmarking.attention_peers import Attention, comparable, exact_first_heads, of_first_heads, peers
from fastformer.benchmarking.calls import Call, same
from fastformer.benchmarking.lengths import natural_lengths
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.operations import Operation, Sizes, Work
from fastformer.benchmarking.studies import attention, operators
from fastformer.benchmarking.study import Setting

CPU = torch.device("cpu")
SIZES = Sizes(2, 8, 16, 2, 32, 10, 16, torch.float32)


@pytest.mark.parametrize("quick", [False, True])
def test_every_public_operator_is_in_a_study(quick: bool) -> None:
    setting = Setting(CPU, quick)
    names = [case.name for study in (attention, operators) for case in study.cases(setting)]
    assert len(set(names)) == len(names)
    operations = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert operations - set(re.findall(r"\w+", " ".join(names))) == set()


def call(**options: object) -> Attention:
    return replace(Attention(2, 3, 8, 4, torch.float32, CPU, backward=False), **options)  # type: ignore[arg-type]


def test_flop_of_attention_are_those_of_the_pairs_that_may_attend() -> None:
    full = 2 * 2 * (2 * 3) * 8 * 8 * 4  # two products, a multiply and an add, batch x heads, queries x keys, head_dim
    assert call().flop == full
    assert call(backward=True).flop == 3.5 * full
    assert call(causal=True).flop == full / 2
    assert call(lengths=(8, 4)).flop == full * (64 + 16) / 128
    # The first of 8 queries sees one key, all others two.
    assert call(causal=True, window=1).flop == full * 15 / 64


@pytest.mark.parametrize("options", [{"lengths": (5, 8), "packed": True}, {"lengths": (5, 8)}, {"kv_heads": 1}])
def test_peers_of_attention_compute_the_same(options: dict[str, object]) -> None:
    asked = call(backward=True, causal=True, **options)
    here = {name: peer.prepare()() for name, peer in peers(asked, flex=False).items() if not peer.missing(CPU)}
    assert {OURS, "PyTorch eager", "SDPA math", "SDPA flash"} <= set(here)
    same(torch.float32, comparable(asked))(here)


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"bias": True}, {"SDPA math"}),
        ({"relative_bias": True}, {"SDPA math"}),
        ({"relative_bias": True, "sequence": 300}, {"SDPA math"}),  # longer than the biases reach
        ({"sinks": True, "causal": True}, set()),
    ],
)
def test_peers_with_parameters_compute_the_same(options: dict[str, object], others: set[str]) -> None:
    """The gradients of parameters agree too.

    A peer whose parameters have no gradients would differ by the whole gradient.
    """
    asked = call(backward=True, **options)
    here = {name: peer.prepare()() for name, peer in peers(asked, flex=False).items() if not peer.missing(CPU)}
    assert set(here) == {OURS, "PyTorch eager"} | others
    assert all(len(results) == 5 for results in here.values())
    same(torch.float32, comparable(asked))(here)


def test_exact_results_are_of_the_first_heads_and_real_tokens() -> None:
    asked = call(backward=True, causal=True, heads=4, kv_heads=2, lengths=(5, 8), packed=True)
    exact = exact_first_heads(asked)
    assert [tuple(each.shape) for each in exact] == [(13, 2, 4), (13, 2, 4), (13, 1, 4), (13, 1, 4)]
    for name in (OURS, "SDPA flash", "PyTorch eager"):
        found = of_first_heads(asked, peers(asked, flex=False)[name].prepare()())  # type: ignore[arg-type]
        for one, right in zip(found, exact, strict=True):
            torch.testing.assert_close(one, right)
    alibi = call(alibi=True, heads=4, kv_heads=2)  # each head has its own slope
    found = of_first_heads(alibi, peers(alibi, flex=False)[OURS].prepare()())  # type: ignore[arg-type]
    torch.testing.assert_close(found, exact_first_heads(alibi))


def test_results_that_differ_are_an_error() -> None:
    right, wrong = [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.full((3,), 1.001)]
    same(torch.float32)({OURS: right, "peer": right})
    with pytest.raises(AssertionError, match=r"peer, tensor 1: differs from fastformer's by 0\.001"):
        same(torch.float32)({OURS: right, "peer": wrong})
    same(torch.bfloat16)({OURS: right, "peer": wrong})


def test_forward_backward_gives_outputs_and_gradients() -> None:
    x, constant = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    output, gradient = Call(lambda a, b: a * b, [x, constant], [torch.tensor([1.0, 10.0])])()
    assert output.tolist() == [3.0, 8.0] and gradient.tolist() == [3.0, 40.0]
    assert x.grad is None


def test_bytes_are_what_moves_at_least() -> None:
    """A softmax reads and writes once. Its backward reads the output and its gradient, and writes one gradient."""
    elements = SIZES.tokens * SIZES.hidden * 4

    def scale(backward: bool) -> Operation:
        inputs = lambda make: [make.normal(SIZES.tokens, SIZES.hidden, grad=backward)]  # noqa: E731
        return Operation("scale", inputs, torch.sigmoid, torch.sigmoid, backward=backward)

    assert scale(False).least(SIZES) == Work("bytes", 2.0 * elements)
    # Backward moves the input again, the output's gradient, and the input's gradient.
    assert scale(True).least(SIZES) == Work("bytes", 2.0 * elements, 3.0 * elements)


def test_natural_lengths() -> None:
    assert natural_lengths(1, 7) == (7,)
    lengths = natural_lengths(8, 512)
    assert len(lengths) == 8 and lengths[-1] == max(lengths) == 512 and min(lengths) > 0
    assert 0.4 < sum(lengths) / (8 * 512) < 0.7
