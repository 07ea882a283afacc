"""TransformerEncoderLayer and TransformerDecoderLayer give the same as torch.nn's in the same calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accuracy import assert_as_accurate
from hypothesis import given, settings
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from twins import causal_mask, draw_mask, outputs_and_gradients, share_parameters

import fastformer
from fastformer.nn import LayerNorm, RMSNorm, TransformerDecoderLayer, TransformerEncoderLayer

MODEL, HEADS, INNER = 12, 3, 20
ACTIVATIONS = ["relu", "gelu", F.relu, F.gelu, F.silu, torch.tanh, nn.GELU("tanh"), nn.SiLU()]
LAYERS = [
    (nn.TransformerEncoderLayer, TransformerEncoderLayer),
    (nn.TransformerDecoderLayer, TransformerDecoderLayer),
]
both_layers = pytest.mark.parametrize(("their_class", "our_class"), LAYERS, ids=["encoder", "decoder"])


def twins(their_class: type[nn.Module], our_class: type[nn.Module], **options) -> tuple[nn.Module, nn.Module]:
    theirs, ours = their_class(MODEL, HEADS, INNER, **options), our_class(MODEL, HEADS, INNER, **options)
    share_parameters(theirs, ours)
    return theirs, ours


def inputs_of(layer_class: type[nn.Module], *, batch_first: bool = False) -> list[torch.Tensor]:
    """Return a batch of two: the input of a layer and, for a decoder's layer, the longer memory."""
    inputs = [torch.randn(2, 7, MODEL), torch.randn(2, 9, MODEL)]
    inputs = inputs if batch_first else [x.transpose(0, 1).contiguous() for x in inputs]
    return inputs if issubclass(layer_class, nn.TransformerDecoderLayer) else inputs[:1]


@both_layers
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=60)
@given(data=st.data())
def test_equals_pytorch_on_the_same_calls(
    their_class: type[nn.Module], our_class: type[nn.Module], data: st.DataObject
) -> None:
    flag = st.booleans()
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    training, batched = data.draw(flag, label="training"), data.draw(flag, label="batched")
    options = {name: data.draw(flag, label=name) for name in ("batch_first", "norm_first", "bias")}
    options["activation"] = data.draw(st.sampled_from(ACTIVATIONS), label="activation")
    options["layer_norm_eps"] = data.draw(st.sampled_from([1e-5, 0.1]), label="layer_norm_eps")
    options["dropout"] = 0.0 if training else 0.1
    batch = data.draw(st.integers(1, 3), label="batch") if batched else 1
    length = data.draw(st.integers(1, 8), label="length")
    decoder = issubclass(our_class, nn.TransformerDecoderLayer)
    lengths = [length, data.draw(st.integers(1, 8), label="memory's length")] if decoder else [length]
    call = {}
    for (mask_name, causal_name), keys in zip(
        [("tgt_mask", "tgt_is_causal"), ("memory_mask", "memory_is_causal")]
        if decoder
        else [("src_mask", "is_causal")],
        lengths,
        strict=True,
    ):
        padding_name = mask_name.replace("mask", "key_padding_mask")
        call[padding_name] = draw_mask(data, padding_name, (batch, keys) if batched else (keys,))
        shape = data.draw(
            st.sampled_from([(length, keys), (batch * HEADS, length, keys)]), label=f"{mask_name}'s shape"
        )
        call[mask_name] = draw_mask(data, mask_name, shape)
        if data.draw(flag, label=causal_name):
            call |= {mask_name: causal_mask(data, f"boolean {mask_name}", length, keys), causal_name: True}
    inputs = [torch.randn(batch, size, MODEL) for size in lengths]
    if not batched:
        inputs = [x.squeeze(0) for x in inputs]
    elif not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]
    theirs, ours = (module.train(training) for module in twins(their_class, our_class, **options))
    expected = outputs_and_gradients(theirs, *inputs, **call)
    torch.testing.assert_close(outputs_and_gradients(ours, *inputs, **call), expected)


