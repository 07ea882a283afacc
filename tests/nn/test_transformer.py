"""TransformerEncoder, TransformerDecoder and Transformer give the same as torch.nn's in the same calls."""

from __future__ import annotations

import copy
import inspect
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from torch import nn
from twins import causal_mask, draw_mask, outputs_and_gradients, share_parameters

import fastformer.nn

MODEL, HEADS, INNER = 12, 3, 20
# PyTorch's encoder warns where a layer prevents nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")
STACKS = ["TransformerEncoder", "TransformerDecoder", "Transformer"]


def build(package, stack: str, *, final_norm: bool = True, **options) -> nn.Module:
    """Build a stack of two layers from torch.nn or fastformer.nn; a Transformer has one layer of each kind."""
    if stack == "Transformer":
        return package.Transformer(MODEL, HEADS, 1, 1, INNER, **options)
    layer = getattr(package, f"{stack}Layer")(MODEL, HEADS, INNER, **options)
    return getattr(package, stack)(layer, 2, package.LayerNorm(MODEL) if final_norm else None)


def twins(stack: str, **options) -> tuple[nn.Module, nn.Module]:
    theirs, ours = (build(package, stack, **options) for package in (nn, fastformer.nn))
    share_parameters(theirs, ours)
    return theirs, ours


def inputs_of(stack: str, batch: int = 2, *, batch_first: bool = False) -> list[torch.Tensor]:
    inputs = [torch.randn(batch, 7, MODEL), torch.randn(batch, 9, MODEL)]
    inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    return inputs[:1] if stack == "TransformerEncoder" else inputs


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=25)
@given(data=st.data())
def test_equals_pytorch_on_the_same_calls(stack: str, data: st.DataObject) -> None:
    flag = st.booleans()
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    training, batched = data.draw(flag, label="training"), data.draw(flag, label="batched")
    options = {name: data.draw(flag, label=name) for name in ("batch_first", "norm_first", "bias")}
    options |= {"dropout": 0.0 if training else 0.1, "activation": data.draw(st.sampled_from(["relu", "gelu"]))}
    if stack != "Transformer":
        options["final_norm"] = data.draw(flag, label="final_norm")
    lengths = {name: data.draw(st.integers(1, 8), label=name) for name in ("src", "tgt")}
    batch = data.draw(st.integers(1, 3), label="batch") if batched else 1
    names = {
        "TransformerEncoder": {"mask": ("src", "src")},
        "TransformerDecoder": {"tgt_mask": ("tgt", "tgt"), "memory_mask": ("tgt", "src")},
        "Transformer": {"src_mask": ("src", "src"), "tgt_mask": ("tgt", "tgt"), "memory_mask": ("tgt", "src")},
    }[stack]
    call = {}
    for name, (queries_of, keys_of) in names.items():
        queries, keys = lengths[queries_of], lengths[keys_of]
        padding_name = "src_key_padding_mask" if name == "mask" else name.replace("mask", "key_padding_mask")
        call[padding_name] = draw_mask(data, padding_name, (batch, keys) if batched else (keys,))
        shape = data.draw(st.sampled_from([(queries, keys), (batch * HEADS, queries, keys)]), label=f"{name}'s shape")
        call[name] = draw_mask(data, name, shape)
        if data.draw(flag, label=f"causal {name}"):
            causal_name = "is_causal" if name == "mask" else name.replace("mask", "is_causal")
            call[name] = causal_mask(data, f"boolean {name}", queries, keys)
            # With None, the default of all but one, PyTorch checks the mask itself; with False it applies the mask.
            call[causal_name] = data.draw(st.sampled_from([True, False] + [None] * (name != "memory_mask")))
    order = {"TransformerEncoder": ["src"], "TransformerDecoder": ["tgt", "src"], "Transformer": ["src", "tgt"]}[stack]
    inputs = [torch.randn(batch, lengths[name], MODEL) for name in order]
    if not batched:
        inputs = [x.squeeze(0) for x in inputs]
    elif not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]
    theirs, ours = (module.train(training) for module in twins(stack, **options))
    expected = outputs_and_gradients(theirs, *inputs, **call)
    torch.testing.assert_close(outputs_and_gradients(ours, *inputs, **call), expected)


