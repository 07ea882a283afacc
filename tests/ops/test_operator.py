"""PyTorch's modes, subclasses, autograd, vmap and compiler see each operator, whichever way a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastformer
from fastformer.ops.operator import operator

pytestmark = pytest.mark.cpu


def attention(x: Tensor) -> Tensor:
    output = fastformer.attention(x[None], x[None].sin(), x[None].cos(), causal=True)
    assert isinstance(output, Tensor)
    return output[0]


# Calls with options that PyTorch's own functions lack.
def norm(x: Tensor) -> Tensor:
    return fastformer.rms_norm(x, (x.shape[-1],), x[0, 0])


def softmax(x: Tensor) -> Tensor:
    return fastformer.softmax(x, scale=0.5)


def cross_entropy(x: Tensor) -> Tensor:
    classes = torch.arange(x.shape[0] * x.shape[1]) % x.shape[-1]
    return fastformer.cross_entropy(x.reshape(-1, x.shape[-1]), classes, label_smoothing=0.1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attention,
    "softmax": softmax,
    "norm": norm,
    "cross_entropy": cross_entropy,
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 8)


class Names(TorchDispatchMode):
    """A mode that notes the operators of Fastformer that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastformer":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@EACH
def test_a_mode_sees_the_operator_forward_and_backward(name: str, x: Tensor) -> None:
    expected = FUNCTIONS[name](x)
    x.requires_grad_()
    with Names() as mode:
        result = FUNCTIONS[name](x)
        result.sum().backward()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert mode.seen[0] == name and all(name in seen for seen in mode.seen) and len(mode.seen) >= 2


@EACH
def test_a_profiler_sees_the_operator(name: str, x: Tensor) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        FUNCTIONS[name](x)
    assert f"fastformer::{name}" in {event.key for event in found.key_averages()}


@EACH
def test_a_graph_has_the_operator_as_one_node(name: str, x: Tensor) -> None:
    graph = make_fx(lambda x: FUNCTIONS[name](x))(x)
    assert f"fastformer.{name}.default" in [str(node.target) for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), FUNCTIONS[name](x), rtol=0, atol=0)


@EACH
def test_tensors_without_data_have_the_shape_of_the_result(name: str, x: Tensor) -> None:
    expected = FUNCTIONS[name](x)
    with FakeTensorMode() as mode:
        fake = FUNCTIONS[name](mode.from_tensor(x))
    on_meta = FUNCTIONS[name](x.to("meta")) if name != "cross_entropy" else fake
    for result in (fake, on_meta):
        assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())


@EACH
def test_the_transforms_of_torch_func(name: str, x: Tensor) -> None:
    function = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: function(x).square().sum())(x), expected)
    batch = torch.stack([x, x.flip(0)])
    with pytest.warns(UserWarning, match="performance drop"):
        mapped = torch.vmap(function)(batch)
    torch.testing.assert_close(mapped, torch.stack([function(each) for each in batch]))


@EACH
def test_gradients_of_a_batch_at_once(name: str, x: Tensor) -> None:
    x.requires_grad_()
    result = FUNCTIONS[name](x)
    several = torch.randn(3, *result.shape)
    (found,) = torch.autograd.grad(result, x, several, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(result, x, each, retain_graph=True)[0] for each in several]
    torch.testing.assert_close(found, torch.stack(expected))


@EACH
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(name: str, reentrant: bool, x: Tensor) -> None:
    x.requires_grad_()
    (expected,) = torch.autograd.grad(FUNCTIONS[name](x).square().sum(), x)
    checkpoint(FUNCTIONS[name], x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


@EACH
def test_compiled_with_gradients_and_another_length(name: str, x: Tensor) -> None:
    torch._dynamo.reset()
    function = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for leaf in (x.requires_grad_(), torch.randn(2, 7, 8, requires_grad=True)):
        expected = FUNCTIONS[name](leaf)
        result = function(leaf)
        torch.testing.assert_close(result, expected)
        gradients = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (result, expected))
        torch.testing.assert_close(*gradients)


