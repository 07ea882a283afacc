"""torch.compile and torch.export see what they can fuse as functions of PyTorch, unless somebody chose a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import fastformer

pytestmark = pytest.mark.cpu

TABLE = fastformer.rotary_table(fastformer.rotary_frequencies(6), 50)


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    options = {"residual": residual, "input_bias": weight[1], "dropout_p": 0.4}
    return fastformer.layer_norm(x, x.shape[-1:], weight[0], weight[2], **options)


def layer_norm_alone(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return fastformer.layer_norm(x + residual, x.shape[-1:], weight[0])


def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return fastformer.rms_norm(x, x.shape[-1:], weight[0], residual=residual.bfloat16())


def softmax(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    mask = residual.masked_fill(residual < 0.0, -math.inf)
    return fastformer.softmax(x, mask=mask, scale=0.5), fastformer.log_softmax(x, mask=weight[0] > 0.0, causal=True)


def rotary(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    starts = torch.tensor([3])
    return fastformer.rotary(x[None], residual[None], *TABLE, offsets=starts)


def feed_forward(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    square = weight[:, None] * weight[0][:, None]
    weights = {"up_weight": square[0], "gate_weight": square[1], "down_weight": square[2], "up_bias": weight[0]}
    options = {"activation": "silu", "hidden_dropout_p": 0.3, "output_dropout_p": 0.3, "residual": residual}
    return fastformer.feed_forward(x, **weights, **options)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    function.__name__: function for function in (layer_norm, layer_norm_alone, rms_norm, softmax, rotary, feed_forward)
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)
# Dropout's random flags are all that a compiler does not compute itself.
DROPPING = {"layer_norm", "feed_forward"}


def operators_left(name: str) -> set[str]:
    return {"dropout_flags"} if name in DROPPING else set()


def inputs(rows: int = 5) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in ((2, rows, 10), (2, rows, 10), (3, 10))]


def outputs_and_gradients(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([output.float().nan_to_num(neginf=0.0).sin().sum() for output in outputs]).sum()
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)]


class Graphs:
    """A backend of torch.compile that runs the graphs of forward and backward as they are, and keeps them.

    Like Inductor, it computes again in the backward what is cheap.
    """

    def __init__(self) -> None:
        self.kept: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()

    def __call__(self, *arguments: Any) -> Any:
        backend = aot_autograd(
            fw_compiler=self._keep, bw_compiler=self._keep, partition_fn=min_cut_rematerialization_partition
        )
        return backend(*arguments)

    def _keep(self, graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        self.kept.append(graph)
        return graph

    def operators(self) -> set[str]:
        """The names of Fastformer's operators in the graphs."""
        targets = {str(node.target) for graph in self.kept for node in graph.graph.nodes}
        return {target.split(".")[1] for target in targets if target.startswith("fastformer.")}


@EACH
def test_a_compiled_call_has_no_operator_but_flags_and_equal_results(name: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend=graphs)
    for rows in (5, 9):
        actual, expected = (outputs_and_gradients(each, inputs(rows)) for each in (compiled, FUNCTIONS[name]))
        torch.testing.assert_close(actual, expected)
    assert len(graphs.kept) == 2 and graphs.operators() == operators_left(name)


@EACH
def test_a_compiled_call_without_gradients(name: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=graphs)
    results = []
    for function in (compiled, FUNCTIONS[name]):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(function(*inputs()))
    torch.testing.assert_close(*results)
    assert graphs.operators() == operators_left(name)


@EACH
def test_a_chosen_backend_is_kept(name: str) -> None:
    graphs = Graphs()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=graphs)
    with fastformer.backend("torch"):
        actual, expected = (outputs_and_gradients(each, inputs()) for each in (compiled, FUNCTIONS[name]))
    torch.testing.assert_close(actual, expected)
    operator = "norm" if "norm" in name else name
    # The gradient of a rotation is a rotation.
    assert graphs.operators() == {operator, *([] if name == "rotary" else [f"{operator}_backward"])}


def plain_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    total = residual + F.dropout(x + weight[1], 0.4)
    return F.layer_norm(total, (10,), weight[0], weight[2]), total


def plain_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    total = x + residual.bfloat16()
    return F.rms_norm(total, (10,), weight[0]), total


def plain_softmax(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    mask = residual.masked_fill(residual < 0.0, -math.inf)
    later = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
    return (0.5 * x + mask).softmax(-1), x.masked_fill(~(weight[0] > 0.0) | later, -math.inf).log_softmax(-1)


def plain_feed_forward(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    square = weight[:, None] * weight[0][:, None]
    hidden = F.linear(x, square[0], weight[0]) * F.silu(F.linear(x, square[1]))
    return residual + F.dropout(F.linear(F.dropout(hidden, 0.3), square[2]), 0.3)


def kept_bytes(function: Callable[..., Any], leaves: list[Tensor]) -> int:
    """Compile `function` and count the bytes that its forward keeps for its backward."""
    graphs = Graphs()
    outputs = torch.compile(function, fullgraph=True, backend=graphs)(*leaves)
    (result,) = [node for node in graphs.kept[0].graph.nodes if node.op == "output"]
    after_outputs = result.args[0][len(outputs) if isinstance(outputs, tuple) else 1 :]
    kept = {node.name: node.meta["val"] for node in after_outputs if isinstance(node, torch.fx.Node)}
    return sum(value.numel() * value.itemsize for value in kept.values() if isinstance(value, Tensor))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layer_norm", plain_layer_norm),
        ("rms_norm", plain_rms_norm),
        ("softmax", plain_softmax),
        ("feed_forward", plain_feed_forward),
    ],
)
def test_the_backward_keeps_no_more_than_that_of_plain_pytorch(name: str, plain: Callable[..., Any]) -> None:
    assert 0 < kept_bytes(FUNCTIONS[name], inputs(rows=40)) <= kept_bytes(plain, inputs(rows=40))


