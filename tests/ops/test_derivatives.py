"""Derivatives of every kind and operator equal those of the same computation in PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fastformer
from tests import reference

pytestmark = pytest.mark.cpu

Function = Callable[..., Tensor]


class Case(NamedTuple):
    """Our function of tensors, the same function in PyTorch, and the shapes of the tensors."""

    ours: Function
    theirs: Function
    shapes: tuple[tuple[int, ...], ...]


def _attention(**options: Any) -> tuple[Function, Function]:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, lse = fastformer.attention(q, k, v, return_lse=True, **options)
        return torch.cat([output, lse[..., None]], -1)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, lse = reference.attention(q, k, v, **options)
        return torch.cat([output, lse[..., None]], -1)

    return ours, theirs


def _learned_attention() -> tuple[Function, Function]:
    names = ("bias", "relative_bias", "alibi_slopes", "sinks", "scale")

    def ours(q: Tensor, *learned: Tensor) -> Tensor:
        output = fastformer.attention(q, q.sin(), q.cos(), causal=True, **dict(zip(names, learned, strict=True)))
        assert isinstance(output, Tensor)
        return output

    def theirs(q: Tensor, *learned: Tensor) -> Tensor:
        return reference.attention(q, q.sin(), q.cos(), causal=True, **dict(zip(names, learned, strict=True)))[0]

    return ours, theirs


def _packed_attention() -> tuple[Function, Function]:
    bounds = [0, 2, 2, 7, 9]

    def ours(q: Tensor) -> Tensor:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        output = fastformer.attention(q, q[:, :1], q[:, :1].sin(), cu_seqlens_q=cu_seqlens, max_seqlen_q=5, causal=True)
        assert isinstance(output, Tensor)
        return output

    def theirs(q: Tensor) -> Tensor:
        parts = [q[a:b].transpose(0, 1)[None] for a, b in pairwise(bounds) if b > a]
        done = [reference.attention(part, part[:, :1], part[:, :1].sin(), causal=True)[0] for part in parts]
        return torch.cat([part[0].transpose(0, 1) for part in done])

    return ours, theirs


def _layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor) -> Tensor:
    return torch.cat(fastformer.layer_norm(x, (6,), weight, bias, residual=residual, input_bias=input_bias))


def _layer_norm_of_pytorch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor) -> Tensor:
    total = residual + x + input_bias
    return torch.cat([reference.layer_norm(total, weight, bias, 1e-5), total])


TARGET = torch.tensor([2, 0, -100, 5])
CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])


def _cross_entropy(logits: Tensor) -> Tensor:
    return fastformer.cross_entropy(logits, TARGET, CLASS_WEIGHT, label_smoothing=0.1, z_loss=0.01, softcap=3.0)


def _cross_entropy_of_pytorch(logits: Tensor) -> Tensor:
    z = 3.0 * torch.tanh(logits / 3.0)
    weight = CLASS_WEIGHT[TARGET.clamp(min=0)] * (TARGET >= 0)
    loss = F.cross_entropy(z, TARGET, CLASS_WEIGHT.to(z.dtype), label_smoothing=0.1)
    return loss + (0.01 * weight * torch.logsumexp(z, 1).square()).sum() / weight.sum()


def _linear_cross_entropy(reduction: str) -> tuple[Function, Function]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        budget = 2 * 6 * 4  # two rows at a time
        return fastformer.linear_cross_entropy(x, weight, TARGET, bias, reduction=reduction, memory_budget=budget)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), TARGET, reduction=reduction)

    return ours, theirs


def _feed_forward(activation: str, act: Function) -> tuple[Function, Function]:
    def ours(x: Tensor, up: Tensor, down: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return fastformer.feed_forward(x, up, down, bias, None, gate, bias, activation, residual=x)

    def theirs(x: Tensor, up: Tensor, down: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, gate, bias)) * F.linear(x, up, bias), down) + x

    return ours, theirs


IDS = torch.tensor([[1, 4, 0], [1, 2, 4]])


def _embedding(words: Tensor, positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastformer.transformer_embedding(IDS, words, positions, None, weight, bias, padding_idx=0, eps=1e-5)


def _embedding_of_pytorch(words: Tensor, positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.layer_norm(F.embedding(IDS, words, 0) + positions[:3], weight, bias, 1e-5)


def _rotary(x: Tensor) -> Tensor:
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3])
    query, key = fastformer.rotary(x, x.sin(), angles.cos(), angles.sin(), interleaved=True)
    return query + key


def _rotary_of_pytorch(x: Tensor) -> Tensor:
    angles = (torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3])).to(x.dtype)
    turns = torch.polar(torch.ones_like(angles), angles)
    both = torch.view_as_real(torch.view_as_complex((x + x.sin())[..., :4].unflatten(-1, (2, 2)).contiguous()) * turns)
    return torch.cat([both.flatten(-2), (x + x.sin())[..., 4:]], -1)


def _merge(outputs: Tensor, lses: Tensor) -> Tensor:
    output, lse = fastformer.merge_attention(outputs, lses)
    return torch.cat([output, lse[..., None]], -1)


def _merge_of_pytorch(outputs: Tensor, lses: Tensor) -> Tensor:
    output = (outputs * torch.softmax(lses, 0)[..., None]).sum(0)
    return torch.cat([output, torch.logsumexp(lses, 0)[..., None]], -1)


MASK = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
QKV = ((2, 2, 3, 4), (2, 1, 5, 4), (2, 1, 5, 4))
LEARNED = ((1, 2, 3, 4), (1, 2, 3, 3), (2, 5), (2,), (2,), (2,))
FEED_FORWARD = ((3, 4), (6, 4), (4, 6), (6,), (6, 4))
LINEAR = ((4, 3), (6, 3), (6,))
CASES = {
    "softmax": Case(
        lambda x, mask: fastformer.softmax(x, mask=mask, scale=0.5, causal=True),
        lambda x, mask: reference.softmax(x, -1, mask=mask, scale=0.5, causal_offset=1),
        ((2, 3, 4), (3, 4)),
    ),
    "softmax of few": Case(lambda x: fastformer.softmax(x), lambda x: torch.softmax(x, -1), ((3, 4),)),
    "softmax, empty row": Case(
        lambda x: fastformer.softmax(x, 0, mask=MASK.T), lambda x: reference.softmax(x, 0, mask=MASK.T), ((4, 3),)
    ),
    "log_softmax": Case(
        lambda x: fastformer.log_softmax(x, scale=2.0), lambda x: torch.log_softmax(2.0 * x, -1), ((3, 4),)
    ),
    "layer_norm": Case(_layer_norm, _layer_norm_of_pytorch, ((5, 6), (5, 6), (6,), (6,), (6,))),
    "rms_norm": Case(
        lambda x, weight: fastformer.rms_norm(x, (6,), weight),
        lambda x, weight: F.rms_norm(x, (6,), weight, eps=torch.finfo(torch.float32).eps),
        ((2, 3, 6), (6,)),
    ),
    "rotary": Case(_rotary, _rotary_of_pytorch, ((1, 2, 5, 6),)),
    "cross_entropy": Case(_cross_entropy, _cross_entropy_of_pytorch, ((4, 6),)),
    "cross_entropy of rows": Case(
        lambda x: fastformer.cross_entropy(x, TARGET[None], reduction="none", label_smoothing=0.2),
        lambda x: F.cross_entropy(x, TARGET[None], reduction="none", label_smoothing=0.2),
        ((1, 6, 4),),
    ),
    "linear_cross_entropy": Case(*_linear_cross_entropy("mean"), LINEAR),
    "linear_cross_entropy, sum": Case(*_linear_cross_entropy("sum"), LINEAR),
    "linear_cross_entropy of rows": Case(*_linear_cross_entropy("none"), LINEAR),
    "feed_forward": Case(*_feed_forward("gelu", F.gelu), FEED_FORWARD),
    "feed_forward, silu": Case(*_feed_forward("silu", F.silu), FEED_FORWARD),
    "feed_forward, squared_relu": Case(*_feed_forward("squared_relu", lambda x: F.relu(x).square()), FEED_FORWARD),
    "transformer_embedding": Case(_embedding, _embedding_of_pytorch, ((5, 4), (7, 4), (4,), (4,))),
    "attention": Case(*_attention(causal=True), QKV),
    "attention, window": Case(*_attention(window=(1, 1), softcap=2.0), QKV),
    "attention, learned": Case(*_learned_attention(), LEARNED),
    "attention, packed": Case(*_packed_attention(), ((9, 2, 4),)),
    "merge_attention": Case(_merge, _merge_of_pytorch, ((3, 2, 4), (3, 2))),
}
EACH = pytest.mark.parametrize("name", CASES)


def inputs(case: Case, number: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in case.shapes]


def close(found: Any, expected: Any) -> None:
    """Compare float32 results with float64 ones, with a tolerance relative to the largest element of each tensor."""
    if not isinstance(expected, Tensor):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            close(*pair)
        return
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-4, atol=2e-5 * max(1.0, largest))


def loss(function: Function) -> Function:
    """Return a loss of the function in which each element of the result has another weight."""

    def weighed(*tensors: Tensor) -> Tensor:
        result = function(*tensors)
        finite = result.masked_fill(result == float("-inf"), 0.0)
        return (finite.square() * torch.linspace(0.5, 1.5, finite.numel()).view(finite.shape).to(finite.dtype)).sum()

    return weighed


def second_derivatives(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(loss(function)(*leaves), leaves, create_graph=True)
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return list(torch.autograd.grad(total, leaves))


@EACH
def test_forward_mode(name: str) -> None:
    case = CASES[name]
    found = torch.func.jvp(case.ours, tuple(inputs(case)), tuple(inputs(case, 1)))
    double = tuple(inputs(case, 0, torch.float64)), tuple(inputs(case, 1, torch.float64))
    close(found, torch.func.jvp(case.theirs, *double))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs(case), inputs(case, 1), strict=True)]
        close(forward_ad.unpack_dual(case.ours(*duals)), found)


@EACH
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_derivatives(name: str, backend: str) -> None:
    case = CASES[name]
    with fastformer.backend(backend):
        found = second_derivatives(case.ours, inputs(case))
    close(found, second_derivatives(case.theirs, inputs(case, 0, torch.float64)))


@EACH
def test_gradients_of_gradients_by_transforms(name: str) -> None:
    case = CASES[name]

    def of_gradients(function: Function) -> Function:
        every = tuple(range(len(case.shapes)))
        gradients = torch.func.grad(loss(function), argnums=every)
        return lambda *tensors: torch.stack([gradient.square().sum() for gradient in gradients(*tensors)]).sum()

    found = torch.func.grad(of_gradients(case.ours))(*inputs(case))
    close(found, torch.func.grad(of_gradients(case.theirs))(*inputs(case, 0, torch.float64)))


@EACH
def test_hessians(name: str) -> None:
    """Hessians are right, computed in forward mode over backward by `torch.func.hessian`."""
    case = CASES[name]
    found = torch.func.hessian(loss(case.ours))(*inputs(case))
    close(found, torch.func.hessian(loss(case.theirs))(*inputs(case, 0, torch.float64)))


@EACH
def test_third_derivatives(name: str) -> None:
    case = CASES[name]

    def along_gradient(function: Function) -> Function:
        first = torch.func.grad(loss(function))
        second = torch.func.grad(lambda *tensors: first(*tensors).square().sum())
        return torch.func.grad(lambda *tensors: second(*tensors).square().sum())

    found = along_gradient(case.ours)(*inputs(case))
    close(found, along_gradient(case.theirs)(*inputs(case, 0, torch.float64)))


@pytest.mark.parametrize("name", [name for name in CASES if "packed" not in name])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_example(name: str) -> None:
    case = CASES[name]
    examples = [torch.stack(pair) for pair in zip(inputs(case), inputs(case, 1), strict=True)]
    every = tuple(range(len(case.shapes)))
    found = torch.func.vmap(torch.func.grad(loss(case.ours), argnums=every))(*examples)
    expected = [torch.func.grad(loss(case.theirs), argnums=every)(*inputs(case, i, torch.float64)) for i in range(2)]
    close(found, [torch.stack(pair) for pair in zip(*expected, strict=True)])


@pytest.mark.parametrize("name", ["attention", "norm", "feed_forward", "embedding"])
def test_dropout_of_second_derivatives_is_that_of_the_first(name: str) -> None:
    """Second derivatives use the dropout of the first: with one seed, finite differences agree with them."""
    x, direction = torch.randn(2, 2, 1, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    ids = torch.arange(6)[None]
    functions: dict[str, Function] = {
        "attention": lambda x: fastformer.attention(x, x.sin(), x.cos(), dropout_p=0.3),
        "norm": lambda x: fastformer.rms_norm(x, (8,), residual=x.sin(), dropout_p=0.3)[0],
        "feed_forward": lambda x: fastformer.feed_forward(
            x, x[0, 0], x[0, 0].T.cos(), hidden_dropout_p=0.3, output_dropout_p=0.3
        ),
        "embedding": lambda x: fastformer.transformer_embedding(ids, x[0, 0], dropout_p=0.3),
    }

    def gradient(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(loss(functions[name])(x), x, create_graph=True)[0]

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((gradient(leaf) * direction).sum(), leaf)
    step = 1e-3
    before, after = (gradient((x + sign * step * direction).requires_grad_()).detach() for sign in (-1, 1))
    torch.testing.assert_close(found, (after - before) / (2 * step), rtol=4e-2, atol=4e-2)
    assert found.norm() > 1.0


def test_attention_weights_have_no_derivative_and_say_so() -> None:
    x = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def weights(x: Tensor) -> Tensor:
        return fastformer.attention_weights(x, x, x.detach()[..., 0].contiguous())

    with pytest.raises(RuntimeError, match="fastformer::attention_weights has no derivative"):
        weights(x).sum().backward()
    with pytest.raises(NotImplementedError, match="fastformer::attention_weights has no derivative"):
        torch.func.jvp(weights, (x,), (x,))


def test_overwritten_logits_have_no_second_derivative() -> None:
    leaf = torch.randn(4, 600, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = fastformer.cross_entropy(leaf * 2, TARGET, inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_what_takes_no_part_in_a_log_softmax_has_no_tangent() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    x[0], x[1, 2] = -torch.inf, -torch.inf
    _, tangent = torch.func.jvp(fastformer.log_softmax, (x,), (torch.ones(3, 5).cumsum(1),))
    assert not tangent[0].any() and tangent[1, 2] == 0.0 and tangent[2].all()
