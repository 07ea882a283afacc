"""Layers of a kernel for Hugging Face's `kernels`: forwards without state, for modules that have the parameters.

`fastformer hub export` copies this file and all that it imports. Each class has only a forward, with the signature of
the modules that it serves, as `kernels.kernelize` requires.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.normalization import layer_norm, rms_norm
from fastformer.ops.rotary import rotary


class RMSNorm(nn.Module):
    """RMSNorm of modules with `weight` and `variance_epsilon` or `eps`: Llama's, Qwen's, T5's, `torch.nn.RMSNorm`."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        output = rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, eps)
        return output.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))


class RMSNormZeroCentered(nn.Module):
    """RMSNorm of modules that keep `weight` as the difference from 1, with `eps`: Gemma's, Qwen3-Next's."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], 1.0 + self.weight.float(), self.eps)


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm`."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``: the feed-forward of Llama, Mistral, Qwen."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        return _gated(self, x, "silu")


class GeGLU(nn.Module):
    """``down_proj(gelu_tanh(gate_proj(x)) * up_proj(x))``: the feed-forward of Gemma."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, x: Tensor) -> Tensor:
        return _gated(self, x, "gelu_tanh")


class rotary_pos_emb(nn.Module):  # noqa: N801 (transformers' name for it)
    """Rotary position embedding of queries and keys whose tables have their angles in halves: Llama's function."""

    can_torch_compile = True
    has_backward = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"unsqueeze_dim must be 1, (batch, heads, sequence, head_dim), or 2; got {unsqueeze_dim}")
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        # gpt-oss stores each angle once.
        pairs = q.shape[-1] // 2
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=q.device).view(cos.shape[:2])
        cos, sin = (table[..., :pairs].float().reshape(-1, pairs) for table in (cos, sin))
        q, k = rotary(q, k, cos, sin, position_ids=rows)
        return (q, k) if unsqueeze_dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))


def _gated(module: Any, x: Tensor, activation: str) -> Tensor:
    up, gate, down = module.up_proj, module.gate_proj, module.down_proj
    return feed_forward(x, up.weight, down.weight, up.bias, down.bias, gate.weight, gate.bias, activation)
