"""Accelerated models have the same outputs, gradients and parameters, and can be restored."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import here
from hugging_face_models import MODELS
from torch import nn
from transformers.activations import ACT2FN

import fastformer
from fastformer.integrations.acceleration import Acceleration, feed_forward, losses, rotary, swapping
from fastformer.integrations.acceleration import model as model_module
from fastformer.integrations.acceleration.rebinding import global_names, rebind
from fastformer.integrations.acceleration.swapping import Accelerated

# The parts of each model that are left, and why. All other parts must be replaced.
LEFT = {
    "GPT-2": {"embeddings": "in a forward that does more"},
    "BART": {"embeddings": "in a forward that does more", "feed-forward": "in a forward that does more"},
    "Marian": {"feed-forward": "in a forward that does more"},
    "mBART": {"embeddings": "in a forward that does more", "feed-forward": "in a forward that does more"},
    "Whisper": {"embeddings": "in a forward that does more", "feed-forward": "in a forward that does more"},
    "ViT": {"loss": "not the cross-entropy of a language model"},
    "CLIP": {"feed-forward": "computes no feed-forward with relu, gelu"},  # quick_gelu
    "gpt-oss": {"rotary position embedding": "not simply each twice"},
    "Llama 4": {"normalisation": "its size cannot be told"},
}
REPLACED = {
    "BERT": {"embeddings", "feed-forward", "residual and normalisation", "normalisation", "loss", "attention"},
    "DistilBERT": {"embeddings", "feed-forward", "normalisation", "loss", "attention"},
    "ModernBERT": {"feed-forward", "normalisation", "loss", "attention", "rotary position embedding"},
    "GPT-2": {"feed-forward", "normalisation", "loss", "attention"},
    "Llama": {"feed-forward", "normalisation", "loss", "attention", "rotary position embedding"},
    "Gemma 2": {"feed-forward", "normalisation", "loss", "attention", "rotary position embedding"},
    "T5": {"feed-forward", "normalisation", "loss", "attention"},
    "ViT": {"feed-forward", "normalisation", "attention"},
}


def results(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the loss, the logits, and the gradient of every parameter."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    logits = output.logits_per_text if "logits_per_text" in output else output.logits
    if "input_ids" in batch and logits.shape[:2] == batch["input_ids"].shape:
        logits = logits[batch["attention_mask"].bool()]  # a model may compute anything for padding
    return {"loss": output.loss.detach(), "logits": logits.detach(), **gradients}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=tolerance,
            atol=tolerance * max(1.0, float(expected[name].abs().max())),
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left(name: str) -> None:
    report = fastformer.accelerate(MODELS[name].build())
    assert {made.part for made in report.left} == LEFT.get(name, {}).keys()
    for made in report.left:
        assert LEFT[name][made.part] in made.detail
    assert REPLACED.get(name, set()) <= {made.part for made in report.replaced}


# One model of every structure; the tests of attention have the others.
OF_EVERY_STRUCTURE = (
    "BERT", "RoBERTa", "DistilBERT", "ModernBERT", "GPT-2", "GPT-NeoX", "Llama", "Gemma 3", "T5", "ViT",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_EVERY_STRUCTURE)
def test_outputs_and_gradients_by_the_kernels(name: str) -> None:
    small = MODELS[name]
    model, batch = small.build(), small.batch("right" if small.kind != "decoder" else "left")
    expected = results(model, batch)
    fastformer.accelerate(model)
    if name not in ("BERT", "Llama"):
        model.set_attn_implementation("eager")  # the interpreter is slow
    with fastformer.backend("triton"):
        actual = results(model, batch)
    assert_same(actual, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_outputs_and_gradients_on_a_cpu(name: str) -> None:
    small = MODELS[name]
    model, batch = small.build(), small.batch("right")
    expected = results(model, batch)
    fastformer.accelerate(model)
    assert_same(results(model, batch), expected)


@pytest.mark.parametrize("name", MODELS)
def test_restore_leaves_nothing(name: str) -> None:
    model = MODELS[name].build()
    attributes = {path: {**vars(module)} for path, module in model.named_modules()}
    classes = {path: type(module) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    implementations = [config._attn_implementation for config in configurations(model)]

    fastformer.accelerate(model)
    assert any(isinstance(module, Accelerated) for module in model.modules())
    assert all(isinstance(module, classes[path]) for path, module in model.named_modules())
    assert all(type(module).__name__ == classes[path].__name__ for path, module in model.named_modules())
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[path] for path, parameter in model.named_parameters())

    fastformer.restore(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert all(vars(module)[key] is value for key, value in attributes[path].items())
    assert [config._attn_implementation for config in configurations(model)] == implementations


def configurations(model: nn.Module) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


@pytest.mark.quick
def test_report_is_printed_and_machine_readable() -> None:
    report = fastformer.accelerate(MODELS["BART"].build())
    assert isinstance(report, Acceleration)
    found = json.loads(report.to_json())
    assert found["model"] == "BartForConditionalGeneration"
    layer = next(made for made in found["decisions"] if made["module"] == "model.encoder.layers.0.self_attn_layer_norm")
    assert (layer["part"], layer["replaced"], layer["class_name"]) == ("normalisation", True, "LayerNorm")
    assert "replaced 12 x LayerNorm (normalisation): fastformer.layer_norm" in str(report)
    assert len(report.replaced) + len(report.left) == len(report.decisions)


def test_again_changes_nothing() -> None:
    model = MODELS["BERT"].build()
    first = fastformer.accelerate(model)
    classes = [type(module) for module in model.modules()]
    second = fastformer.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert {(made.module, made.part) for made in second.replaced} == {
        (made.module, made.part) for made in first.replaced
    }


def test_model_and_generators_are_not_touched_by_probing() -> None:
    model = MODELS["BERT"].build().train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    fastformer.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_recognised_in_any_dtype(dtype: torch.dtype) -> None:
    expected = fastformer.accelerate(MODELS["Llama"].build())
    report = fastformer.accelerate(MODELS["Llama"].build().to(dtype))
    assert report.replaced == expected.replaced


@pytest.mark.parametrize(
    ("name", "left"), [("T5", set()), ("BERT", {"embeddings"}), ("Llama", {"rotary position embedding"})]
)
def test_recognised_before_its_weights_are_loaded(name: str, left: set[str]) -> None:
    with torch.device("meta"):
        model = MODELS[name].build()
    report = fastformer.accelerate(model)
    # Parameters on the meta device do not matter. Buffers do, because their values are not known yet.
    assert {made.part for made in report.left} == left
    assert all("meta device" in made.detail for made in report.left)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_recognised_whatever_holds_around_it(device: torch.device) -> None:
    model, expected = MODELS["Llama"].build(), fastformer.accelerate(MODELS["Llama"].build())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16), torch.device("meta"):
            report = fastformer.accelerate(model)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert report == expected


def test_layers_of_one_structure_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[nn.Module] = []
    recognise = feed_forward.recognise

    def counting(module: nn.Module) -> Any:
        found = recognise(module)
        if found is not None:
            looked_at.append(module)
        return found

    monkeypatch.setattr(model_module, "_RECOGNISERS", [("feed-forward", counting)])
    model = MODELS["Llama"].build()
    report = fastformer.accelerate(model)
    assert len(looked_at) == 1
    assert sum(made.part == "feed-forward" for made in report.replaced) == 2


class TestTraining:
    """Tests of dropout, of hooks, and of projections that become something else."""

    def model(self) -> nn.Module:
        return MODELS["BERT"].build().train()

    def test_dropout_drops_and_keeps_the_expectation(self) -> None:
        layer = MODELS["BERT"].build().bert.encoder.layer[0].output
        layer.dropout.p = 0.5
        fastformer.accelerate(layer)
        hidden, residual = torch.randn(64, 48), torch.zeros(64, 32)
        layer.train()
        with fastformer.backend("triton"), torch.no_grad():
            first, second = layer(hidden, residual), layer(hidden, residual)
            layer.eval()
            assert torch.equal(layer(hidden, residual), layer(hidden, residual))
        assert not torch.equal(first, second)

    def test_a_projection_with_a_hook_is_called(self) -> None:
        mlp = MODELS["Llama"].build().model.layers[0].mlp
        fastformer.accelerate(mlp)
        input = torch.randn(2, 3, 32)
        mlp.up_proj.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        with fastformer.backend("triton"):
            assert not mlp(input).any()

    def test_hooks_of_the_module_run(self) -> None:
        norm = nn.LayerNorm(8)
        seen: list[torch.Tensor] = []
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        fastformer.accelerate(norm)
        with fastformer.backend("triton"):
            output = norm(torch.randn(3, 8))
        assert seen[0] is output

    def test_gradient_checkpointing(self) -> None:
        model, batch = MODELS["Llama"].build(), MODELS["Llama"].batch()
        expected = results(model.train(), batch)
        fastformer.accelerate(model)
        model.gradient_checkpointing_enable()
        with fastformer.backend("triton"):
            assert_same(results(model, batch), expected)

    def test_autocast(self, device: torch.device) -> None:
        model, batch = MODELS["Llama"].build(), MODELS["Llama"].batch()
        fastformer.accelerate(model)
        with torch.autocast(device.type, torch.bfloat16):
            expected = model(**batch).logits
            with fastformer.backend("triton"):
                actual = model(**batch).logits
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.3)


class TestCopies:
    """Tests that an accelerated model is saved, copied and compiled as any other model."""

    def test_deepcopy(self) -> None:
        model = MODELS["BERT"].build()
        fastformer.accelerate(model)
        twin = copy.deepcopy(model)
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        fastformer.restore(twin)
        assert not any(isinstance(module, Accelerated) for module in twin.modules())
        assert twin.config._attn_implementation == "eager"
        assert model.config._attn_implementation == "fastformer"

    @pytest.mark.parametrize("name", ["BERT", "GPT-NeoX", "GPT-2"])
    def test_pickle(self, name: str) -> None:
        model, batch = MODELS[name].build(), MODELS[name].batch()
        expected = model(**batch).logits
        fastformer.accelerate(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
        torch.testing.assert_close(loaded(**batch).logits, expected)

    def test_save_pretrained(self, tmp_path: Path) -> None:
        model, batch = MODELS["BERT"].build(), MODELS["BERT"].batch()
        fastformer.accelerate(model)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
        loaded = type(model).fastformer_original.from_pretrained(tmp_path).eval()
        assert not any(isinstance(module, Accelerated) for module in loaded.modules())
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("by_operators", [False, True])
    @pytest.mark.parametrize("name", ["BERT", "Llama"])
    def test_compile(self, name: str, by_operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = MODELS[name].build(), MODELS[name].batch()
        expected = results(model, batch)
        fastformer.accelerate(model)
        if by_operators:
            for module in (swapping, rotary, losses):
                monkeypatch.setattr(module, "use_triton", lambda tensor: True)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        actual = results(compiled, batch)
        assert_same({name.replace("_orig_mod.", ""): tensor for name, tensor in actual.items()}, expected)


class TestLookAlikes:
    """Tests of modules that differ in one thing from what the operators compute: they are left, with that reason."""

    def left(self, module: nn.Module) -> dict[str, str]:
        report = fastformer.accelerate(module)
        assert not isinstance(module, Accelerated)
        return {made.part: made.detail for made in report.left if not made.module}

    @pytest.mark.parametrize("activation", ["quick_gelu", "tanh", "relu6", "mish"])
    def test_another_activation(self, activation: str) -> None:
        module = nn.Sequential(nn.Linear(8, 12), ACT2FN[activation], nn.Linear(12, 8))
        assert "computes no feed-forward" in self.left(module)["feed-forward"]

    def test_gates_that_are_activated_after_the_product(self) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.c(F.silu(self.a(x) * self.b(x)))

        assert "computes no feed-forward" in self.left(Gated())["feed-forward"]

    def test_a_residual_inside(self) -> None:
        class Residual(nn.Sequential):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return input + super().forward(input)

        module = Residual(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        assert "computes no feed-forward" in self.left(module)["feed-forward"]

    def test_dropout_of_the_input(self) -> None:
        module = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        assert "drops elements in training elsewhere" in self.left(module)["feed-forward"]

    def test_dropout_by_a_function(self) -> None:
        class Dropping(nn.Sequential):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return F.dropout(super().forward(input), 0.5, self.training)

        module = Dropping(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        assert "drops elements in training elsewhere" in self.left(module)["feed-forward"]

    @pytest.mark.parametrize(
        "formula",
        [
            lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight,
            lambda x, weight, eps: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight,
            lambda x, weight, eps: (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).detach() * weight,
            lambda x, weight, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (2.0 + weight),
            lambda x, weight, eps: x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight,
        ],
    )
    def test_another_norm(self, formula: Callable[..., torch.Tensor]) -> None:
        class Norm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return formula(x, self.weight, self.eps)

        assert "neither LayerNorm nor RMSNorm" in self.left(Norm())["normalisation"]

    def test_another_residual(self) -> None:
        class Output(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dense, self.norm, self.dropout = nn.Linear(12, 8), nn.LayerNorm(8), nn.Dropout(0.1)

            def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
                return self.norm(self.dropout(self.dense(hidden) + residual))

        assert "elsewhere than before the residual" in self.left(Output())["residual and normalisation"]

    def test_another_rotation(self) -> None:
        model = MODELS["Llama"].build()
        attention = model.model.layers[0].self_attn
        original = type(attention)
        own = global_names(original.forward)["apply_rotary_pos_emb"]

        def backwards(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
            return own(q, k, cos, -sin, unsqueeze_dim=unsqueeze_dim)

        forward = rebind(original.forward, {"apply_rotary_pos_emb": backwards})
        attention.__class__ = type("Backwards", (original,), {"forward": forward})
        left = {made.module: made.detail for made in fastformer.accelerate(model).left}
        assert left["model.layers.0.self_attn"] == "apply_rotary_pos_emb is another rotation"

    def test_a_forward_of_the_instance(self) -> None:
        norm = nn.LayerNorm(8)
        norm.forward = lambda input: input  # type: ignore[method-assign]
        assert self.left(norm) == {"forward": "its forward has been replaced already"}


class TestPlainModules:
    """Tests of PyTorch's own classes, and of structures that no library has."""

    @pytest.fixture(
        params=[
            lambda: nn.LayerNorm(8),
            lambda: nn.LayerNorm(8, bias=False),
            lambda: nn.RMSNorm(8),
            lambda: nn.RMSNorm(8, eps=1e-5),
            lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.0), nn.Linear(12, 8), nn.Dropout(0.0)),
            lambda: nn.Sequential(nn.Linear(8, 12, bias=False), nn.GELU("tanh"), nn.Linear(12, 4)),
        ]
    )
    def module(self, request: pytest.FixtureRequest) -> Iterator[nn.Module]:
        return request.param()

    def test_forward_and_backward(self, module: nn.Module) -> None:
        reference = copy.deepcopy(module)
        assert fastformer.accelerate(module).replaced[0].module == ""
        input = torch.randn(2, 5, 8, requires_grad=True)
        with fastformer.backend("triton"):
            actual = module(input)
            gradients = torch.autograd.grad(actual.sin().sum(), [input, *module.parameters()])
        expected = reference(input)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.sin().sum(), [input, *reference.parameters()])
        )


