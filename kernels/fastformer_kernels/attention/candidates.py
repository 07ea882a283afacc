"""Launch configurations of the attention kernels to compare with the shipped ones by measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastformer_kernels.attention.decode import DecodeConfiguration
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.configurations import others_than
from fastformer_kernels.launch import Architecture, for_triton

Tile = tuple[int, int, int, int]
"""Queries and keys of a tile, warps, stages."""

_FORWARD_TILES = (
    (128, 128, 8, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 32, 8, 3),
)
_SPECIALIZED_FORWARD_TILES = (
    (128, 128, 4, 2),
    (128, 128, 4, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 4, 4),
)
_BACKWARD_TILES = (
    (64, 128, 8, 2),
    (64, 128, 8, 1),
    (32, 128, 8, 2),
    (32, 128, 8, 1),
    (64, 64, 8, 2),
    (64, 64, 4, 2),
    (32, 64, 8, 2),
    (32, 64, 4, 2),
    (64, 32, 8, 2),
)
# For heads wider than 256, whose tiles fill registers and shared memory early.
_WIDE_TILES = (
    (64, 32, 8, 2),
    (64, 32, 8, 1),
    (64, 16, 8, 2),
    (64, 16, 8, 1),
    (32, 32, 8, 2),
    (32, 32, 8, 1),
    (32, 16, 8, 2),
    (32, 16, 8, 1),
    (16, 32, 8, 1),
    (16, 16, 8, 1),
    (32, 32, 4, 1),
    (16, 16, 4, 1),
)
# Each of the two warp groups needs 64 keys or, for dQ alone, 64 queries: with fewer, both would compute the same.
_SPECIALIZED_BACKWARD_TILES = ((64, 128, 4, 2), (32, 128, 4, 2), (32, 128, 4, 3))
_QUERY_GRADIENT_TILES = (
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 32, 8, 2),
    (128, 128, 8, 2),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 32, 8, 2),
    (32, 64, 4, 2),
)
_SPECIALIZED_QUERY_GRADIENT_TILES = for_triton(
    {(3, 6): ((128, 64, 4, 2), (128, 32, 4, 2), (128, 32, 4, 3)), (3, 7): ()}
)
# Small tiles for float32, whose products need registers, and for the interpreter.
_SMALL_TILES = (
    (32, 32, 4, 2),
    (32, 32, 8, 1),
    (32, 16, 8, 1),
    (16, 32, 4, 1),
    (16, 16, 4, 1),
    (64, 32, 8, 1),
    (32, 64, 8, 1),
)
# GPUs of NVIDIA's that keep a tile's sums in registers. On sm_100 they are in tensor memory: a warp that skips their
# multiplications would load and store them all the same, and the compiler passes the weights through shared memory.
_SUMS_IN_REGISTERS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
# Bytes of shared memory that a kernel needs besides its tiles.
_RESERVE = 20 * 1024

Memory = Callable[[AttentionConfiguration], int]
"""Bytes of shared memory that a configuration's tiles need."""


def forward_candidates(
    default: AttentionConfiguration, architecture: Architecture, head_dim: int, element_size: int
) -> list[AttentionConfiguration]:
    """Configurations of the forward kernel to compare.

    They differ in tiles, in descriptors or pointers, and in one program for each tile or resident programs. Where the
    hardware has descriptors, some have specialised warps in one loop. Some rescale their sums lazily, where a warp
    decides for 16 rows at once."""
    tiles = _tiles(_FORWARD_TILES, architecture, head_dim, element_size)
    found = [_plain(default, tile) for tile in tiles]
    found += [replace(default, resident=resident) for resident in (0, 1, 2)]
    if default.descriptors:
        found.append(replace(default, descriptors=False, warp_specialize=False))
        specialized = [_specialized(tile) for tile in _SPECIALIZED_FORWARD_TILES]
        found += [*specialized, replace(specialized[0], resident=1)]
    if architecture.name in _SUMS_IN_REGISTERS:
        lazy = [default, replace(specialized[0], resident=1)] if default.descriptors else [default]
        found += [replace(each, lazy_rescale=True) for each in lazy if each.block_m >= 16 * each.num_warps]

    def memory(choice: AttentionConfiguration) -> int:
        # The queries stay in shared memory; keys and values are loaded ahead.
        return (choice.block_m + 2 * choice.num_stages * choice.block_n) * head_dim * element_size

    return _that_fit(found, default, architecture, memory)