@pytest.mark.parametrize("stack", [*STACKS, "TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention"])
def test_signatures_are_pytorchs(stack: str) -> None:
    theirs, ours = getattr(nn, stack), getattr(fastformer.nn, stack)
    for method in ("__init__", "forward"):
        expected, actual = (inspect.signature(getattr(kind, method)).parameters.values() for kind in (theirs, ours))
        assert [(p.name, p.default) for p in actual] == [(p.name, p.default) for p in expected]
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("stack", STACKS)
def test_same_seed_same_parameters(stack: str) -> None:
    modules = []
    for package in (nn, fastformer.nn):
        torch.manual_seed(0)
        modules.append(build(package, stack))
    assert list(modules[0].state_dict()) == list(modules[1].state_dict())
    torch.testing.assert_close(dict(modules[1].state_dict()), dict(modules[0].state_dict()))
    assert str(modules[0]) == str(modules[1])


@pytest.mark.cpu  # a default device is a mode, which disables PyTorch's fast path
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_equals_pytorchs_fast_path_at_real_positions() -> None:
    # PyTorch's fast path needs an even number of heads; with three, this would silently test the slow path.
    theirs, ours = (
        package.TransformerEncoder(package.TransformerEncoderLayer(MODEL, 4, INNER, batch_first=True), 2).eval()
        for package in (nn, fastformer.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    src, padding = torch.randn(2, 7, MODEL), torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.inference_mode():
        expected = theirs(src, src_key_padding_mask=padding)
        assert torch.equal(expected[padding], torch.zeros(3, MODEL)), "PyTorch did not take its fast path"
        torch.testing.assert_close(ours(src, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_stacks_take_pytorchs_layers() -> None:
    layer = nn.TransformerEncoderLayer(MODEL, HEADS, INNER, dropout=0.0)
    src = torch.randn(5, 2, MODEL)
    torch.testing.assert_close(fastformer.nn.TransformerEncoder(layer, 2)(src), layer(layer(src)))


def test_custom_encoder_and_decoder_are_called() -> None:
    class Custom(nn.Module):
        def forward(self, *tensors: torch.Tensor, **masks: torch.Tensor | None) -> torch.Tensor:
            return sum(tensor.mean(0, keepdim=True) for tensor in tensors)

    src, tgt = torch.randn(5, 2, MODEL), torch.randn(4, 2, MODEL)
    model = fastformer.nn.Transformer(MODEL, HEADS, custom_encoder=Custom(), custom_decoder=Custom())
    torch.testing.assert_close(model(src, tgt), (src.mean(0) + tgt.mean(0))[None])


def test_a_target_whose_source_is_all_padding_stays_finite() -> None:
    _, model = twins("Transformer", dropout=0.0, batch_first=True)
    padding = torch.tensor([[True] * 7, [False] * 7])
    inputs = inputs_of("Transformer", batch_first=True)
    call = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    results = outputs_and_gradients(model, *inputs, **call)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert torch.equal(results["gradient of input 0"][0], torch.zeros(7, MODEL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_subsequent_mask_is_pytorchs(dtype: torch.dtype) -> None:
    masks = (package.Transformer.generate_square_subsequent_mask(5, dtype=dtype) for package in (fastformer.nn, nn))
    torch.testing.assert_close(*masks)


@pytest.mark.parametrize("stack", STACKS)
def test_survives_copy_and_pickle(stack: str) -> None:
    _, model = twins(stack, dropout=0.0)
    inputs = inputs_of(stack)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(*inputs), model(*inputs))


def test_compiles_into_one_graph() -> None:
    graphs = torch._dynamo.testing.CompileCounter()
    _, model = twins("Transformer", dropout=0.0)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, dynamic=True, backend=graphs)
    for batch in (2, 3):
        inputs = inputs_of("Transformer", batch)
        call = {
            "tgt_mask": model.generate_square_subsequent_mask(9),
            "src_key_padding_mask": torch.rand(batch, 7) < 0.5,
        }
        torch.testing.assert_close(
            outputs_and_gradients(compiled, *inputs, **call), outputs_and_gradients(model, *inputs, **call)
        )
    assert graphs.frame_count == 1


def test_refuses_what_it_cannot_do() -> None:
    model = build(fastformer.nn, "Transformer")
    src, tgt = inputs_of("Transformer")
    with pytest.raises(ValueError, match=r"same batch size, dimension 1; got shapes \(7, 1, 12\) and \(9, 2, 12\)"):
        model(src[:, :1], tgt)
    with pytest.raises(ValueError, match=r"tgt must have d_model = 12 features; got shape \(9, 2, 11\)"):
        model(src, tgt[..., 1:])
