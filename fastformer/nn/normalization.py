"""Modules for LayerNorm and RMSNorm."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastformer.ops.normalization import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on Fastformer's operator: same constructor, state_dict and forward, and a fused residual."""

    @overload
    def forward(
        self,
        input: Tensor,
        residual: None = None,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = True,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input: Tensor,
        residual: Tensor,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: Literal[True] = True,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        residual: Tensor,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: Literal[False],
    ) -> Tensor: ...
    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``residual + dropout(input + input_bias)``, each part only if it is given.

        Args:
            input, residual: of the same shape, ending in `normalized_shape`.
            input_bias: of shape `normalized_shape`, the bias of the projection that produced `input`.
            dropout_p: probability of dropping an element, applied both in training and in evaluation.
            return_sum: with `residual`, return the pair (normalised, sum); otherwise only the normalised tensor.
        """
        return layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,  # type: ignore[arg-type]
            input_bias=input_bias,
            dropout_p=dropout_p,
            return_sum=return_sum,
        )


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on Fastformer's operator: same constructor, state_dict and forward, and a fused residual."""

    @overload
    def forward(
        self,
        input: Tensor,
        residual: None = None,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = True,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input: Tensor,
        residual: Tensor,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: Literal[True] = True,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        residual: Tensor,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: Literal[False],
    ) -> Tensor: ...
    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        input_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        return_sum: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``residual + dropout(input + input_bias)``; arguments and result as in `LayerNorm.forward`."""
        return rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.eps,
            residual=residual,  # type: ignore[arg-type]
            input_bias=input_bias,
            dropout_p=dropout_p,
            return_sum=return_sum,
        )
