"""Wrong lengths, boundaries and pages in tensors are refused on a CPU; on a GPU nothing is read out of bounds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from fastformer_kernels.attention.arguments import UNBOUNDED
from fastformer_kernels.attention.backward import attention_backward
from fastformer_kernels.attention.cache import append as append_kernel
from fastformer_kernels.attention.decode import decode_forward
from fastformer_kernels.attention.decode_arguments import DecodeArguments
from fastformer_kernels.attention.forward import attention_forward
from torch import Tensor
from triton.runtime import interpreter

import fastformer
from fastformer import debugging
from fastformer.ops import checks
from fastformer.ops.attention.attention import checked_arguments
from fastformer.ops.cross_entropy import check_classes

pytestmark = pytest.mark.cpu
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
NAN = float("nan")


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(**changes: Any) -> Any:
    """Compute attention of five packed tokens in two sequences, with the changes to the arguments."""
    q = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
    return fastformer.attention(q, q, q, **{"cu_seqlens_q": int32(0, 2, 5), "max_seqlen_q": 3, **changes})


def dense(**changes: Any) -> Any:
    q = torch.randn(2, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    return fastformer.attention(q, q, q, **changes)


def decode(**changes: Any) -> Any:
    """Decode one query of each of two sequences over four pages of two keys, with the changes to the arguments."""
    query = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    pages = torch.randn(2, 4, 2, 2, 16, generator=torch.Generator().manual_seed(0))
    given = {"lengths": int32(3, 2), "block_table": int32([0, 1], [2, -7]), **changes}
    return fastformer.decode_attention(query, *pages.unbind(), **given)


def append(**changes: Any) -> Any:
    key = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    caches = torch.zeros(2, 4, 2, 2, 16)
    given = {"lengths": int32(2, 1), "block_table": int32([0, 1], [2, -7]), **changes}
    fastformer.append_to_cache(key, key, *caches.unbind(), **given)


WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (packed, {"cu_seqlens_q": int32(0, 2, 6)}, "cu_seqlens_q must rise from 0 to the number of tokens, 5"),
    (packed, {"cu_seqlens_q": int32(0, 2, 4)}, "cu_seqlens_q must rise from 0 to the number of tokens, 5"),
    (packed, {"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q must rise from 0"),
    (packed, {"cu_seqlens_q": int32(0, 6, 5), "max_seqlen_q": 6}, "cu_seqlens_q must rise from 0"),
    (packed, {"cu_seqlens_k": int32(0, 2, 9), "max_seqlen_k": 7}, "cu_seqlens_k must rise from 0"),
    (packed, {"max_seqlen_q": 2}, "max_seqlen is 2, but cu_seqlens_q has a sequence of 3"),
    (packed, {"max_seqlen_q": -1}, "max_seqlen_q must be from 0"),
    (dense, {"key_lengths": int32(5, 1)}, "key_lengths must be from 0 to the number of keys, 4"),
    (dense, {"key_lengths": int32(-1, 1)}, "key_lengths must be from 0"),
    (dense, {"prefix_lengths": int32(5, 1), "causal": True}, "prefix_lengths must be from 0"),
    (decode, {"block_table": int32([0, 4], [2, 3])}, "block_table must name pages from 0 to 3; got 4 for sequence 0"),
    (decode, {"block_table": int32([0, 1], [-1, 3])}, "block_table must name pages from 0 to 3; got -1 for sequence 1"),
    (decode, {"lengths": int32(5, 1)}, "lengths must be from 0 to the cache's capacity, 4"),
    (append, {"block_table": int32([0, -1], [2, 3])}, "block_table must name pages from 0 to 3; got -1 for sequence 0"),
    (append, {"block_table": int32([0, 1], [4, 3])}, "block_table must name pages from 0 to 3; got 4 for sequence 1"),
    (append, {"lengths": int32(-1, 1)}, "lengths must be from 0"),
]


@BACKENDS
@pytest.mark.parametrize("call, changes, message", WRONG, ids=[message for _, _, message in WRONG])
def test_a_cpu_refuses_it(call: Callable[..., Any], changes: dict[str, Any], message: str, backend: str) -> None:
    with fastformer.backend(backend):
        call()  # right without the changes; a page without keys may have any number
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**changes)


ATTENTION = [each for each in WRONG if each[0] in (packed, dense)]


@BACKENDS
@pytest.mark.parametrize("call, changes, message", ATTENTION, ids=[message for _, _, message in ATTENTION])
def test_a_cpu_refuses_it_in_forward_mode(
    call: Callable[..., Any], changes: dict[str, Any], message: str, backend: str
) -> None:
    q = torch.randn(*((5, 2, 16) if call is packed else (2, 2, 4, 16)), generator=torch.Generator().manual_seed(0))
    given = {"cu_seqlens_q": int32(0, 2, 5), "max_seqlen_q": 3, **changes} if call is packed else changes
    with fastformer.backend(backend), pytest.raises(ValueError, match=re.escape(message)):
        torch.func.jvp(lambda q: fastformer.attention(q, q, q, **given), (q,), (q,))


IDS = torch.tensor([[0, 7]])
TABLE = torch.linspace(-1, 1, 40).view(5, 8)
ROWS = torch.linspace(-1, 1, 16).view(2, 8)
TURNED: dict[str, Callable[[Tensor], Any]] = {
    "input_ids must be from 0 to 4; got 0 to 7": lambda x: fastformer.transformer_embedding(IDS, TABLE * x.mean()),
    "position_ids must be from 0 to 4; got 0 to 7": lambda x: fastformer.transformer_embedding(
        IDS.clamp(max=1), TABLE * x.mean(), TABLE, position_ids=IDS
    ),
    "positions must be from 0 to 4; got 0 to 7": lambda x: fastformer.rotary(
        x[None, None], None, TABLE[:, :4], TABLE[:, 4:], position_ids=IDS
    ),
    "target must be a class from 0 to 7": lambda x: fastformer.cross_entropy(x, torch.tensor([0, 8])),
    "target must be a class from 0 to 4": lambda x: fastformer.linear_cross_entropy(x, TABLE, torch.tensor([0, 5])),
}


@BACKENDS
@pytest.mark.parametrize("message", TURNED)
def test_a_cpu_refuses_ids_positions_and_classes(message: str, backend: str) -> None:
    with fastformer.backend(backend):
        for run in (TURNED[message], lambda x: torch.func.jvp(TURNED[message], (x,), (x,))):
            with pytest.raises(IndexError, match=re.escape(message)):
                run(ROWS)


@BACKENDS
def test_limits_beyond_all_numbers_are_none(backend: str) -> None:
    far = 2**31 - 1
    with fastformer.backend(backend):
        expected = dense(causal=True)
        torch.testing.assert_close(dense(causal=True, window=(far, far)), expected)
        torch.testing.assert_close(dense(causal=True, chunk=far), expected)
        torch.testing.assert_close(decode(window=(far, 0)), decode())


def between_walls(tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Return memory full of NaN, and packed query, key and value in the middle of it."""
    memory = torch.full((3, tokens + 400, 2, 16), NAN)
    middle = memory[:, 200 : 200 + tokens]
    middle.copy_(torch.randn(3, tokens, 2, 16, generator=torch.Generator().manual_seed(0)))
    return memory, list(middle.unbind())