@both_layers
@pytest.mark.parametrize("norm_first", [False, True])
def test_triton_kernels_equal_pytorch(
    their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool
) -> None:
    theirs, ours = twins(their_class, our_class, dropout=0.0, norm_first=norm_first)
    inputs = inputs_of(our_class)
    expected = outputs_and_gradients(theirs, *inputs)
    with fastformer.backend("triton"):
        torch.testing.assert_close(outputs_and_gradients(ours, *inputs), expected)


def test_fully_padded_sequence_stays_finite() -> None:
    """Attention to nothing adds only the bias of its output projection, where PyTorch gives NaN."""
    _, layer = twins(*LAYERS[1], batch_first=True, dropout=0.0)
    padding = torch.tensor([[True] * 9, [False] * 9])
    inputs = inputs_of(TransformerDecoderLayer, batch_first=True)
    results = outputs_and_gradients(layer, *inputs, memory_key_padding_mask=padding)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert torch.equal(results["gradient of input 1"][0], torch.zeros(9, MODEL))
    other_memory = inputs[1].clone()
    other_memory[0] = 0.0
    torch.testing.assert_close(layer(inputs[0], other_memory, memory_key_padding_mask=padding), results["output 0"])


@both_layers
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_drops_in_training_only_and_keeps_the_mean(
    their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool
) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(their_class, our_class, dropout=0.3, norm_first=norm_first)
    inputs = inputs_of(our_class)
    torch.testing.assert_close(ours.eval()(*inputs), theirs.eval()(*inputs))
    ours.train(), theirs.train()
    batch = [x[:, :1].expand(-1, 4000, -1) for x in inputs]
    draws, expected = ours(*batch), theirs(*batch)
    assert not torch.equal(draws[:, 0], draws[:, 1])
    # Both are means of the same number of draws from one distribution: they agree within 4.5 standard errors.
    error = (draws.mean(1) - expected.mean(1)).abs() / (draws.var(1) + expected.var(1)).div(4000).sqrt()
    assert error.max() < 4.5
    spread = (draws.std(1) / expected.std(1)).log().abs()
    # The standard deviation of 4,000 draws has an error of 1.1% if normal, and a few times that with heavier tails.
    assert spread.max() < 0.2


@both_layers
def test_every_dropout_drops(their_class: type[nn.Module], our_class: type[nn.Module]) -> None:
    """Each dropout drops when it alone is in training, in a layer in evaluation, as for Monte Carlo dropout."""
    for name in [name for name, module in our_class(MODEL, HEADS).named_modules() if isinstance(module, nn.Dropout)]:
        _, layer = twins(their_class, our_class, dropout=0.5)
        inputs = inputs_of(our_class)
        expected = layer.eval()(*inputs)
        torch.testing.assert_close(layer(*inputs), expected)
        layer.get_submodule(name).train()
        assert not torch.allclose(layer(*inputs), expected), name


