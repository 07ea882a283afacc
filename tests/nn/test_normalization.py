"""LayerNorm, RMSNorm and Softmax give the same as torch.nn's."""

from __future__ import annotations

import pytest
import torch

from fastformer.nn import LayerNorm, RMSNorm, Softmax

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (LayerNorm, torch.nn.LayerNorm, {}),
        (LayerNorm, torch.nn.LayerNorm, {"eps": 1e-2, "bias": False}),
        (LayerNorm, torch.nn.LayerNorm, {"elementwise_affine": False}),
        (RMSNorm, torch.nn.RMSNorm, {}),
        (RMSNorm, torch.nn.RMSNorm, {"eps": 1e-2}),
        (RMSNorm, torch.nn.RMSNorm, {"elementwise_affine": False}),
    ],
)
@pytest.mark.parametrize("shape", [7, (3, 7)])
def test_norm_equals_pytorch(ours: type, theirs: type, options: dict, shape: int | tuple[int, int]) -> None:
    expected, actual = theirs(shape, **options), ours(shape, **options)
    for parameter in expected.parameters():
        torch.nn.init.normal_(parameter)
    actual.load_state_dict(expected.state_dict())
    expected.load_state_dict(actual.state_dict())
    x = torch.randn(5, 3, 7, requires_grad=True)
    results = []
    for module in (actual, expected):
        output = module(x)
        results.append((output, torch.autograd.grad(output.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(results[0], results[1])
    assert repr(actual) == repr(expected)


@pytest.mark.parametrize("own", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_with_residual_returns_the_normalised_sum_and_the_sum(own: type, dtype: torch.dtype) -> None:
    norm = own(7)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(5, 7, dtype=dtype), torch.randn(5, 7)
    normalised, total = norm(x, residual=residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normalised, norm(x + residual))


def test_default_eps_of_rms_norm_is_pytorchs_in_half_precision() -> None:
    # So small that eps decides the result.
    x = torch.full((1, 4), 1e-3, dtype=torch.bfloat16)
    torch.testing.assert_close(RMSNorm(4).bfloat16()(x), torch.nn.RMSNorm(4).bfloat16()(x))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_equals_pytorch(dim: int) -> None:
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(Softmax(dim)(x), torch.nn.Softmax(dim)(x))


def test_softmax_of_nothing_but_negative_infinity_is_zero() -> None:
    assert Softmax(0)(torch.full((3,), float("-inf"))).tolist() == [0.0, 0.0, 0.0]