@pytest.mark.parametrize("bounds", [(0, 20, 90), (-50, 10, 40), (0, 30, 20), (60, 70, 80), (40, 0, 3)])
def test_kernels_read_and_write_nothing_outside(bounds: tuple[int, ...]) -> None:
    """Kernels stay inside their tensors for any bounds, also without the checks, as on a GPU."""
    memory, (q, k, v) = between_walls(40)
    before = memory.clone()
    *_, arguments = checked_arguments(
        q,
        k,
        v,
        *(None,) * 4,
        True,
        *(None,) * 3,
        "bottom_right",
        *(None,) * 3,
        0.0,
        None,
        int32(*bounds),
        None,
        40,
        None,
    )
    output, lse = attention_forward(q, k, v, arguments)
    inside = torch.zeros(40, dtype=torch.bool)
    for start, stop in pairwise(bounds):
        inside[max(start, 0) : max(stop, 0)] = True
    assert output[inside].isfinite().all()
    with_zeros = torch.where(inside[:, None, None], output, 0.0)
    learned = type(arguments.learned)(*(False,) * 5)
    gradients = attention_backward(
        torch.ones_like(output), None, q, k, v, with_zeros, torch.where(inside, lse, 0.0), arguments, learned
    )
    for gradient in gradients[:3]:
        assert gradient is not None and gradient[inside].isfinite().all()
    torch.testing.assert_close(memory, before, rtol=0, atol=0, equal_nan=True)


