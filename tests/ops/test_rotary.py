"""Rotary embedding: both backends agree with complex float64, over layouts, shapes, strides, dtypes and positions."""

from __future__ import annotations

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from accuracy import assert_as_accurate
from devices import here
from hypothesis import given, settings

import fastformer
from fastformer.ops.rotary import rotary, rotary_frequencies, rotary_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate as Llama and GPT-J do, in the dtype of x, with cos and sin (..., tokens, pairs)."""
    pairs = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.split(pairs, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned, rest], -1)


def check(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, rotary_dim: int, interleaved: bool, **options: Any
) -> None:
    """Fail unless accurate; the options mean these `positions`, (batch or 1, sequence) or (total_tokens,)."""
    frequencies = here(rotary_frequencies(rotary_dim))
    cos, sin = rotary_table(frequencies, 40)
    angles = positions.double()[..., None] * frequencies
    angles = angles.unsqueeze(1) if query.dim() == 4 else angles
    grads = [torch.randn(tensor.shape) for tensor in (query, key)]

    def run(name: str) -> list[torch.Tensor]:
        dtype = torch.float64 if name == "exact" else query.dtype
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key)]
        if name == "actual":
            given = [leaf * 1.0 for leaf in leaves] if options.get("inplace") else leaves
            outputs: Any = rotary(*given, cos, sin, interleaved=interleaved, **options)
            assert not options.get("inplace") or all(o is g for o, g in zip(outputs, given, strict=True))
        else:
            # Packed tokens come before the heads.
            swapped = [leaf if query.dim() == 4 else leaf.transpose(0, 1) for leaf in leaves]
            if name == "exact":
                outputs = [reference.rotary(tensor, angles, interleaved) for tensor in swapped]
            else:
                outputs = [plain(tensor, angles.cos(), angles.sin(), interleaved) for tensor in swapped]
            outputs = [tensor if query.dim() == 4 else tensor.transpose(0, 1) for tensor in outputs]
        gradients = torch.autograd.grad(outputs, leaves, [grad.to(dtype) for grad in grads])
        return [*(output.detach() for output in outputs), *gradients]

    names = ["query", "key", "grad_query", "grad_key"]
    for name, a, p, e in zip(names, run("actual"), run("plain"), run("exact"), strict=True):
        assert_as_accurate(name, a, p, e)


@settings(max_examples=25)
@given(data=st.data())
def test_any_layout_strides_and_positions(data: st.DataObject) -> None:
    torch.manual_seed(0)
    head_dim = data.draw(st.integers(2, 24))
    rotary_dim = data.draw(st.integers(1, head_dim // 2)) * 2
    kv_heads = data.draw(st.integers(1, 2))
    heads, dtype = kv_heads * data.draw(st.integers(1, 3)), data.draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {"inplace": data.draw(st.booleans())}
    kind = data.draw(st.sampled_from(["default", "position_ids", "offsets"]))
    integer = data.draw(st.sampled_from([torch.int32, torch.int64]))
    if data.draw(st.booleans()):
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
        tokens = int(lengths.sum())
        options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        if kind == "offsets":
            options["offsets"] = torch.randint(0, 30, (len(lengths),), dtype=integer)
            positions = positions + options["offsets"].repeat_interleave(lengths)
        elif kind == "position_ids":
            positions = options["position_ids"] = torch.randint(0, 40, (tokens,), dtype=integer)
        shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim)]
    else:
        batch, sequence = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
        positions = torch.arange(sequence)[None]
        if kind == "offsets":
            options["offsets"] = torch.randint(0, 30, (batch,), dtype=integer)
            positions = positions + options["offsets"][:, None]
        elif kind == "position_ids":
            rows = data.draw(st.sampled_from([1, batch]))
            positions = options["position_ids"] = torch.randint(0, 40, (rows, sequence), dtype=integer)
        shapes = [(batch, heads, sequence, head_dim), (batch, kv_heads, sequence, head_dim)]
    order = data.draw(st.permutations(range(len(shapes[0]))))
    inverse = [order.index(d) for d in range(len(order))]
    query, key = (torch.randn([shape[d] for d in order]).to(dtype).permute(inverse) for shape in shapes)
    interleaved = data.draw(st.booleans())
    for name in ("triton", "torch"):
        with fastformer.backend(name):
            check(query, key, positions, rotary_dim, interleaved, **options)


@pytest.mark.quick
@pytest.mark.parametrize("inplace", [False, True])
def test_projection_of_queries_keys_and_values(backend: str, inplace: bool) -> None:
    torch.manual_seed(0)
    cos, sin = rotary_table(rotary_frequencies(8), 5)
    qkv = torch.randn(2, 5, 3, 4, 8, requires_grad=True)
    given = qkv * 1.0
    query, key = given[:, :, 0].transpose(1, 2), given[:, :, 1].transpose(1, 2)
    query, key = rotary(query, key, cos, sin, inplace=inplace)
    (gradient,) = torch.autograd.grad((query * key).sum(), qkv)
    q, k = (plain(qkv[:, :, i].transpose(1, 2), cos, sin, False) for i in (0, 1))
    torch.testing.assert_close(query, q)
    torch.testing.assert_close(gradient, torch.autograd.grad((q * k).sum(), qkv)[0])


@pytest.mark.quick
def test_query_alone(backend: str) -> None:
    cos, sin = rotary_table(rotary_frequencies(8), 5)
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    rotated, key = rotary(query, None, cos, sin)
    assert key is None
    torch.testing.assert_close(rotated, rotary(query, query, cos, sin)[0])
    torch.testing.assert_close(torch.autograd.grad(rotated.square().sum(), query)[0], 2 * query)


def test_equals_transformers_llama(backend: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    position_ids = torch.randint(0, 50, (2, 7))
    cos, sin = rotary_table(rotary_frequencies(16, base=500000.0), 50)
    doubled = [torch.cat([table, table], -1)[position_ids] for table in (cos, sin)]
    expected = llama.apply_rotary_pos_emb(query, key, *doubled)
    torch.testing.assert_close(rotary(query, key, cos, sin, position_ids=position_ids), expected)


def test_equals_transformers_gptj(backend: str) -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    query = torch.randn(2, 4, 7, 16)
    cos, sin = rotary_table(rotary_frequencies(16), 7)
    expected = gptj.apply_rotary_pos_emb(query.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    torch.testing.assert_close(rotary(query, None, cos, sin, interleaved=True)[0], expected)


def test_table_is_exact_far_out() -> None:
    frequencies = here(rotary_frequencies(64))
    cos, sin = rotary_table(frequencies, 100001, magnitude=0.5)
    angle = 100000.0 * frequencies
    torch.testing.assert_close(cos[-1].double(), angle.cos() / 2, atol=2**-25, rtol=0)
    torch.testing.assert_close(sin[-1].double(), angle.sin() / 2, atol=2**-25, rtol=0)
    torch.testing.assert_close(here(rotary_frequencies(64, scaling=4.0)) * 4, frequencies)


def test_table_is_on_pytorchs_default_device() -> None:
    with torch.device("meta"):
        tables = rotary_table(rotary_frequencies(64), 5)
    assert all(table.is_meta for table in tables)
    assert all(not table.is_meta for table in rotary_table(rotary_frequencies(64), 5))


def test_position_outside_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cos, sin = rotary_table(rotary_frequencies(4), 5)
    x, position_ids = torch.randn(1, 1, 3, 6), torch.tensor([[4, 5, -1]])
    on_cpu = [tensor.cpu() for tensor in (x, cos, sin, position_ids)]
    with fastformer.backend("torch"), pytest.raises(IndexError, match=r"positions must be from 0 to 4.*got -1 to 5"):
        rotary(on_cpu[0], None, *on_cpu[1:3], position_ids=on_cpu[3])
    module = importlib.import_module("fastformer.ops.rotary")
    monkeypatch.setattr(module, "check_indices", lambda *_: None)  # as on a GPU, which checks nothing
    with fastformer.backend("triton"):
        rotated, _ = rotary(x, None, cos, sin, position_ids=position_ids)
    assert rotated[0, 0, :, :4].isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 3, 0, 4), (2, 0, 3, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    cos, sin = rotary_table(rotary_frequencies(4), 5)
    query = torch.empty(shape, requires_grad=True)
    rotated, _ = rotary(query, torch.empty(shape), cos, sin)
    rotated.sum().backward()
    assert query.grad is not None and query.grad.shape == shape


@pytest.mark.parametrize("empty", ["query", "key"])
def test_one_of_the_two_is_empty(backend: str, empty: str) -> None:
    """If query or key is empty, the other is still rotated."""
    cos, sin = rotary_table(rotary_frequencies(4), 5)
    full, nothing = torch.randn(2, 1, 3, 4), torch.empty(2, 0, 3, 4)
    pair = (nothing, full) if empty == "query" else (full, nothing)
    rotated = rotary(*pair, cos, sin)
    torch.testing.assert_close(rotated[empty == "query"], rotary(full, None, cos, sin)[0])
    assert rotated[empty == "key"].shape == nothing.shape


def test_registration(backend: str) -> None:
    cos, sin = rotary_table(rotary_frequencies(4), 5)
    q, k = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 3, 6)
    ids, offsets = torch.randint(0, 5, (1, 3)), torch.tensor([0, 2])
    operator = torch.ops.fastformer.rotary.default
    torch.library.opcheck(operator, (q, k, cos, sin, ids, None, None, True, False))
    torch.library.opcheck(operator, (q, None, cos, sin, None, offsets, None, False, True))
    boundaries = torch.tensor([0, 1, 3], dtype=torch.int32)
    packed = (torch.randn(3, 4, 6), torch.randn(3, 2, 6), cos, sin, None, None, boundaries, False)
    torch.library.opcheck(torch.ops.fastformer.rotary_.default, packed)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace: bool) -> None:
    cos, sin = rotary_table(rotary_frequencies(4), 50)

    def rotated(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = rotary(q * 2.0, k * 2.0, cos, sin, inplace=inplace)
        return q @ k.mT

    def exactly(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(q.shape[-2]).double()[:, None] * rotary_frequencies(4)
        q, k = (reference.rotary(tensor * 2.0, angles, False) for tensor in (q, k))
        return q @ k.mT

    compiled = torch.compile(rotated, fullgraph=True, dynamic=True)
    for size in (7, 19):
        q, k = (torch.randn(2, 3, size, 6, requires_grad=True) for _ in range(2))
        results = []
        for function, dtype in ((compiled, torch.float32), (rotated, torch.float32), (exactly, torch.float64)):
            leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k)]
            output = function(*leaves)
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
        for name, *values in zip(("output", "gradient of query", "gradient of key"), *results, strict=True):
            assert_as_accurate(name, *values)


X, COS = torch.zeros(2, 3, 5, 6), torch.zeros(9, 2)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), None, COS, COS), {}, TypeError, "query must be float32, float16 or bfloat16; got torch.int64"),
        ((X[0], None, COS, COS), {}, ValueError, r"query must be dense .*; got shape \(3, 5, 6\)"),
        ((X, X.half(), COS, COS), {}, TypeError, "key must have query's dtype"),
        ((X, X[:, :, :4], COS, COS), {}, ValueError, r"key must have query's shape except for the heads"),
        ((X, None, COS.double(), COS), {}, TypeError, "cos must be float32; got torch.float64"),
        ((X, None, torch.zeros(9, 4), COS), {}, ValueError, r"cos must have shape .*, 6; got \(9, 4\)"),
        ((X, None, COS, COS[:4]), {}, ValueError, r"sin must have shape \(9, 2\); got \(4, 2\)"),
        ((X, None, COS.clone().requires_grad_(), COS), {}, ValueError, "cos must not require a gradient"),
        ((X, None, COS, COS), {"position_ids": torch.zeros(3, 5).long()}, ValueError, r"\(2, 5\) or \(1, 5\); got \(3"),
        ((X, None, COS, COS), {"position_ids": torch.zeros(2, 5)}, TypeError, "position_ids must be int64 or int32"),
        ((X, None, COS, COS), {"offsets": torch.zeros(3).int()}, ValueError, r"offsets must have shape \(2,\); got"),
        (
            (X, None, COS, COS),
            {"offsets": torch.zeros(2).int(), "position_ids": torch.zeros(2, 5).int()},
            ValueError,
            "position_ids and offsets were both given",
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        rotary(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "rotary_dim must be an even"),
        ((4, -1.0), "base must be positive"),
        ((4, 1.0, 0.0), "scaling must be"),
    ],
)
def test_refuses_wrong_frequencies(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_frequencies(*arguments)
