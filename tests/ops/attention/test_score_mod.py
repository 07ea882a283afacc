"""Attention with a function of the user's own, on both backends, and the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from accuracy import assert_as_accurate
from processes import python
from torch import Tensor

import fastformer
from fastformer import ScoreMod
from fastformer.registry.score_mod import DECAY


@triton.jit
def squash(score, b, h, q, k):
    """score / (1 + |score|) * (b + h + 1) + 0.01 q - 0.02 k."""
    return score / (1.0 + tl.abs(score)) * (b + h + 1) + 0.01 * q - 0.02 * k


@triton.jit
def squash_gradient(dscore, score, b, h, q, k):
    size = 1.0 + tl.abs(score)
    return dscore * (b + h + 1) / (size * size)


def squash_reference(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score / (1.0 + score.abs()) * (b + h + 1) + 0.01 * q - 0.02 * k


SQUASH = ScoreMod(squash, squash_gradient, squash_reference)


def exact(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, causal: bool) -> Tensor:
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    b, h, q, k = (torch.arange(n).view(-1, *(1,) * (3 - i)) for i, n in enumerate(scores.shape))
    scores = squash_reference(scores, b, h, q, k)
    if causal:
        scores = scores.masked_fill(k > q + key.shape[2] - query.shape[2], float("-inf"))
    return scores.softmax(-1) @ value


def with_gradients(function: Any, tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("softcap", "causal"), [(None, False), (2.0, True)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_values_and_gradients(backend: str, softcap: float | None, causal: bool, deterministic: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, size, 8) for heads, size in ((4, 21), (2, 37), (2, 37))]
    weight = torch.randn(2, 4, 21, 8)
    options = {"softcap": softcap, "causal": causal}
    torch.use_deterministic_algorithms(deterministic)
    try:
        with fastformer.backend(backend):
            actual = with_gradients(
                lambda *leaves: fastformer.attention(*leaves, score_mod=SQUASH, **options), tensors, weight
            )
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = with_gradients(lambda *leaves: exact(*leaves, **options), [each.double() for each in tensors], weight)
    pytorch = with_gradients(lambda *leaves: exact(*leaves, **options), tensors, weight)
    for name, a, p, e in zip(("output", "query", "key", "value"), actual, pytorch, wanted, strict=True):
        assert_as_accurate(f"{backend} {name}", a, p, e, scale=4 * 37**0.5)


def test_with_a_block_mask_and_packed() -> None:
    """Indices count within a sequence; both backends agree."""
    torch.manual_seed(0)
    tensors = [torch.randn(30, heads, 8) for heads in (2, 1, 1)]
    packed = {"cu_seqlens_q": torch.tensor([0, 11, 30], dtype=torch.int32), "max_seqlen_q": 19}
    dense = [tensor[None].transpose(1, 2) for tensor in tensors]
    mask = fastformer.BlockMask.from_mask(torch.rand(30, 30) > 0.5)
    for inputs, options in ((tensors, packed), (dense, {"mask": mask})):
        weight = torch.randn(*inputs[0].shape[:-1], 8)
        results = []
        for backend in ("triton", "torch"):
            with fastformer.backend(backend):
                results.append(
                    with_gradients(
                        lambda *leaves, options=options: fastformer.attention(*leaves, score_mod=SQUASH, **options),
                        inputs,
                        weight,
                    )
                )
        torch.testing.assert_close(*results)


@triton.jit
def later_keys(score, b, h, q, k):
    return tl.where(k >= q + 20, score, float("-inf"))


@triton.jit
def later_keys_gradient(dscore, score, b, h, q, k):
    return tl.where(k >= q + 20, dscore, 0.0)


def later_keys_reference(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(k >= q + 20, score, float("-inf"))


LATER_KEYS = ScoreMod(later_keys, later_keys_gradient, later_keys_reference)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_minus_infinity_hides_a_key(backend: str) -> None:
    """The first tiles of keys are all hidden, and the last queries see nothing: they give zeros."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 50, 8) for _ in range(3)]
    seen = torch.arange(50) >= torch.arange(50)[:, None] + 20
    weight = torch.randn(1, 2, 50, 8)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~seen, float("-inf"))
        return scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1).where(seen, 0.0) @ value

    with fastformer.backend(backend):
        actual = with_gradients(lambda *leaves: fastformer.attention(*leaves, score_mod=LATER_KEYS), tensors, weight)
    wanted = with_gradients(plain, [each.double() for each in tensors], weight)
    pytorch = with_gradients(plain, tensors, weight)
    for name, a, p, e in zip(("output", "query", "key", "value"), actual, pytorch, wanted, strict=True):
        assert_as_accurate(f"{backend} {name}", a, p, e, scale=4 * 50**0.5)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(fastformer.attention, fullgraph=True, backend="aot_eager")
    query, key, value = torch.randn(3, 1, 2, 9, 16)
    expected = fastformer.attention(query, key, value, score_mod=SQUASH)
    torch.testing.assert_close(compiled(query, key, value, score_mod=SQUASH), expected)