def test_key_lengths_beyond_the_keys_end_with_them() -> None:
    q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    memory = torch.full((2, 2, 300, 16), NAN)
    memory[:, :, :8] = q
    k, v = memory[:, None, :, :8].unbind()
    *_, arguments = checked_arguments(
        q, k, v, *(None,) * 4, False, *(None,) * 3, "top_left", *(None,) * 3, 0.0, int32(200), *(None,) * 4
    )
    torch.testing.assert_close(attention_forward(q, k, v, arguments)[0], fastformer.attention(q, k, v))


@pytest.fixture
def asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make kernels in the interpreter check their assertions, as they do on a GPU."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))


@pytest.mark.parametrize(
    "length, positions, message",
    [(2, 4, ""), (0, 2, ""), (3, 9, "lengths and the new tokens"), (-1, 9, "lengths and"), (2, 3, "rotary table")],
)
@pytest.mark.usefixtures("asserting")
def test_a_kernel_stops_before_it_writes_beyond_a_cache(length: int, positions: int, message: str) -> None:
    new, caches, angles = torch.ones(1, 1, 2, 16), torch.zeros(2, 1, 1, 4, 16), torch.zeros(positions, 8)

    def run() -> None:
        append_kernel(new, new, *caches.unbind(), None, (), int32(length), None, None, angles.cos(), angles, False)

    if not message:
        run()
        assert caches[:, 0, 0, length : length + 2].all() and caches.count_nonzero() == 2 * 2 * 16
        return
    # The interpreter raises its own error, whose cause is the kernel's.
    with pytest.raises(Exception, match=message):
        run()
    assert not caches.any()


@pytest.mark.parametrize("length", [-1, 0, 4, 5])
@pytest.mark.usefixtures("asserting")
def test_a_kernel_stops_before_it_reads_beyond_a_cache(length: int) -> None:
    query, cache = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 4, 16)
    arguments = DecodeArguments(int32(length), None, None, None, None, None, None, 1.0, UNBOUNDED, UNBOUNDED, 0.0)
    if 0 <= length <= 4:
        output, _ = decode_forward(query, cache, cache, arguments, None)
        assert output.eq(length > 0).all()
        return
    with pytest.raises(Exception, match="lengths must be from 0 to the cache's capacity"):
        decode_forward(query, cache, cache, arguments, None)


@pytest.fixture
def asserted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages of all assertions that would be sent to a device, while debugging is on."""
    messages: list[str] = []
    monkeypatch.setattr(debugging, "_enabled", True)
    monkeypatch.setattr(checks, "assert_on_device", lambda holds, message: messages.append(message))
    return messages


def test_debugging_asserts_what_a_cpu_looks_at(asserted: list[str]) -> None:
    """Debugging asserts on a GPU, here with tensors on meta in its place, what is checked on a CPU."""
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    checks.check_lengths("key_lengths", lengths, "the number of keys", 7)
    checks.check_boundaries("cu_seqlens_q", lengths, 9, 4)
    checks.check_indices("input_ids", lengths, 100)
    assert [message.split()[0] for message in asserted] == [
        "key_lengths",
        "cu_seqlens_q",
        "cu_seqlens_q",
        "max_seqlen",
        "input_ids",
    ]


def test_nothing_is_asserted_without_debugging(asserted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without debugging nothing is asserted, because each assertion is an extra kernel."""
    monkeypatch.setattr(debugging, "_enabled", False)
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    checks.check_lengths("key_lengths", lengths, "the number of keys", 7)
    checks.check_boundaries("cu_seqlens_q", lengths, 9, 4)
    checks.check_indices("input_ids", lengths, 100)
    checks.check_pages_on_device(lengths[None], lengths, 2, 4)
    check_classes(lengths, 5, -100)
    assert not asserted


def test_a_device_says_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="key_lengths must be from 0"):
        debugging.assert_on_device(torch.tensor([True, False]), "key_lengths must be from 0 to 7")
    debugging.assert_on_device(torch.tensor([True]), "nothing")


def test_debug_is_a_switch() -> None:
    assert not debugging.debugging()
    fastformer.debug()
    assert debugging.debugging()
    fastformer.debug(False)
    assert not debugging.debugging()