class DispatchedOperators(TorchDispatchMode):
    """A mode that records the dispatched operators that make a tensor, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        makes_tensor = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output))
        if makes_tensor and not function.is_view and function is not torch.ops.aten._unsafe_view.default:
            self.names.add(str(function.overloadpacket))
        return output


@both_layers
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_products_and_fused_operators(
    their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool, batch_first: bool, training: bool
) -> None:
    layer = our_class(MODEL, HEADS, INNER, dropout=0.1, norm_first=norm_first, batch_first=batch_first).train(training)
    inputs = inputs_of(our_class, batch_first=batch_first)
    with DispatchedOperators() as dispatched:
        layer(*inputs)
    expected = {"aten.addmm", "fastformer.attention", "fastformer.feed_forward", "fastformer.norm"}
    # `randint` draws the seeds of dropout, two numbers for each call.
    assert dispatched.names == expected | ({"aten.randint"} if training else set())


@both_layers
def test_works_inside_pytorchs_stack(their_class: type[nn.Module], our_class: type[nn.Module]) -> None:
    stack_class = nn.TransformerDecoder if issubclass(our_class, nn.TransformerDecoderLayer) else nn.TransformerEncoder
    padding_name = "tgt_key_padding_mask" if stack_class is nn.TransformerDecoder else "src_key_padding_mask"
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    inputs = inputs_of(our_class, batch_first=True)
    options = {} if stack_class is nn.TransformerDecoder else {"enable_nested_tensor": False}
    theirs, ours = (
        stack_class(layer, 2, **options).eval() for layer in twins(their_class, our_class, batch_first=True)
    )
    with torch.no_grad():
        expected, actual = (stack(*inputs, **{padding_name: padding}) for stack in (theirs, ours))
    torch.testing.assert_close(actual[~padding], expected[~padding])


@both_layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
def test_as_accurate_as_pytorch_in_half_precision(
    their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(their_class, our_class, dropout=0.0, norm_first=norm_first, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    inputs = [x.to(dtype) for x in inputs_of(our_class)]
    results = [outputs_and_gradients(module, *inputs) for module in (ours, theirs)]
    expected = outputs_and_gradients(exact, *(x.double() for x in inputs))
    for name, actual in results[0].items():
        assert_as_accurate(name, actual, results[1][name], expected[name])


@both_layers
@pytest.mark.parametrize("norm_first", [False, True])
def test_as_accurate_as_pytorch_under_autocast(
    their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(their_class, our_class, dropout=0.0, norm_first=norm_first)
    exact = copy.deepcopy(theirs).double()
    inputs = inputs_of(our_class)
    with torch.autocast(device.type, torch.bfloat16):
        results = [outputs_and_gradients(module, *inputs) for module in (ours, theirs)]
    expected = outputs_and_gradients(exact, *(x.double() for x in inputs))
    for name, actual in results[0].items():
        assert_as_accurate(name, actual, results[1][name], expected[name])


def test_compiles_without_graph_break() -> None:
    _, layer = twins(*LAYERS[1], dropout=0.0, norm_first=True)
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, dynamic=True, backend="eager")
    for batch, length in ((3, 5), (2, 9)):
        inputs = [torch.randn(length, batch, MODEL) for _ in range(2)]
        torch.testing.assert_close(outputs_and_gradients(compiled, *inputs), outputs_and_gradients(layer, *inputs))


@pytest.mark.cpu
@both_layers
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
def test_sharded_parameters(their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool) -> None:
    _, layer = twins(their_class, our_class, dropout=0.0, norm_first=norm_first)
    inputs = inputs_of(our_class)
    expected = outputs_and_gradients(layer, *inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
        results = outputs_and_gradients(layer, *inputs)
    finally:
        dist.destroy_process_group()
    assert any(isinstance(gradient, DTensor) for gradient in results.values())
    gathered = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in results.items()}
    torch.testing.assert_close(gathered, expected)


@both_layers
def test_survives_copy_and_pickle(their_class: type[nn.Module], our_class: type[nn.Module]) -> None:
    _, layer = twins(their_class, our_class, activation="gelu", dropout=0.0)
    inputs = inputs_of(our_class)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied(*inputs), layer(*inputs))


@both_layers
def test_same_seed_same_parameters_in_the_same_order(their_class: type[nn.Module], our_class: type[nn.Module]) -> None:
    layers = []
    for layer_class in (their_class, our_class):
        torch.manual_seed(0)
        layers.append(layer_class(MODEL, HEADS, INNER, activation=nn.GELU()))
    assert list(layers[0].state_dict()) == list(layers[1].state_dict())
    torch.testing.assert_close(dict(layers[1].state_dict()), dict(layers[0].state_dict()))
    assert str(layers[0]) == str(layers[1])
    assert isinstance(layers[1], their_class)


@both_layers
def test_device_and_dtype_of_the_parameters(their_class: type[nn.Module], our_class: type[nn.Module]) -> None:
    layer = our_class(MODEL, HEADS, INNER, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in layer.parameters()} == {("meta", torch.bfloat16)}


class Doubled(nn.Linear):
    """A stand-in for a projection with LoRA: a Linear with a changed forward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def replace_class(linear: nn.Linear) -> nn.Module:
    replacement = Doubled(linear.in_features, linear.out_features)
    replacement.load_state_dict(linear.state_dict())
    return replacement


def replace_forward(linear: nn.Linear) -> nn.Module:
    plain = linear.forward
    linear.forward = lambda input: 2 * plain(input)
    return linear


def add_forward_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return linear


def add_forward_pre_hook(linear: nn.Linear) -> nn.Module:
    def double_parameters(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Like torch.nn.utils.weight_norm and pruning, compute the weight before each forward.
        module.weight.data.copy_(2 * original["weight"])
        module.bias.data.copy_(2 * original["bias"])
        return inputs

    original = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    linear.register_forward_pre_hook(double_parameters)
    return linear


class Twice(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def parametrize(linear: nn.Linear) -> nn.Module:
    nn.utils.parametrize.register_parametrization(linear, "weight", Twice())
    nn.utils.parametrize.register_parametrization(linear, "bias", Twice())
    return linear


@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.out_proj"])
@pytest.mark.parametrize(
    "change", [replace_class, replace_forward, add_forward_hook, add_forward_pre_hook, parametrize]
)
def test_a_changed_projection_is_called(change: Callable[[nn.Linear], nn.Module], name: str) -> None:
    _, layer = twins(*LAYERS[0], activation="gelu", dropout=0.0)
    src = torch.randn(5, 2, MODEL)
    doubled = copy.deepcopy(layer)
    for parameter in doubled.get_submodule(name).parameters():
        parameter.data *= 2
    layer.set_submodule(name, change(layer.get_submodule(name)))
    torch.testing.assert_close(layer(src), doubled(src))


@both_layers
@pytest.mark.parametrize("norm_first", [False, True])
def test_changed_norms_and_dropouts_are_called(
    their_class: type[nn.Module], our_class: type[nn.Module], norm_first: bool
) -> None:
    theirs, ours = twins(their_class, our_class, norm_first=norm_first, dropout=0.0)
    inputs = inputs_of(our_class)
    for parts in (
        {"norm1": nn.Identity(), "norm2": nn.RMSNorm(MODEL)},
        {"norm1": nn.LayerNorm(MODEL), "norm2": RMSNorm(MODEL)},
        {"dropout1": Twice(), "dropout2": Twice()},
        {"dropout": Twice()},
    ):
        for layer in (theirs, ours):
            for name, part in parts.items():
                layer.set_submodule(name, copy.deepcopy(part))
        torch.testing.assert_close(outputs_and_gradients(ours, *inputs), outputs_and_gradients(theirs, *inputs))


def test_a_subclass_with_its_own_block_keeps_it() -> None:
    class KeepsWeights(TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            output, self.weights = self.self_attn(x, x, x, key_padding_mask, True, attn_mask, is_causal=is_causal)
            return self.dropout1(output)

    _, plain = twins(*LAYERS[0])
    layer = KeepsWeights(MODEL, HEADS, INNER).eval()
    layer.load_state_dict(plain.state_dict())
    src = torch.randn(5, 2, MODEL)
    torch.testing.assert_close(layer(src), plain.eval()(src))
    torch.testing.assert_close(layer.weights.sum(-1), torch.ones(2, 5))


def test_causal_needs_no_mask() -> None:
    _, layer = twins(*LAYERS[1], dropout=0.0)
    tgt, memory = inputs_of(TransformerDecoderLayer)
    causal = [torch.ones(7, keys, dtype=torch.bool).triu(1) for keys in (7, 9)]
    expected = layer(tgt, memory, tgt_mask=causal[0], memory_mask=causal[1])
    torch.testing.assert_close(layer(tgt, memory, tgt_is_causal=True, memory_is_causal=True), expected)


@both_layers
def test_refuses_an_unknown_activation(their_class: type[nn.Module], our_class: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="activation must be 'relu', 'gelu' or a callable; got 'swish'"):
        our_class(MODEL, HEADS, activation="swish")


def test_norm_is_layer_norm() -> None:
    assert isinstance(TransformerEncoderLayer(MODEL, HEADS).norm1, LayerNorm)
