"""The input block: both backends are compared with float64, over shapes, dtypes, tables, positions and dropout."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings

import fastformer
from fastformer.ops import embedding
from fastformer.ops.embedding import transformer_embedding

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
WORDS, POSITIONS, TYPES = 7, 9, 2


def check(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    hidden_size: int,
    dtype: torch.dtype,
    with_tables: tuple[bool, bool],
    affine: bool,
    padding_idx: int | None,
    dropout_p: float,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    """Fail unless results are accurate; `positions`, of input_ids' shape, are the positions that the options mean."""
    seed = torch.tensor([(7 << 40) + 5, 2**33 + 1])
    monkeypatch.setattr(embedding, "draw_seed", lambda device: seed)
    tokens = input_ids.numel()
    keep = reference.matrix_dropout_keep(*seed.tolist(), dropout_p, tokens, hidden_size) if dropout_p else None
    given = [
        torch.randn(WORDS, hidden_size).to(dtype),
        torch.randn(POSITIONS, hidden_size).to(dtype) if with_tables[0] else None,
        torch.randn(TYPES, hidden_size).to(dtype) if with_tables[1] else None,
        torch.randn(hidden_size) if affine else None,
        torch.randn(hidden_size) if affine else None,
    ]
    grad_output = torch.randn(*input_ids.shape, hidden_size)
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids

    def run(name: str) -> list[torch.Tensor]:
        leaves: list[Any] = [
            tensor if tensor is None else tensor.to(torch.float64 if name == "exact" else tensor.dtype)
            for tensor in given
        ]
        inputs = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
        if name == "actual":
            output = transformer_embedding(
                input_ids,
                *leaves,
                token_type_ids=token_type_ids if with_tables[1] else None,
                padding_idx=padding_idx,
                eps=EPS,
                dropout_p=dropout_p,
                **options,
            )
        else:
            norm = [leaf if leaf is None or name == "exact" else leaf.to(dtype) for leaf in leaves[3:]]
            ids = [input_ids.long(), positions.long(), types.long()]
            output = reference.transformer_embedding(ids, leaves[:3], *norm, EPS, keep, dropout_p)
        grads = list(torch.autograd.grad(output, inputs, grad_output.to(output.dtype)))
        if padding_idx is not None and name != "actual":
            grads[0][padding_idx] = 0.0
        return [output.detach(), *grads]

    for index, (a, p, e) in enumerate(zip(run("actual"), run("plain"), run("exact"), strict=True)):
        # Two roundings of the sum, six of the norm and one of the dropout, by half a unit each. The gradient of a
        # table's row sums the gradients of `tokens` tokens, each rounded once. The float32 gradients of a 16-bit call
        # are sums of products with 16-bit tables, which are exact in float32.
        units = 5.0 if index == 0 else 5.0 * max(1.0, tokens / 4)
        assert_as_accurate(str(index), a, p.to(a.dtype), e, scale=units * max([1.0, *e.abs().flatten().tolist()]))


@settings(max_examples=30)
@given(data=st.data())
def test_any_shape_tables_and_positions(data: st.DataObject) -> None:
    torch.manual_seed(0)
    integer = data.draw(st.sampled_from([torch.int32, torch.int64]))
    options: dict[str, Any] = {}
    with_positions = data.draw(st.booleans())
    if data.draw(st.booleans()):
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))
        input_ids = torch.randint(0, WORDS, (int(lengths.sum()),), dtype=integer)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    else:
        input_ids = torch.randint(0, WORDS, (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))), dtype=integer)
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    if with_positions and data.draw(st.booleans()):
        one_row = input_ids.dim() == 2 and data.draw(st.booleans())
        given = torch.randint(0, POSITIONS, (1, *input_ids.shape[1:]) if one_row else input_ids.shape, dtype=integer)
        options["position_ids"] = given
        positions = given.expand(input_ids.shape)
    arguments = data.draw(
        st.tuples(
            st.integers(4, 40),
            st.sampled_from(DTYPES),
            st.tuples(st.just(with_positions), st.booleans()),
            st.booleans(),
            st.sampled_from([None, 0, 3]),
            st.sampled_from([0.0, 0.3]),
        )
    )
    types = torch.randint(0, TYPES, input_ids.shape, dtype=integer) if data.draw(st.booleans()) else None
    for name in ("triton", "torch"):
        with fastformer.backend(name), pytest.MonkeyPatch.context() as monkeypatch:
            check(input_ids, positions, types, *arguments, monkeypatch, **options)


