"""TransformerEncoderLayer and TransformerEncoder against torch.nn's, driven with the same calls."""

from __future__ import annotations

import copy
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import fastformer
from fastformer.nn import LayerNorm, TransformerEncoder, TransformerEncoderLayer

MODEL, HEADS, INNER = 12, 3, 20
ACTIVATIONS = ["relu", "gelu", F.relu, F.gelu, F.silu, torch.tanh, torch.nn.GELU("tanh"), torch.nn.SiLU()]


def twins(**options) -> tuple[torch.nn.TransformerEncoderLayer, TransformerEncoderLayer]:
    theirs = torch.nn.TransformerEncoderLayer(MODEL, HEADS, INNER, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = TransformerEncoderLayer(MODEL, HEADS, INNER, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw_masks(data: st.DataObject, batch: int, length: int) -> dict[str, torch.Tensor | None]:
    """A mask and a padding mask; the first position is never masked, so that no row is empty."""
    masks: dict[str, torch.Tensor | None] = {}
    for name, shape in (("mask", (length, length)), ("src_key_padding_mask", (batch, length))):
        kind = data.draw(st.sampled_from(["none", "bool", "float"]), label=name)
        mask = torch.rand(shape) < 0.4
        mask[:, 0] = False
        masks[name] = {"none": None, "bool": mask, "float": torch.randn(shape)}[kind]
    return masks


def run(module: torch.nn.Module, src: torch.Tensor, training: bool, **call) -> tuple[torch.Tensor, list]:
    src = src.clone().requires_grad_()
    output = module.train(training)(src, **call)
    module.zero_grad()
    output.square().mean().backward()
    return output.detach(), [src.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_layer_equals_pytorch_on_the_same_calls(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    training = data.draw(st.booleans(), label="training")
    options = {name: data.draw(st.booleans(), label=name) for name in ("batch_first", "norm_first", "bias")}
    options["activation"] = data.draw(st.sampled_from(ACTIVATIONS))
    options["dropout"] = 0.0 if training else 0.1
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    masks = draw_masks(data, batch, length)
    call = {"src_mask": masks["mask"], "src_key_padding_mask": masks["src_key_padding_mask"]}
    if data.draw(st.booleans(), label="causal"):
        call |= {"src_mask": torch.ones(length, length, dtype=torch.bool).triu(1), "is_causal": True}
    src = torch.randn((batch, length, MODEL) if options["batch_first"] else (length, batch, MODEL))
    theirs, ours = twins(**options)
    torch.testing.assert_close(run(ours, src, training, **call), run(theirs, src, training, **call))


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor")
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_encoder_equals_pytorch_on_the_same_calls(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    norm_first, final_norm = data.draw(st.booleans()), data.draw(st.booleans())
    their_layer, our_layer = twins(dropout=0.0, norm_first=norm_first, batch_first=True)
    theirs = torch.nn.TransformerEncoder(their_layer, 2, torch.nn.LayerNorm(MODEL) if final_norm else None)
    ours = TransformerEncoder(our_layer, 2, LayerNorm(MODEL) if final_norm else None)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    src = torch.randn(2, 7, MODEL)
    masks = draw_masks(data, 2, 7)
    torch.testing.assert_close(run(ours, src, True, **masks), run(theirs, src, True, **masks))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_equals_pytorchs_fast_path_at_real_positions() -> None:
    # PyTorch's fast path is open to an even number of heads only; three would silently test the slow one.
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(MODEL, 4, INNER, batch_first=True), 2).eval()
    ours = TransformerEncoder(TransformerEncoderLayer(MODEL, 4, INNER, batch_first=True), 2).eval()
    ours.load_state_dict(theirs.state_dict())
    src, padding = torch.randn(2, 7, MODEL), torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.inference_mode():
        expected = theirs(src, src_key_padding_mask=padding)
        assert torch.equal(expected[padding], torch.zeros(3, MODEL)), "PyTorch did not take its fast path"
        torch.testing.assert_close(ours(src, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_works_inside_pytorchs_encoder() -> None:
    theirs, ours = twins(batch_first=True)
    src, padding = torch.randn(2, 7, MODEL), torch.arange(7) >= torch.tensor([[7], [4]])
    stacks = [torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval() for layer in (theirs, ours)]
    with torch.no_grad():
        expected, actual = (stack(src, src_key_padding_mask=padding) for stack in stacks)
    torch.testing.assert_close(actual[~padding], expected[~padding])


def test_triton_kernels_equal_pytorch() -> None:
    theirs, ours = twins(dropout=0.0, batch_first=True)
    src, padding = torch.randn(2, 7, MODEL), torch.arange(7) >= torch.tensor([[7], [4]])
    expected = run(theirs, src, True, src_key_padding_mask=padding)
    with fastformer.backend("triton"):
        torch.testing.assert_close(run(ours, src, True, src_key_padding_mask=padding), expected)


def test_unbatched() -> None:
    theirs, ours = twins(dropout=0.0)
    src = torch.randn(5, MODEL)
    torch.testing.assert_close(run(ours, src, True), run(theirs, src, True))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_drops_in_training_only(norm_first: bool) -> None:
    theirs, ours = twins(dropout=0.3, norm_first=norm_first)
    src = torch.randn(5, 2, MODEL)
    torch.testing.assert_close(run(ours, src, False), run(theirs, src, False))
    ours.train()
    assert not torch.equal(ours(src), ours(src))


def test_fully_padded_sequence_stays_finite() -> None:
    _, layer = twins(batch_first=True, dropout=0.0)
    padding = torch.tensor([[True] * 4, [False] * 4])
    output, gradients = run(layer, torch.randn(2, 4, MODEL), True, src_key_padding_mask=padding)
    assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_a_replaced_projection_is_called() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    _, layer = twins(activation="gelu")
    src = torch.randn(5, 2, MODEL)
    doubled = copy.deepcopy(layer).eval()
    doubled.linear2.weight.data *= 2
    doubled.linear2.bias.data *= 2
    replaced = copy.deepcopy(layer).eval()
    replaced.linear2 = Doubled(INNER, MODEL)
    replaced.linear2.load_state_dict(layer.linear2.state_dict())
    torch.testing.assert_close(replaced(src), doubled(src))


def test_compiles_without_graph_break() -> None:
    _, layer = twins(dropout=0.0, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        src, padding = torch.randn(3, length, MODEL), torch.arange(length) >= torch.tensor([[length], [2], [4]])
        torch.testing.assert_close(
            run(compiled, src, True, src_key_padding_mask=padding), run(layer, src, True, src_key_padding_mask=padding)
        )


def test_imports_no_transformers() -> None:
    check = "import sys, fastformer.nn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation must be 'relu', 'gelu' or a callable; got 'swish'"):
        TransformerEncoderLayer(MODEL, HEADS, activation="swish")
