"""Under autocast every operator and module gives the dtype that PyTorch's gives, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastformer
import fastformer.nn

pytestmark = pytest.mark.cpu

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def _operators(x: Tensor, weight: Tensor, query: Tensor, ids: Tensor) -> dict[str, Pair]:
    """Return calls of our operators and of PyTorch's on (4, 8), (8, 8), (1, 2, 4, 8) and (1, 4) tensors."""
    target, row = torch.zeros(4, dtype=torch.int64, device=x.device), torch.zeros(8, dtype=x.dtype, device=x.device)
    ours = fastformer
    return {
        "softmax": (lambda: ours.softmax(x), lambda: F.softmax(x, -1)),
        "softmax, masked": (lambda: ours.softmax(x, mask=x > 0), lambda: F.softmax(x, -1)),
        "softmax to a dtype": (
            lambda: ours.softmax(x, dtype=torch.float16),
            lambda: F.softmax(x, -1, dtype=torch.float16),
        ),
        "log_softmax": (lambda: ours.log_softmax(x), lambda: F.log_softmax(x, -1)),
        "layer_norm": (lambda: ours.layer_norm(x, (8,), row, row), lambda: F.layer_norm(x, (8,), row, row)),
        "rms_norm": (lambda: ours.rms_norm(x, (8,), row), lambda: F.rms_norm(x, (8,), row)),
        "cross_entropy": (lambda: ours.cross_entropy(x, target), lambda: F.cross_entropy(x, target)),
        "cross_entropy of rows": (
            lambda: ours.cross_entropy(x, target, reduction="none", label_smoothing=0.1),
            lambda: F.cross_entropy(x, target, reduction="none", label_smoothing=0.1),
        ),
        "feed_forward": (
            lambda: ours.feed_forward(x, weight, weight),
            lambda: F.linear(F.gelu(F.linear(x, weight)), weight),
        ),
        "scaled_dot_product_attention": (
            lambda: ours.scaled_dot_product_attention(query, query, query),
            lambda: F.scaled_dot_product_attention(query, query, query),
        ),
        "transformer_embedding": (
            lambda: ours.transformer_embedding(ids, weight, None, None, row, row),
            lambda: F.layer_norm(F.embedding(ids, weight), (8,), row, row).to(x.dtype),
        ),
    }


def _modules(x: Tensor) -> dict[str, Pair]:
    target, batch, device = torch.zeros(4, dtype=torch.int64, device=x.device), x[None], x.device

    def pair(make: Callable[[object], Callable[[], Tensor]]) -> Pair:
        return make(fastformer.nn), make(nn)

    def layer(kind: str, **options: bool) -> Pair:
        inputs = (batch, batch) if "Decoder" in kind else (batch,)
        return pair(lambda of: lambda: getattr(of, kind)(8, 2, 16, device=device, batch_first=True, **options)(*inputs))

    return {
        "CrossEntropyLoss": pair(lambda of: lambda: of.CrossEntropyLoss()(x, target)),  # type: ignore[attr-defined]
        "LayerNorm": pair(lambda of: lambda: of.LayerNorm(8, device=device)(x)),  # type: ignore[attr-defined]
        "RMSNorm": pair(lambda of: lambda: of.RMSNorm(8, device=device)(x)),  # type: ignore[attr-defined]
        "Softmax": pair(lambda of: lambda: of.Softmax(-1)(x)),  # type: ignore[attr-defined]
        "LogSoftmax": pair(lambda of: lambda: of.LogSoftmax(-1)(x)),  # type: ignore[attr-defined]
        **{
            f"MultiheadAttention, {what}": pair(
                lambda of, place=place: lambda: of.MultiheadAttention(8, 2, device=device)(batch, batch, batch)[place]  # type: ignore[attr-defined]
            )
            for place, what in enumerate(("output", "weights"))
        },
        "TransformerEncoderLayer": layer("TransformerEncoderLayer"),
        "TransformerEncoderLayer, norm first": layer("TransformerEncoderLayer", norm_first=True),
        "TransformerDecoderLayer": layer("TransformerDecoderLayer"),
        "TransformerDecoderLayer, norm first": layer("TransformerDecoderLayer", norm_first=True),
    }


def _devices() -> list[str]:
    """Return the devices on which this PyTorch can have tensors, with or without data."""
    try:
        with FakeTensorMode():
            torch.empty(2, 2, device="cuda")[0].contiguous()
    except RuntimeError:
        return ["cpu"]
    return ["cpu", "cuda"]


@pytest.mark.parametrize("device", _devices())
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_dtypes(device: str, autocast: torch.dtype, wide: bool) -> None:
    """Our operators and PyTorch's give the same dtype under autocast, for a GPU on tensors without data."""
    mode: AbstractContextManager = FakeTensorMode() if device == "cuda" else nullcontext()
    dtype = torch.float32 if wide else autocast
    found, expected = {}, {}
    with mode:
        x, weight, query = (torch.randn(shape, device=device, dtype=dtype) for shape in ((4, 8), (8, 8), (1, 2, 4, 8)))
        ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
        for name, (ours, theirs) in {**_operators(x, weight, query, ids), **_modules(x)}.items():
            with torch.autocast(device, autocast):
                found[name], expected[name] = ours().dtype, theirs().dtype
    assert found == expected


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_beyond_half_precision(reduction: str) -> None:
    torch.manual_seed(0)
    logits = (20000 * torch.randn(64, 300)).clamp(-60000, 60000).half().requires_grad_()
    target = torch.randint(0, 300, (64,))
    with torch.autocast("cpu", torch.float16):
        found = fastformer.nn.CrossEntropyLoss(reduction=reduction)(logits, target)
        expected = F.cross_entropy(logits, target, reduction=reduction)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