@pytest.mark.quick
def test_what_is_wrong_is_said() -> None:
    query = torch.randn(1, 1, 3, 8)
    with pytest.raises(TypeError, match=r"score_mod must be a fastformer\.ScoreMod; got function"):
        fastformer.attention(query, query, query, score_mod=squash_reference)
    with pytest.raises(TypeError, match="forward and backward must be given together"):
        ScoreMod(squash)
    with pytest.raises(TypeError, match="forward and backward, or reference, must be given"):
        ScoreMod()
    with pytest.raises(TypeError, match=r"forward must be a @triton.jit function; got function"):
        ScoreMod(squash_reference, squash_reference)
    with pytest.raises(TypeError, match="reference must be a function; got int"):
        ScoreMod(reference=3)
    slope = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"reference must not use tensors that learn.*got slope"):
        ScoreMod(reference=lambda score, b, h, q, k: score * slope)
    for result, error, message in (
        (lambda score: None, TypeError, " a tensor; got NoneType"),
        (lambda score: score.double(), ValueError, "shape and dtype, .*; got .* and torch.float64"),
        (lambda score: score[..., :1], ValueError, r"\(1, 1, 3, 3\) and .*; got \(1, 1, 3, 1\)"),
    ):
        mod = ScoreMod(reference=lambda score, b, h, q, k, result=result: result(score))
        with pytest.raises(error, match=f"score_mod's reference must return.*{message}"):
            fastformer.attention(query, query, query, score_mod=mod)
    for backend, mod, missing in (
        ("torch", ScoreMod(squash, squash_gradient), "reference"),
        ("triton", ScoreMod(reference=squash_reference), "forward and backward"),
    ):
        with fastformer.backend(backend), pytest.raises(ValueError, match=f"score_mod needs its {missing}"):
            fastformer.attention(query, query, query, score_mod=mod)


def test_a_pickled_one_works_in_another_process(tmp_path: Path) -> None:
    query = torch.randn(1, 1, 3, 8)
    mod = ScoreMod(reference=DECAY.reference)
    torch.save((mod, query), tmp_path / "mod.pt")
    script = """
import sys, torch, fastformer
mod, query = torch.load(sys.argv[1], weights_only=False)
torch.save(fastformer.attention(query, query, query, score_mod=mod), sys.argv[1])
"""
    done = python("-c", script, str(tmp_path / "mod.pt"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "mod.pt"), fastformer.attention(query, query, query, score_mod=mod))


@pytest.mark.quick
def test_the_same_functions_share_their_key() -> None:
    assert ScoreMod(squash, squash_gradient, squash_reference).key == SQUASH.key
    assert ScoreMod(squash_gradient, squash, squash_reference).key != SQUASH.key