def backward_candidates(
    default: AttentionConfiguration, architecture: Architecture, head_dim: int, element_size: int
) -> list[AttentionConfiguration]:
    """Configurations of the backward kernels to compare.

    They differ in tiles, in descriptors or pointers, and in whether dQ is added up or comes from its own kernel."""
    tiles = _tiles(_BACKWARD_TILES, architecture, head_dim, element_size)
    found = [_plain(default, tile) for tile in tiles]
    found += [replace(choice, two_kernels=not default.two_kernels) for choice in (default, *found[:1], *found[3:5])]
    found += [replace(default, resident=1), replace(default, one_loop=True), replace(default, hoist=not default.hoist)]
    if default.descriptors:
        found.append(replace(default, descriptors=False))
        found += [replace(_specialized(tile), two_kernels=True) for tile in _SPECIALIZED_BACKWARD_TILES]
    return _that_fit(found, default, architecture, _backward_memory(head_dim, element_size))


def deterministic_candidates(
    default: AttentionConfiguration, architecture: Architecture, head_dim: int, element_size: int
) -> list[AttentionConfiguration]:
    """Configurations to compare of the kernel that computes dK and dV alone."""
    tiles = _tiles(_BACKWARD_TILES, architecture, head_dim, element_size)
    found = [_plain(default, tile) for tile in tiles]
    if default.descriptors:
        found.append(replace(default, descriptors=False, warp_specialize=False))
        found += [_specialized(tile) for tile in _SPECIALIZED_BACKWARD_TILES]
    return _that_fit(found, default, architecture, _backward_memory(head_dim, element_size))


def query_gradient_candidates(
    default: AttentionConfiguration, architecture: Architecture, head_dim: int, element_size: int
) -> list[AttentionConfiguration]:
    """Configurations to compare of the kernel that computes dQ alone."""
    tiles = _tiles(_QUERY_GRADIENT_TILES, architecture, head_dim, element_size)
    found = [_plain(default, tile) for tile in tiles]
    found.append(replace(default, hoist=not default.hoist))
    if default.descriptors:
        found.append(replace(default, descriptors=False, warp_specialize=False))
        found += [_specialized(tile) for tile in _SPECIALIZED_QUERY_GRADIENT_TILES]

    def memory(choice: AttentionConfiguration) -> int:
        # Queries and the output's gradient stay in shared memory; keys and values are loaded ahead.
        return (2 * choice.block_m + 2 * choice.num_stages * choice.block_n) * head_dim * element_size

    return _that_fit(found, default, architecture, memory)


def decode_candidates(default: DecodeConfiguration) -> list[DecodeConfiguration]:
    """Configurations of the decode kernel to compare: keys of a tile, warps, stages, and the splitting of the keys."""
    found = [replace(default, block_n=block_n) for block_n in (16, 32, 64, 128)]
    found += [replace(default, num_warps=warps) for warps in (2, 4, 8)]
    found += [replace(default, num_stages=stages) for stages in (2, 3, 4, 5)]
    found += [replace(default, programs=programs) for programs in (1, 3, 4, 8)]
    found += [replace(default, tiles_per_split=tiles) for tiles in (2, 8)]
    return others_than(default, found)


def _tiles(
    ordinary: tuple[Tile, ...], architecture: Architecture, head_dim: int, element_size: int
) -> tuple[Tile, ...]:
    """The tiles to compare, where `ordinary` ones suit tensor cores and ordinary heads."""
    if element_size != 2 or architecture.name == "interpreter":
        return _SMALL_TILES
    return ordinary if head_dim <= 256 else _WIDE_TILES


def _plain(default: AttentionConfiguration, tile: Tile) -> AttentionConfiguration:
    block_m, block_n, num_warps, num_stages = tile
    return replace(
        default,
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        warp_specialize=False,
        one_loop=False,
    )


def _specialized(tile: Tile) -> AttentionConfiguration:
    return AttentionConfiguration(*tile, descriptors=True, warp_specialize=True, one_loop=True)


def _backward_memory(head_dim: int, element_size: int) -> Memory:
    def memory(choice: AttentionConfiguration) -> int:
        # Keys and values stay in shared memory; queries and the output's gradient are loaded ahead.
        return (2 * choice.block_n + 2 * choice.num_stages * choice.block_m) * head_dim * element_size

    return memory


def _that_fit(
    found: list[AttentionConfiguration], default: AttentionConfiguration, architecture: Architecture, memory: Memory
) -> list[AttentionConfiguration]:
    fitting = [choice for choice in found if memory(choice) + _RESERVE <= architecture.shared_memory]
    return others_than(default, fitting)
