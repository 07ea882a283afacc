"""The installed `kernels` package loads and uses the exported kernel."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import need_kernels
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

import fastformer
from fastformer.integrations.hub import export as hub
from fastformer.integrations.hub import layers as hub_layers

# A checkout may have a folder of that name, which is not the package.
pytest.importorskip("kernels.layer", reason="needs Hugging Face's package kernels")
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)

pytestmark = pytest.mark.cpu

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, as transformers' `apply_rotary_pos_emb` does."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "kernel"
    hub.export(path)
    return path


@pytest.fixture(scope="module")
def kernel(folder: Path) -> ModuleType:
    return get_local_kernel(folder)


@pytest.fixture(params=["torch", "triton"])
def on_both_backends(kernel: ModuleType, request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test once on every backend of the kernel, which has its own switch of backends."""
    if request.param == "triton":
        need_kernels()
    with kernel.backends.backend(request.param):
        yield


def mapped(folder: Path, *names: str) -> Any:
    return use_kernel_mapping({name: {"cpu": LocalLayerRepository(folder, layer_name=name)} for name in names})


def assert_same(actual: Tensor, expected: Tensor, arguments: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(output.sin().sum(), arguments) for output in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("RMSNorm", LlamaRMSNorm(16)),
        ("RMSNorm", nn.RMSNorm(16, eps=1e-5)),
        ("RMSNormZeroCentered", Gemma2RMSNorm(16)),
        ("LayerNorm", nn.LayerNorm(16)),
        ("SwiGLU", LlamaMLP(LlamaConfig(**SIZES))),
        ("GeGLU", Gemma2MLP(Gemma2Config(**SIZES))),
    ],
)
@pytest.mark.usefixtures("on_both_backends")
def test_layer(kernel: ModuleType, name: str, module: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25)
    input = torch.randn(2, 3, 16, requires_grad=True)
    layer = getattr(kernel.layers, name)
    assert_same(layer.forward(module, input), module(input), [input, *module.parameters()])


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.usefixtures("on_both_backends")
def test_rotary_layer(kernel: ModuleType, unsqueeze_dim: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2))
    angles = torch.randn(2, 5, 4).repeat(1, 1, 2)
    given = [x if unsqueeze_dim == 1 else x.transpose(1, 2) for x in (q, k)]
    rotated = kernel.layers.rotary_pos_emb()(*given, angles.cos(), angles.sin(), unsqueeze_dim)
    expected = rotate(*given, angles.cos(), angles.sin(), unsqueeze_dim)
    assert_same(*(torch.cat([x.flatten() for x in both]) for both in (rotated, expected)), [q, k])


def test_norm_of_a_wider_weight_has_its_dtype(kernel: ModuleType) -> None:
    norm, input = LlamaRMSNorm(16), torch.randn(3, 16, dtype=torch.bfloat16)
    assert kernel.layers.RMSNorm.forward(norm, input).dtype == norm(input).dtype == torch.float32


@pytest.fixture
def named_classes() -> Iterator[None]:
    """Give classes the names of kernels.

    transformers gives the names only for the versions of `kernels` that it accepts.
    """
    given = {LlamaRMSNorm: "RMSNorm", LlamaMLP: "SwiGLU", nn.LayerNorm: "LayerNorm"}
    before = {cls: {**vars(cls)} for cls in given}
    for cls, name in given.items():
        replace_kernel_forward_from_hub(cls, name)
    yield
    for cls, attributes in before.items():
        for attribute in ("kernel_layer_name", "kernel_condition"):
            delattr(cls, attribute)
            if attribute in attributes:
                setattr(cls, attribute, attributes[attribute])


@pytest.mark.usefixtures("named_classes")
def test_kernelize_a_model(folder: Path, kernel: ModuleType) -> None:
    torch.manual_seed(0)
    options = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 40, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**options))
    ids = torch.randint(40, (2, 6))
    kernelized = copy.deepcopy(model)
    with mapped(folder, "RMSNorm", "SwiGLU"):
        # Other named classes, for which we have no kernel, run as they are.
        kernelize(kernelized, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
    ours = {type(m).__name__ for m in kernelized.modules() if m.forward.__module__ == kernel.layers.__name__}
    assert ours == {"LlamaRMSNorm", "LlamaMLP"}
    outputs = [each(input_ids=ids, labels=ids) for each in (kernelized, model)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(output.loss, list(each.parameters()))
        for output, each in zip(outputs, (kernelized, model), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("named_classes")
def test_kernelize_a_class_of_pytorch(folder: Path, kernel: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    input = torch.randn(3, 16)
    expected = model(input)
    with mapped(folder, "LayerNorm"):
        kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
    assert model[1].forward.__module__ == kernel.layers.__name__
    torch.testing.assert_close(model(input), expected)


def test_kernelize_a_function(folder: Path, kernel: ModuleType) -> None:
    function = use_kernel_forward_from_hub("rotary_pos_emb")(rotate)

    @use_kernelized_func(function)
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return function(q, k, cos, sin)

    attention, angles = Attention(), torch.randn(2, 5, 4).repeat(1, 1, 2)
    given = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), angles.cos(), angles.sin())
    expected = attention(*given)
    with mapped(folder, "rotary_pos_emb"):
        kernelize(attention, mode=Mode.TRAINING, device="cpu", use_fallback=False)
    assert function.forward.__module__ == kernel.layers.__name__
    torch.testing.assert_close(attention(*given), expected)


def test_without_fastformer(folder: Path) -> None:
    """In a Python that has no Fastformer the kernel loads and runs."""
    code = (
        "import sys\n"
        "sys.modules['fastformer'] = sys.modules['fastformer_kernels'] = None\n"
        "import torch; from pathlib import Path; from kernels import get_local_kernel\n"
        f"layers = get_local_kernel(Path({str(folder)!r})).layers\n"
        "norm, x = torch.nn.LayerNorm(8), torch.randn(3, 8)\n"
        "torch.testing.assert_close(layers.LayerNorm.forward(norm, x), norm(x))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_beside_fastformer_itself(kernel: ModuleType) -> None:
    """The kernel and Fastformer work in one process: the kernel's operators have their own namespace."""
    norm, input = nn.LayerNorm(8), torch.randn(3, 8)
    expected = fastformer.layer_norm(input, (8,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(kernel.layers.LayerNorm.forward(norm, input), expected)
    torch.testing.assert_close(fastformer.layer_norm(input, (8,), norm.weight, norm.bias, norm.eps), expected)


def test_no_file_of_the_kernel_names_fastformer_as_a_package(folder: Path) -> None:
    assert {path.parent.name for path in folder.glob("build/*/metadata.json")} == {
        f"torch-{backend}" for backend in hub.BACKENDS
    }
    sources = [file.read_text() for file in folder.rglob("*.py")]
    assert not any("from fastformer" in source or '"fastformer::' in source for source in sources)


def test_readme_describes_every_layer(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    for name in ("RMSNorm", "RMSNormZeroCentered", "LayerNorm", "SwiGLU", "GeGLU", "rotary_pos_emb"):
        assert f"- `{name}`: {getattr(hub_layers, name).__doc__}" in readme


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="DIR must be a folder that does not exist yet"):
        hub.export(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
