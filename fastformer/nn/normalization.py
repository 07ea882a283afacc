"""LayerNorm and RMSNorm as modules."""

from __future__ import annotations

from typing import overload

import torch

from fastformer.ops.normalization import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on Fastformer's operator: same constructor, state_dict and forward, and a fused residual."""

    @overload
    def forward(self, input: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise `input`; with `residual` (same shape) return the normalised sum of the two, and the sum."""
        if residual is None:
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        input, residual = _promoted(input, residual)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on Fastformer's operator: same constructor, state_dict and forward, and a fused residual."""

    @overload
    def forward(self, input: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise `input`; with `residual` (same shape) return the normalised sum of the two, and the sum."""
        if residual is None:
            return rms_norm(input, self.normalized_shape, self.weight, self.eps)
        input, residual = _promoted(input, residual)
        return rms_norm(input, self.normalized_shape, self.weight, self.eps, residual=residual)


def _promoted(input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype of their sum: under autocast a block's output is narrower than its input."""
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)
