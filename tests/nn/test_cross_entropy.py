"""The loss modules give the same as their twins in torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import here

from fastformer.nn import CrossEntropyLoss, LinearCrossEntropyLoss
from fastformer.ops.linear_cross_entropy import linear_cross_entropy

HAS_PYTORCHS_OWN = hasattr(torch.nn, "LinearCrossEntropyOptions")
needs_pytorchs_own = pytest.mark.skipif(
    not HAS_PYTORCHS_OWN, reason=f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyLoss"
)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 1}, {"weight": torch.rand(5)}])
def test_cross_entropy_loss_equals_its_twin(options: dict[str, Any], reduction: str) -> None:
    options = here(options)
    ours = CrossEntropyLoss(**options, reduction=reduction)
    theirs = torch.nn.CrossEntropyLoss(**options, reduction=reduction)
    ours.load_state_dict(theirs.state_dict())
    logits, target = torch.randn(3, 5, 2, requires_grad=True), torch.randint(0, 5, (3, 2))
    losses = ours(logits, target), theirs(logits, target)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits) for loss in losses))


def test_cross_entropy_loss_passes_its_own_options_on() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    capped = torch.tanh(logits / 2) * 2
    expected = torch.nn.functional.cross_entropy(capped, target) + 0.1 * capped.logsumexp(1).square().mean()
    torch.testing.assert_close(CrossEntropyLoss(z_loss=0.1, softcap=2.0)(logits, target), expected)
    leaf = logits.clone().requires_grad_()
    overwritten = leaf * 1
    CrossEntropyLoss(inplace=True)(overwritten, target).backward()
    torch.testing.assert_close(overwritten.detach(), leaf.grad)


@needs_pytorchs_own
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 1}, {"weight": torch.rand(5)}])
def test_linear_cross_entropy_loss_equals_its_twin(options: dict[str, Any], reduction: str) -> None:
    options = here(options)
    ours = LinearCrossEntropyLoss(4, 5, bias=True, **options, reduction=reduction)
    theirs = torch.nn.LinearCrossEntropyLoss(4, 5, bias=True, **options, reduction=reduction)
    ours.load_state_dict(theirs.state_dict())
    input, target = torch.randn(6, 4), torch.randint(0, 5, (6,))
    losses = ours(input, target), theirs(input, target)
    torch.testing.assert_close(*losses)
    gradients = (
        torch.autograd.grad(loss.sum(), list(module.parameters()))
        for loss, module in zip(losses, (ours, theirs), strict=True)
    )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 1}, {"weight": torch.rand(5)}])
def test_linear_cross_entropy_loss_equals_its_two_steps(options: dict[str, Any], reduction: str) -> None:
    options = here(options)
    ours = LinearCrossEntropyLoss(4, 5, bias=True, **options, reduction=reduction)
    assert set(ours.state_dict()) == {"linear.weight", "linear.bias"} | options.keys() & {"weight"}
    input, target = torch.randn(6, 4), torch.randint(0, 5, (6,))
    theirs = torch.nn.CrossEntropyLoss(**options, reduction=reduction)(ours.linear(input), target)
    losses = ours(input, target), theirs
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), list(ours.parameters())) for loss in losses))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_replaced_projection_is_called(reduction: str) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    module = LinearCrossEntropyLoss(4, 5, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0)
    input, target = torch.randn(2, 3, 4), torch.randint(0, 5, (2, 3))
    weight = module.linear.weight
    expected = linear_cross_entropy(
        input, weight * 2, target, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0
    )
    module.linear = Doubled(4, 5, bias=False)
    module.linear.weight = weight
    torch.testing.assert_close(module(input, target), expected)


def test_tied_weight_takes_both_gradients() -> None:
    embedding = torch.nn.Embedding(5, 4)
    module = LinearCrossEntropyLoss(4, 5)
    module.linear.weight = embedding.weight
    tokens = torch.tensor([0, 3])
    module(embedding(tokens), tokens).backward()
    expected = torch.nn.functional.cross_entropy(embedding(tokens) @ embedding.weight.T, tokens)
    torch.testing.assert_close(embedding.weight.grad, *torch.autograd.grad(expected, embedding.weight))


@needs_pytorchs_own
def test_what_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    ours = LinearCrossEntropyLoss(4, 5, out_features=(2,))
    theirs = torch.nn.LinearCrossEntropyLoss(4, 5, out_features=(2,))
    ours.load_state_dict(theirs.state_dict())
    input, target = torch.randn(3, 4), torch.randint(0, 5, (3, 2))
    assert torch.equal(ours(input, target), theirs(input, target))
    probabilities = torch.rand(3, 5)
    with pytest.raises(ValueError, match="z_loss, softcap and memory_budget need a target of classes"):
        LinearCrossEntropyLoss(4, 5, z_loss=0.1)(input, probabilities)


@pytest.mark.skipif(HAS_PYTORCHS_OWN, reason=f"torch {torch.__version__} has torch.nn.LinearCrossEntropyLoss")
def test_what_is_left_to_a_pytorch_without_it_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="out_features needs torch"):
        LinearCrossEntropyLoss(4, 5, out_features=(2,))
    with pytest.raises(NotImplementedError, match="class probabilities needs torch"):
        LinearCrossEntropyLoss(4, 5)(torch.randn(3, 4), torch.rand(3, 5))