@pytest.mark.quick
def test_rows_of_many_tokens_are_split(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("fastformer_kernels.embedding.TOKENS_PER_SPLIT", 4)
    input_ids, types = torch.randint(0, WORDS, (60,)), torch.randint(0, TYPES, (60,))
    positions = torch.randint(0, POSITIONS, (60,))
    arguments = (8, torch.float32, (True, True), True, 2, 0.0)
    check(input_ids, positions, types, *arguments, monkeypatch, position_ids=positions)


def test_wide_rows_take_the_other_way(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("fastformer_kernels.embedding.MAX_COLUMNS", 16)
    input_ids = torch.randint(0, WORDS, (2, 5))
    positions = torch.arange(5).expand(2, 5)
    check(input_ids, positions, None, 20, torch.float32, (True, True), True, None, 0.3, monkeypatch)


def test_gradients_are_the_same_every_time(backend: str) -> None:
    torch.manual_seed(0)
    table = torch.randn(5, 32, requires_grad=True)
    input_ids = torch.randint(0, 5, (4, 50))
    grad_output = torch.randn(4, 50, 32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(transformer_embedding(input_ids, table), table, grad_output)[0] for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_index_outside_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(5, 8, requires_grad=True)
    input_ids = torch.tensor([[0, 5], [-1, 4]])
    with fastformer.backend("torch"), pytest.raises(IndexError, match="input_ids must be from 0 to 4; got -1 to 5"):
        transformer_embedding(input_ids.cpu(), table.cpu())
    monkeypatch.setattr(embedding, "check_indices", lambda *_: None)  # as on a GPU, which checks nothing
    with fastformer.backend("triton"):
        output = transformer_embedding(input_ids, table)
        assert output.isnan().all(-1).tolist() == [[False, True], [True, False]]
        output[:, 0].nansum().backward()
    assert table.grad is not None and not table.grad[1:4].any()


def test_empty(backend: str) -> None:
    table = torch.randn(5, 8, requires_grad=True)
    output = transformer_embedding(torch.empty(0, 3, dtype=torch.int64), table, table)
    output.sum().backward()
    assert output.shape == (0, 3, 8) and table.grad is not None and not table.grad.any()


def test_registration(backend: str) -> None:
    tables = [torch.randn(5, 8) for _ in range(3)]
    norm = [torch.randn(8) for _ in range(2)]
    ids = [torch.randint(0, 5, (6,)) for _ in range(3)]
    operator = torch.ops.fastformer.embedding.default
    torch.library.opcheck(operator, (*ids, *tables, *norm, torch.tensor([1, 2]), 1, 1e-5, 0.3))
    torch.library.opcheck(operator, (ids[0], None, None, tables[0], None, None, None, None, None, -1, 1e-5, 0.0))


def test_compiles_without_graph_break() -> None:
    word, position = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    compiled = torch.compile(transformer_embedding, fullgraph=True, dynamic=True)
    for size in (7, 19):
        input_ids = torch.randint(0, 5, (2, size))
        expected, actual = (f(input_ids, word, position) for f in (transformer_embedding, compiled))
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum() + y.sum(), (word, position)) for y in (actual, expected)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


IDS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 8)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((IDS.float(), TABLE), {}, TypeError, "input_ids must be int64 or int32; got torch.float32"),
        ((IDS[None], TABLE), {}, ValueError, r"input_ids must be \(batch, sequence\) or .*; got \(1, 2, 3\)"),
        ((IDS, TABLE.double()), {}, TypeError, "word_weight must be float32, float16 or bfloat16; got torch.float64"),
        ((IDS, TABLE, TABLE[:, :4]), {}, ValueError, r"position_weight must have shape \(5, 8\); got \(5, 4\)"),
        ((IDS, TABLE, TABLE.half()), {}, TypeError, "position_weight must have word_weight's dtype"),
        ((IDS, TABLE, TABLE, TABLE, TABLE), {}, ValueError, r"norm_weight must have shape \(8,\); got \(5, 8\)"),
        ((IDS, TABLE), {"token_type_ids": IDS}, ValueError, "token_type_ids was given without token_type_weight"),
        ((IDS, TABLE), {"position_ids": IDS}, ValueError, "position_ids was given without position_weight"),
        ((IDS, TABLE, TABLE), {"position_ids": IDS[:, :2]}, ValueError, r"position_ids must have shape \(2, 3\)"),
        ((IDS[0], TABLE, TABLE), {}, ValueError, "packed input_ids, .*, need cu_seqlens or position_ids"),
        ((IDS, TABLE), {"cu_seqlens": torch.zeros(2).int()}, ValueError, "cu_seqlens is for packed input_ids"),
        ((IDS, TABLE, TABLE[:2]), {}, IndexError, "position_ids must be from 0 to 1; got 0 to 2"),
        ((IDS, TABLE), {"padding_idx": 5}, ValueError, "padding_idx must be from 0 to 4; got 5"),
        ((IDS, TABLE), {"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]; got 1.5"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        transformer_embedding(*arguments, **options)
