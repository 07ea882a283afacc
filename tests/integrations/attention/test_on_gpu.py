"""On a GPU, a transformers model takes PyTorch's attention exactly where `fastformer tune` found it faster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastformer_kernels.attention.plan import AttentionPlan, attention_plan
from fastformer_kernels.configurations import forced, forget_plans_read, shipped_defaults
from torch import Tensor

import fastformer
import fastformer.integrations.attention.forward as attention_module
from fastformer.integrations.attention import on_cpu, on_gpu
from fastformer.integrations.attention.forward import attention_forward
from fastformer.integrations.attention.mask import MaskStructure
from fastformer.kernel_reports.tuning.results import store_plans

pytestmark = pytest.mark.cpu

CAUSAL, FULL = MaskStructure(causal=True), MaskStructure()
PYTORCH = {"attention_plan": AttentionPlan(fastformer=False)}
CUDNN = {"attention_plan": AttentionPlan(fastformer=False, cudnn=True)}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors of a CPU count as a GPU's for the choice alone."""
    monkeypatch.setattr(on_gpu, "_runs_on_gpu", lambda query: True)
    monkeypatch.setattr(on_cpu, "leaves_choice", lambda query: False)
    with fastformer.backend("auto"):
        yield


def tensors(queries: int = 8, keys: int = 8, heads: int = 2, width: int = 16, **options: Any) -> tuple[Tensor, ...]:
    return (
        torch.randn(2, 2, queries, 16, **options),
        torch.randn(2, heads, keys, 16, **options),
        torch.randn(2, heads, keys, width, **options),
    )


def choice(structure: MaskStructure | None, *given: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Any:
    query, key, value = given or tensors()
    return on_gpu.choose(structure, query, key, value, bias, dropout_p)


@pytest.mark.parametrize("structure", [CAUSAL, FULL], ids=["causal", "full"])
def test_ours_runs_where_nothing_was_measured(structure: MaskStructure) -> None:
    assert choice(structure) is None


@pytest.mark.parametrize("structure", [CAUSAL, FULL], ids=["causal", "full"])
def test_what_was_measured_decides(structure: MaskStructure) -> None:
    with forced(PYTORCH):
        assert choice(structure) == (None, structure.causal, False)
    with forced(CUDNN):
        assert choice(structure) == (None, structure.causal, True)


OTHERS: dict[str, tuple[Any, ...]] = {
    "dense mask": (None,),
    "window": (MaskStructure(causal=True, window=(3, None)),),
    "chunk": (MaskStructure(causal=True, chunk=4),),
    "padding": (MaskStructure(key_mask=torch.ones(2, 1, 1, 8, dtype=torch.bool)),),
    "lengths": (MaskStructure(key_lengths=torch.tensor([3, 8])),),
    "packed": (MaskStructure(causal=True, cu_seqlens_q=torch.tensor([0, 4, 8]), cu_seqlens_k=torch.tensor([0, 4, 8])),),
    "cache": (CAUSAL, *tensors(queries=1)),
    "cross-attention": (FULL, *tensors(keys=9)),
    "narrow values": (FULL, *tensors(width=8)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_ours_runs_for_what_is_not_measured(name: str) -> None:
    with forced(PYTORCH):
        assert choice(*OTHERS[name]) is None


def test_ours_runs_with_bias_dropout_determinism_and_a_chosen_backend() -> None:
    with forced(PYTORCH):
        assert choice(CAUSAL, bias=torch.zeros(1, 1, 8, 8)) is None
        assert choice(CAUSAL, dropout_p=0.1) is None
        torch.use_deterministic_algorithms(True)
        try:
            assert choice(CAUSAL) is None
        finally:
            torch.use_deterministic_algorithms(False)
        for name in ("torch", "triton"):
            with fastformer.backend(name):
                assert choice(CAUSAL) is None


def test_classes_tell_apart_what_changes_the_speed() -> None:
    query, key, _ = tensors()
    variants = [
        (query, key, True, True),
        (query, key, True, False),
        (query, key, False, True),
        (query, key[:, :1], True, True),
        (query.bfloat16(), key.bfloat16(), True, True),
        (torch.zeros(1, 2, 8, 80), torch.zeros(1, 2, 8, 80), True, True),
        (torch.zeros(1, 2, 600, 16), torch.zeros(1, 2, 600, 16), True, True),
    ]
    with shipped_defaults() as asked:
        for a, b, causal, trained in variants:
            attention_plan(a, b, causal=causal, trained=trained)
    assert len(asked) == len(variants)


def test_a_stored_plan_is_used_for_its_class_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFORMER_CACHE", str(tmp_path))
    with shipped_defaults() as asked:
        choice(CAUSAL)
    (key,) = asked
    store_plans(tmp_path / "plans.json", "interpreter", {key: {"fastformer": False, "cudnn": True}})
    forget_plans_read()
    try:
        assert choice(CAUSAL) == (None, True, True)
        assert choice(CAUSAL, *tensors(requires_grad=True)) is None
        with torch.no_grad():
            assert choice(CAUSAL, *tensors(requires_grad=True)) == (None, True, True)
        assert choice(FULL) is None
    finally:
        forget_plans_read()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("plan", [None, PYTORCH, CUDNN], ids=["ours", "pytorch", "cudnn"])
def test_a_layer_computes_the_same_whichever_runs(plan: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = attention_module.sdpa_attention_forward

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        called.append("sdpa")
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_module, "sdpa_attention_forward", sdpa)
    layer = torch.nn.Module()
    layer.is_causal = True  # type: ignore[assignment]
    torch.manual_seed(0)
    given = tensors(queries=40, keys=40, requires_grad=True)
    expected = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True).transpose(1, 2)

    def run(*inputs: Tensor) -> Tensor:
        return attention_forward(layer, *inputs, None)[0]

    torch.compiler.reset()  # the plan of an earlier case is a constant in its graph
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with forced(plan or {"attention_plan": AttentionPlan(fastformer=True)}):
        output = run(*given)
    assert ("sdpa" in called) == (plan is not None)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, given, weights), torch.autograd.grad(expected, given, weights)
    )


def test_a_compiled_layer_takes_other_lengths() -> None:
    layer = torch.nn.Module()
    layer.is_causal = True  # type: ignore[assignment]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(*inputs: Tensor) -> Tensor:
        return attention_forward(layer, *inputs, None)[0]

    for length in (40, 48, 600, 33):
        given = tensors(queries=length, keys=length)
        with forced(PYTORCH):
            output = run(*given)
        expected = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)
        torch.testing.assert_close(output, expected.transpose(1, 2))
