"""How the attention kernels are launched: configurations by rule, grids, and what decides between ways of loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of, multiprocessors_of


@dataclass(frozen=True)
class AttentionConfiguration:
    """Tile sizes and the compiler's knobs for one kernel.

    Attributes:
        block_m, block_n: queries and keys of a tile.
        num_warps, num_stages: of the compiler.
        resident: CTAs that a multiprocessor holds, by registers and shared memory.
        descriptors: whether tiles are copied by the bulk copy engine (TMA), where alignment allows.
        warp_specialize: whether, with descriptors, copies and products go to warps of their own.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int = 1
    descriptors: bool = False
    warp_specialize: bool = False

    def options(self, query: torch.Tensor, value: torch.Tensor) -> dict[str, object]:
        """The keyword arguments of a launch; a tile of a product has at least 16 rows and columns."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": _block_of(query.shape[-1]),
            "BLOCK_V": _block_of(value.shape[-1]),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **COMPILER_OPTIONS,
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
_DETERMINISTIC = _BACKWARD
# Small tiles, so that small tests cross their borders.
_INTERPRETER = AttentionConfiguration(16, 16, 1, 1)


def forward_configuration(query: torch.Tensor, value: torch.Tensor) -> AttentionConfiguration:
    """The forward kernel's configuration for these tensors."""
    return _choose(_FORWARD, query, value)


def backward_configuration(query: torch.Tensor, value: torch.Tensor) -> AttentionConfiguration:
    """The configuration of the backward kernel that adds dQ up in memory."""
    return _choose(_BACKWARD, query, value)


def deterministic_configuration(query: torch.Tensor, value: torch.Tensor) -> AttentionConfiguration:
    """The configuration of the two backward kernels of which each writes what it owns."""
    return _choose(_DETERMINISTIC, query, value)


def weights_configuration(query: torch.Tensor) -> AttentionConfiguration:
    """The configuration of the kernel that writes weights: small, as a few rows are wanted."""
    return _INTERPRETER if architecture_of(query).name == "interpreter" else AttentionConfiguration(16, 64, 4, 1)


def _choose(
    table: dict[int, dict[int, AttentionConfiguration]], query: torch.Tensor, value: torch.Tensor
) -> AttentionConfiguration:
    if architecture_of(query).name == "interpreter":
        return _INTERPRETER
    head_dim = max(query.shape[-1], value.shape[-1])
    return next(choice for largest, choice in table[query.element_size()].items() if head_dim <= largest)


def has_borders(arguments: AttentionArguments, length: int, block: int) -> bool:
    """Whether some tile of `block` of `length` rows may need a test."""
    return (
        arguments.left != UNBOUNDED
        or arguments.right != UNBOUNDED
        or arguments.chunk != 0
        or arguments.key_lengths is not None
        or arguments.packed
        or length % block != 0
    )


def launch_size(
    works: int, query: torch.Tensor, arguments: AttentionArguments, configuration: AttentionConfiguration
) -> int:
    """Programs of a launch: as many as the device holds, each taking one tile after another, where causality makes
    tiles of different lengths; else one for each tile."""
    if arguments.right == UNBOUNDED:
        return works
    return min(works, multiprocessors_of(query) * configuration.resident)


def section_of(first: torch.Tensor, second: torch.Tensor, arguments: AttentionArguments) -> int:
    """How many heads' matrices, those that every tile of the head walks over, fill half of the L2 cache."""
    length = max(arguments.max_seqlen_q, arguments.max_seqlen_k, 1)
    bytes_per_head = length * (first.shape[-1] + second.shape[-1]) * first.element_size()
    return max(1, architecture_of(first).l2 // 2 // bytes_per_head)


def uses_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether tensor descriptors can describe these tensors: aligned to 16 bytes, rows contiguous and apart."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0 if tensor.dim() == 3 else 2) > 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )
