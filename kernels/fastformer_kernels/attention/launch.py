"""How the attention kernels are launched: configurations by rule, and the arguments that both directions share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.launch import architecture_of


@dataclass(frozen=True)
class AttentionConfiguration:
    """Tile sizes (queries, keys) and the compiler's knobs for one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def blocks(self, query: torch.Tensor, value: torch.Tensor) -> dict[str, int]:
        """The kernel's tile sizes; a tile of a product has at least 16 rows and columns."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": _block_of(query.shape[-1]),
            "BLOCK_V": _block_of(value.shape[-1]),
        }


def _block_of(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


# By element size and the largest head_dim each serves. All fit 99 KiB of shared memory (sm_86, sm_89, sm_120).
_FORWARD = {
    2: {
        64: AttentionConfiguration(128, 64, 4, 3),
        128: AttentionConfiguration(128, 32, 4, 3),
        256: AttentionConfiguration(64, 32, 4, 2),
    },
    4: {
        64: AttentionConfiguration(64, 32, 4, 2),
        128: AttentionConfiguration(32, 32, 4, 2),
        256: AttentionConfiguration(32, 16, 8, 1),
    },
}
_BACKWARD = {
    2: {
        64: AttentionConfiguration(64, 64, 4, 2),
        128: AttentionConfiguration(64, 64, 8, 1),
        256: AttentionConfiguration(32, 32, 8, 1),
    },
    4: {
        64: AttentionConfiguration(32, 32, 4, 1),
        128: AttentionConfiguration(32, 32, 8, 1),
        256: AttentionConfiguration(16, 16, 8, 1),
    },
}
# Small tiles, so that small tests cross their borders.
_INTERPRETER = AttentionConfiguration(32, 16, 1, 1)


def forward_configuration(query: torch.Tensor, value: torch.Tensor) -> AttentionConfiguration:
    """The forward kernel's configuration for these tensors."""
    return _choose(_FORWARD, query, value)


def backward_configuration(query: torch.Tensor, value: torch.Tensor) -> AttentionConfiguration:
    """The backward kernels' configuration for these tensors."""
    return _choose(_BACKWARD, query, value)


def _choose(
    table: dict[int, dict[int, AttentionConfiguration]], query: torch.Tensor, value: torch.Tensor
) -> AttentionConfiguration:
    if architecture_of(query).name == "interpreter":
        return _INTERPRETER
    head_dim = max(query.shape[-1], value.shape[-1])
    return next(choice for largest, choice in table[query.element_size()].items() if head_dim <= largest)


def tensor_strides(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides over (batch, heads, sequence, head_dim); packed tokens have one batch."""
    if tensor.dim() == 3:
        return 0, tensor.stride(1), tensor.stride(0), tensor.stride(2)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)


def row_strides(lse: torch.Tensor) -> tuple[int, int]:
    """Strides over (batch, heads) of a log-sum-exp, whose queries are contiguous."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def broadcast_strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a 4-D tensor over (batch, heads, queries, keys), 0 where it broadcasts."""
    if tensor is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def feature_arguments(arguments: AttentionArguments) -> dict[str, object]:
    """The arguments that the forward and backward kernels take alike, by name."""
    named: dict[str, object] = {
        "scale": arguments.scale,
        "softcap": arguments.softcap,
        "left": arguments.left,
        "right": arguments.right,
        "dropout_threshold": min(round(arguments.dropout_p * 2**32), 2**32 - 1),
        "dropout_scale": 1.0 / (1.0 - arguments.dropout_p),
        "slopes_pointer": arguments.alibi_slopes,
        "slopes_stride_b": _batch_stride(arguments.alibi_slopes),
        "key_lengths_pointer": arguments.key_lengths,
        "cu_seqlens_q_pointer": arguments.cu_seqlens_q,
        "cu_seqlens_k_pointer": arguments.cu_seqlens_k,
        "seed_pointer": arguments.seed,
        "sinks_pointer": arguments.sinks,
        "BOTTOM_RIGHT": arguments.bottom_right,
        "LEFT_BOUNDED": arguments.left != UNBOUNDED,
        "RIGHT_BOUNDED": arguments.right != UNBOUNDED,
        "SOFTCAP": arguments.softcap != 0.0,
        # exp2's multiply-add can take the scale only where nothing is added to the scores and their order is kept.
        "FOLD_SCALE": arguments.scale > 0.0
        and not arguments.softcap
        and arguments.bias is None
        and arguments.alibi_slopes is None,
    }
    for name, tensor in (("mask", arguments.mask), ("bias", arguments.bias)):
        named[f"{name}_pointer"] = tensor
        for axis, stride in zip("bhmn", broadcast_strides(tensor), strict=True):
            named[f"{name}_stride_{axis}"] = stride
    return named


def _batch_stride(slopes: torch.Tensor | None) -> int:
    return 0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0)