@EACH
def test_a_view_of_negated_values(name: str, x: Tensor) -> None:
    view = torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(FUNCTIONS[name](view), FUNCTIONS[name](view.resolve_neg()), rtol=0, atol=0)


def test_numbers_that_the_compiler_keeps_as_symbols() -> None:
    torch._dynamo.reset()

    def twice(x: Tensor) -> Tensor:
        return fastformer.rms_norm(fastformer.rms_norm(x, (8,)), (8,))

    leaf = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = (torch.autograd.grad(function(leaf).square().sum(), leaf)[0] for function in (compiled, twice))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "feed_forward", "linear_cross_entropy", "embedding"])
def test_the_gradient_of_a_mapped_call(kind: str, x: Tensor) -> None:
    # A mapped tensor does not report that it requires a gradient.
    other, weight = torch.randn(2, 5, 8), torch.randn(8, 8)
    ids = torch.arange(10).view(2, 5) % 8
    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "layer_norm": lambda a, b, _: fastformer.layer_norm(a, (8,), a[0], residual=b, return_sum=False),
        "rms_norm": lambda a, b, _: fastformer.rms_norm(a, (8,), input_bias=b[0]),
        "feed_forward": lambda a, b, _: fastformer.feed_forward(a, weight, weight, b[0]),
        "linear_cross_entropy": lambda a, b, ids: fastformer.linear_cross_entropy(a, weight, ids),
        "embedding": lambda a, b, ids: fastformer.transformer_embedding(ids[None], a, norm_weight=b[0]),
    }
    function = functions[kind]

    def one_by_one(x: Tensor) -> Tensor:
        return torch.stack([function(*each) for each in zip(x, other, ids, strict=True)]).square().sum()

    def mapped(x: Tensor) -> Tensor:
        return torch.vmap(function)(x, other, ids).square().sum()

    leaf = torch.cat([x, x.cos()], 1)[:, :8].requires_grad_() if kind == "embedding" else x.requires_grad_()
    (expected,) = torch.autograd.grad(one_by_one(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(mapped)(leaf.detach()), expected)
    torch.testing.assert_close(torch.autograd.grad(mapped(leaf), leaf)[0], expected)


class FunctionNames(TorchFunctionMode):
    """A mode that notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@EACH
def test_a_function_mode_sees_the_operator(name: str, x: Tensor) -> None:
    with FunctionNames() as mode:
        FUNCTIONS[name](x)
    assert f"fastformer.{name}.default" in mode.seen


class Doubled(Tensor):
    """A tensor that stands for twice its values, and handles every operator."""

    values: Tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastformer":
            args = [2 * arg.values if isinstance(arg, Doubled) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def test_a_subclass_has_its_own_dispatch(x: Tensor) -> None:
    doubled = Doubled._make_wrapper_subclass(Doubled, x.shape, dtype=x.dtype)
    doubled.values = x
    torch.testing.assert_close(softmax(doubled), torch.softmax(x, -1))


def test_autograd_knows_what_an_operator_changed(x: Tensor) -> None:
    @operator("fastformer_test::increase", mutates_args=("x", "other"))
    def increase(x: Tensor, other: Tensor | None) -> None:
        x.numpy()[:] += 1  # autograd does not see it

    leaf = torch.randn(2, 5, 8, requires_grad=True)
    saved = leaf * x
    increase(x, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_an_operator_without_a_derivative_says_so(x: Tensor) -> None:
    @operator("fastformer_test::twice")
    def twice(x: Tensor) -> Tensor:
        return x + x

    with pytest.raises(RuntimeError, match="fastformer_test::twice has no derivative"):
        twice(x.clone().requires_grad_()).sum().backward()
    assert not twice(x).requires_grad
    with torch.no_grad():
        assert not twice(x.requires_grad_()).requires_grad


def test_autograd_does_not_follow_an_operator_called_alone(x: Tensor) -> None:
    table = fastformer.rotary_table(fastformer.rotary_frequencies(8), 5)
    alone = torch.ops.fastformer.rotary.default(x[None].requires_grad_(), None, *table, *(None,) * 3, False, False)
    torch.testing.assert_close(alone[0].detach(), fastformer.rotary(x[None], None, *table)[0])
