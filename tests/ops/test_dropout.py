"""Dropout's random words on a CPU are those of the definition, for any shapes and any number of threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastformer_kernels.dropout_numbers import dropout_threshold

import fastformer
from fastformer.ops.attention.dropout import dropout_keep
from fastformer.ops.dropout import _dropout_flags, apply_dropout_, philox, words_below

pytestmark = pytest.mark.cpu
SEED = 0x7123456789ABCDEF
_WORD = 0xFFFFFFFF


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def as_defined(dropout_p: float, counters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    below = [word < dropout_threshold(dropout_p) for word in philox(SEED, counters)]
    return torch.stack(torch.broadcast_tensors(*below), dim=-1).flatten(-2)


@pytest.mark.parametrize(
    "shapes",
    [
        [(5,), (), (), ()],
        [(192,), (300, 1), (300, 1), ()],  # a matrix: columns and rows
        [(70,), (41, 1), (12, 1, 1), ()],  # attention: keys, queries and heads
        [(3, 1, 7), (1, 90, 1), (7,), (3, 90, 7)],
        [(40000,), (), (), ()],
        [(0,), (3, 1), (), ()],
    ],
    ids=str,
)
def test_words_are_philoxs(shapes: list[tuple[int, ...]], threads: int) -> None:
    random = torch.Generator().manual_seed(0)
    counters = tuple(torch.randint(_WORD + 1, shape, generator=random) for shape in shapes)
    for dropout_p in (0.1, 0.9):
        assert torch.equal(words_below(dropout_p, SEED, counters), as_defined(dropout_p, counters))


def test_a_matrix_is_dropped_row_by_row(threads: int) -> None:
    seed = torch.tensor([SEED, (5 << 32) + 3])
    whole = apply_dropout_(torch.ones(3000, 30), seed, 0.25)
    row = torch.arange(3000)[:, None]
    dropped = as_defined(0.25, (torch.arange(8), row, torch.zeros_like(row), torch.tensor(3)))[:, :30]
    assert torch.equal(whole, (~dropped).float() / 0.75)


@pytest.mark.parametrize("shape", [(3000, 30), (5, 1), (2, 64), (1, 300000), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_flags_are_the_bits_of_a_matrix(shape: tuple[int, int], backend: str) -> None:
    seed = torch.tensor([SEED, (5 << 32) + 3])
    with fastformer.backend(backend):
        flags = _dropout_flags(seed, *shape, 0.25)
    unpacked = torch.from_numpy(np.unpackbits(flags.numpy(), axis=-1, count=shape[1], bitorder="little"))
    assert torch.equal(unpacked == 1, apply_dropout_(torch.ones(shape), seed, 0.25) == 0.0)


COUNTERS = tuple(torch.arange(size) for size in (50000, 1, 1, 1))


def draw(queue: multiprocessing.Queue) -> None:
    queue.put(int(words_below(0.5, SEED, COUNTERS).numpy().sum()))


def test_a_forked_process_draws_too() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = int(words_below(0.5, SEED, COUNTERS).numpy().sum())
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=draw, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("first", [1, 4, 5, 7, 8, 18])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_any_part_of_the_keys_has_its_own_words(first: int, count: int) -> None:
    rows, queries, keys = (torch.arange(size) for size in (2, 3, 32))
    whole = dropout_keep(SEED, 7, 0.5, rows, queries, keys)
    part = dropout_keep(SEED, 7, 0.5, rows, queries, keys[first : first + count])
    assert torch.equal(part, whole[..., first : first + count])
