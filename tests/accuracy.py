"""The rule of accuracy: an error of at most twice PyTorch's in the same precision, plus one rounding."""

from __future__ import annotations

import torch


def assert_as_accurate(
    name: str, actual: torch.Tensor, pytorch: torch.Tensor, exact: torch.Tensor, *, scale: float | None = None
) -> None:
    """Fail unless max|actual - exact| <= 2 max|pytorch - exact| + one unit of rounding of `actual`'s dtype.

    Args:
        name: what is compared, for the message.
        actual: the operator's result.
        pytorch: PyTorch's own result of the same computation in the same dtype.
        exact: the float64 reference.
        scale: the magnitude whose rounding is the unit; by default the largest magnitude of `exact`.
    """
    assert actual.dtype == pytorch.dtype, f"{name}: dtype {actual.dtype}, PyTorch gives {pytorch.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    magnitude = exact.abs().max().item() if scale is None else scale
    unit = torch.finfo(actual.dtype).eps * magnitude
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (pytorch.double() - exact).abs().max().item() + unit
    assert error <= allowed, f"{name}: error {error:.3e} against float64, allowed {allowed:.3e}"
