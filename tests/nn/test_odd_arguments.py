"""Arguments at the limits of what torch.nn accepts are accepted here too, with the same meaning."""

from __future__ import annotations

import pytest
import torch

import fastformer
import fastformer.nn


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_of_everything(norm_first: bool) -> None:
    """A layer that drops everything consists of its residuals and norms alone, as in torch.nn."""
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 20, dropout=1.0, norm_first=norm_first)
    ours = fastformer.nn.TransformerEncoderLayer(16, 4, 20, dropout=1.0, norm_first=norm_first)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 16)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for layer, leaf in zip((ours, theirs), leaves, strict=True):
        layer(leaf).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operators_that_drop_everything(backend: str) -> None:
    x, weight = torch.randn(1, 2, 4, 8), torch.randn(8, 8)
    with fastformer.backend(backend):
        assert not fastformer.attention(x, x, x, dropout_p=1.0).any()
        assert not fastformer.feed_forward(x, weight, weight, output_dropout_p=1.0).any()
        total = fastformer.rms_norm(x, (8,), residual=x, dropout_p=1.0)[1]
        assert not fastformer.transformer_embedding(torch.zeros(1, 3, dtype=torch.int64), weight, dropout_p=1.0).any()
    torch.testing.assert_close(total, x)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_a_softmax_takes_the_dimensions_that_torch_takes(name: str) -> None:
    for shape in ((), (4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)):
        x = torch.randn(shape)
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            torch.testing.assert_close(getattr(fastformer.nn, name)()(x), getattr(torch.nn, name)()(x))
        torch.testing.assert_close(getattr(fastformer.nn, name)(-1)(x), getattr(torch.nn, name)(-1)(x))


def test_a_loss_takes_classes_in_bytes() -> None:
    logits, target = torch.randn(4, 7), torch.tensor([0, 6, 3, 3], dtype=torch.uint8)
    expected = torch.nn.CrossEntropyLoss()(logits, target)
    torch.testing.assert_close(fastformer.nn.CrossEntropyLoss()(logits, target), expected)


@pytest.mark.parametrize("dtype, head_dim", [(torch.float64, 8), (torch.float32, 300)])
def test_attention_beyond_the_operator_is_pytorchs(dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, head_dim, dtype=dtype)
    options = {"is_causal": True, "scale": torch.tensor(0.5)}
    found = fastformer.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, **options))