class TestLanguageModelLoss:
    """Tests of the loss in transformers' Trainer, which sums and divides by `num_items_in_batch`."""

    @pytest.mark.parametrize("name", ["Llama", "ModernBERT"])
    @pytest.mark.parametrize("items", [7, torch.tensor(7)])
    def test_num_items_in_batch(self, name: str, items: Any, backend: str) -> None:
        model, batch, items = MODELS[name].build(), MODELS[name].batch(), here(items)
        expected = model(**batch, num_items_in_batch=items).loss
        fastformer.accelerate(model)
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, expected)

    def test_a_loss_that_was_set_is_set_again(self) -> None:
        model = MODELS["Llama"].build()
        model.loss_function = own = model.loss_function
        fastformer.accelerate(model)
        assert model.loss_function is not own
        fastformer.restore(model)
        assert vars(model)["_loss_function"] is own

    def test_another_loss_is_left(self) -> None:
        model = MODELS["Llama"].build()
        model.loss_function = own = lambda logits, labels, vocab_size, **_: logits.square().mean()
        assert "not the cross-entropy" in next(made.detail for made in fastformer.accelerate(model).left)
        assert model.loss_function is own


def test_a_class_that_was_changed_again_is_not_restored() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    fastformer.accelerate(model)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    classes = [type(module) for module in model]
    with pytest.raises(ValueError, match="1: the class was changed after acceleration"):
        fastformer.restore(model)
    assert [type(module) for module in model] == classes


def test_parameters_of_another_dtype_run_the_layer_s_own_forward() -> None:
    """Parameters in float64 are no error: the layer's own forward runs, as the operators do not take float64."""
    model = MODELS["Llama"].build().double()
    fastformer.accelerate(model)
    model.config._attn_implementation = "eager"
    batch = MODELS["Llama"].batch()
    with fastformer.backend("triton"):
        actual = model(**batch).logits
    torch.testing.assert_close(actual, model(**batch).logits)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got str"):
        fastformer.accelerate("bert-base-uncased")  # type: ignore[arg-type]