@pytest.mark.parametrize("shape", [(7, 10), (3, 2, 1), (5, 4), (2, 16), (0, 3)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_the_compiler_draws_the_mask_of_the_seed(shape: tuple[int, ...], dropout_p: float) -> None:
    def norm(x: Tensor) -> Tensor:
        return fastformer.rms_norm(x, shape[-1:], dropout_p=dropout_p)

    x = torch.ones(shape)
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (norm, compiled):
        torch.manual_seed(3)
        results.append(function(x))
    torch.testing.assert_close(*results)


def test_the_flags_are_drawn_once_and_kept_as_bits() -> None:
    graphs = Graphs()
    x = torch.ones(6, 20, requires_grad=True)
    compiled = torch.compile(lambda x: fastformer.rms_norm(x, (20,), dropout_p=0.4), fullgraph=True, backend=graphs)
    compiled(x).sum().backward()
    forward, backward = graphs.kept
    (drawn,), again = [
        [node for node in graph.graph.nodes if str(node.target) == "fastformer.dropout_flags.default"]
        for graph in (forward, backward)
    ]
    assert not again
    (result,) = [node for node in forward.graph.nodes if node.op == "output"]
    assert drawn in result.args[0]
    assert drawn.meta["val"].dtype == torch.uint8 and drawn.meta["val"].shape == (6, 3)


def second_derivatives(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    leaves = inputs()

    def times_mean(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = function(*tensors)
        return tuple(output * tensors[0].mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    torch.manual_seed(1)
    loss = torch.stack([output.sin().sum() for output in times_mean(*leaves)]).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    weights = [torch.randn_like(each) for each in first]
    return torch.autograd.grad(first, leaves, grad_outputs=weights, materialize_grads=True)


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_alone", "rotary", "feed_forward"])
def test_second_derivatives_have_all_terms_or_are_refused(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(*map(second_derivatives, (compiled, FUNCTIONS[name])))
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        second_derivatives(compiled)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("centered", [False, True])
def test_gradients_of_a_norm_of_tiny_and_huge_rows(scale: float, centered: bool) -> None:
    def norm(x: Tensor) -> Tensor:
        if centered:
            return fastformer.layer_norm(x, (10,), eps=0.0)
        return fastformer.rms_norm(x, (10,), eps=0.0)

    torch.manual_seed(0)
    x, grad = (scale * torch.randn(4, 10)).requires_grad_(), torch.randn(4, 10)
    torch._dynamo.reset()
    functions = torch.compile(norm, fullgraph=True, backend="aot_eager"), norm
    actual, expected = (torch.autograd.grad(each(x), x, grad)[0] for each in functions)
    torch.testing.assert_close(scale * actual, scale * expected)


def test_a_feed_forward_that_computes_again_stays_an_operator() -> None:
    graphs = Graphs()
    square = torch.randn(10, 10, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return fastformer.feed_forward(x, square, square, recompute=True)

    x = torch.randn(5, 10, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend=graphs)
    gradients = (torch.autograd.grad(function(x).sum(), (x, square)) for function in (compiled, block))
    torch.testing.assert_close(*gradients)
    assert graphs.operators() == {"feed_forward", "feed_forward_backward"}


def test_a_position_outside_the_table_becomes_nan() -> None:
    torch._dynamo.reset()
    x, positions = torch.ones(1, 2, 3, 8), torch.tensor([[0, 50, -1]])
    result, _ = torch.compile(fastformer.rotary, fullgraph=True)(x, None, *TABLE, position_ids=positions)
    expected, _ = fastformer.rotary(x[:, :, :1], None, *TABLE, position_ids=positions[:, :1])
    torch.testing.assert_close(result[:, :, :1], expected)
    assert result[:, :, 1:, :6].isnan().all()


class Block(torch.nn.Module):
    """A module around one of the functions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return FUNCTIONS[self.name](x, residual, weight)


@EACH
@pytest.mark.parametrize("strict", [False, True])
def test_exported_as_functions_of_pytorch(name: str, strict: bool) -> None:
    block, tensors = Block(name).eval(), tuple(tensor.detach() for tensor in inputs())
    exported = torch.export.export(block, tensors, strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {target for target in targets if "fastformer" in target} == {
        f"fastformer.{operator}.default" for operator in operators_left(name)
    }
    results = []
    for function in (exported.module(), block):
        torch.manual_seed(1)
        results.append(function(*tensors))
    torch.testing.assert_close(*results)
