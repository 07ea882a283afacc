"""Whole calls of every operator drawn at random; a failure shrinks, and is printed as a program to run.

FASTFORMER_FUZZ_EXAMPLES sets how many calls of each operator are drawn (default 12), from a new seed if it is set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fuzz.reproduction import program
from hypothesis import HealthCheck, given, note, settings

import fastformer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXAMPLES = os.environ.get("FASTFORMER_FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 12),
    derandomize=EXAMPLES is None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Call = tuple[dict[str, torch.Tensor], dict[str, Any]]
Plain = Callable[..., Any]


def draw_tensor(draw: st.DrawFn, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Random values in a random layout: plain, transposed, sliced or expanded."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))

    def values(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    if layout == "transposed" and len(shape) > 1:
        return values(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "sliced":
        return values(*shape[:-1], shape[-1] * 2 + 1)[..., 1::2]
    if layout == "expanded" and len(shape) > 1:
        return values(1, *shape[1:]).expand(shape)
    return values(*shape)


def sizes(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


@st.composite
def softmax_calls(draw: st.DrawFn) -> Call:
    dtype = draw(st.sampled_from(DTYPES))
    shape = [*draw(st.lists(sizes(9), min_size=1, max_size=3)), draw(sizes(60))]
    options: dict[str, Any] = {"dim": draw(st.integers(-len(shape), -1)), "scale": draw(st.sampled_from([1.0, 0.3]))}
    tensors = {"input": draw_tensor(draw, *shape, dtype=dtype, scale=draw(st.sampled_from([1.0, 20.0])))}
    if draw(st.booleans()):
        tensors["mask"] = draw_tensor(draw, *shape, dtype=torch.float32) > -0.5
    return tensors, options


def plain_softmax(input: torch.Tensor, mask: torch.Tensor | None = None, *, dim: int, scale: float) -> torch.Tensor:
    scores = input * scale
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim).nan_to_num(0.0)


@st.composite
def norm_calls(draw: st.DrawFn) -> Call:
    dtype, rows, columns = draw(st.sampled_from(DTYPES)), draw(sizes(9)), draw(sizes(70))
    tensors = {"input": draw_tensor(draw, rows, columns, dtype=dtype)}
    if draw(st.booleans()):
        tensors["weight"] = draw_tensor(draw, columns, dtype=dtype)
    if draw(st.booleans()):
        tensors["residual"] = draw_tensor(draw, rows, columns, dtype=dtype)
    return tensors, {"normalized_shape": (columns,), "eps": 1e-3}


def plain_norm(function: Plain) -> Plain:
    def run(input: torch.Tensor, *, residual: torch.Tensor | None = None, **options: Any) -> Any:
        if residual is None:
            return function(input, **options)
        return function(input + residual, **options), input + residual

    return run


@st.composite
def feed_forward_calls(draw: st.DrawFn) -> Call:
    dtype, tokens = draw(st.sampled_from(DTYPES)), draw(sizes(20))
    features, intermediate, out = draw(sizes(20)), draw(sizes(40)), draw(sizes(20))
    shapes = {
        "input": (tokens, features),
        "up_weight": (intermediate, features),
        "down_weight": (out, intermediate),
        "up_bias": (intermediate,),
        "down_bias": (out,),
    }
    if draw(st.booleans()):
        shapes["gate_weight"] = (intermediate, features)
    chosen = {n: s for n, s in shapes.items() if not n.endswith("_bias") or draw(st.booleans())}
    tensors = {name: draw_tensor(draw, *shape, dtype=dtype, scale=0.5) for name, shape in chosen.items()}
    return tensors, {"activation": draw(st.sampled_from(["relu", "gelu", "silu", "identity"]))}


def plain_feed_forward(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    *,
    activation: str,
) -> torch.Tensor:
    act: Plain = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "identity": lambda x: x}[activation]
    up = F.linear(input, up_weight, up_bias)
    return F.linear(act(up) if gate_weight is None else act(F.linear(input, gate_weight)) * up, down_weight, down_bias)


@st.composite
def cross_entropy_calls(draw: st.DrawFn) -> Call:
    dtype, rows, classes, features = draw(st.sampled_from(DTYPES)), draw(sizes(20)), draw(sizes(40)), draw(sizes(12))
    target = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    if rows > 1 and draw(st.booleans()):
        target[0] = -100
    tensors = {
        "input": draw_tensor(draw, rows, features, dtype=dtype),
        "weight": draw_tensor(draw, classes, features, dtype=dtype),
        "target": target,
    }
    return tensors, {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}


def plain_cross_entropy(
    input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, reduction: str
) -> torch.Tensor:
    logits = input @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, reduction=reduction)


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    dtype, batch, kv_heads = draw(st.sampled_from(DTYPES)), draw(sizes(2)), draw(sizes(2))
    queries, keys, head_dim = draw(sizes(40)), draw(sizes(40)), draw(sizes(20))
    heads = kv_heads * draw(sizes(2))
    tensors = {
        name: draw_tensor(draw, batch, h, n, head_dim, dtype=dtype)
        for name, h, n in (("query", heads, queries), ("key", kv_heads, keys), ("value", kv_heads, keys))
    }
    if draw(st.booleans()):
        tensors["bias"] = draw_tensor(draw, 1, heads, queries, keys, dtype=dtype)
    if draw(st.booleans()):
        tensors["mask"] = draw_tensor(draw, 1, 1, queries, keys, dtype=torch.float32) > -0.5
    return tensors, {"softcap": draw(st.sampled_from([None, 4.0]))}


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    softcap: float | None,
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(group, 1)


@st.composite
def merge_calls(draw: st.DrawFn) -> Call:
    dtype, parts, rows, head_dim = draw(st.sampled_from(DTYPES)), draw(sizes(4)), draw(sizes(20)), draw(sizes(20))
    return {
        "outputs": draw_tensor(draw, parts, rows, head_dim, dtype=dtype),
        "lses": draw_tensor(draw, parts, rows, dtype=torch.float32),
    }, {}


def plain_merge(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = lses.softmax(0).to(outputs.dtype)
    return (weights[..., None] * outputs).sum(0), lses.logsumexp(0)


@st.composite
def rotary_calls(draw: st.DrawFn) -> Call:
    dtype, batch, heads, sequence = draw(st.sampled_from(DTYPES)), draw(sizes(2)), draw(sizes(3)), draw(sizes(20))
    pairs, rest = draw(sizes(8)), draw(st.integers(0, 5))
    cos, sin = fastformer.rotary_table(fastformer.rotary_frequencies(2 * pairs), sequence)
    query = draw_tensor(draw, batch, heads, sequence, 2 * pairs + rest, dtype=dtype)
    return {"query": query, "cos": cos, "sin": sin}, {"key": None, "interleaved": draw(st.booleans())}


def plain_rotary(
    query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, key: None, interleaved: bool
) -> tuple[torch.Tensor, None]:
    cos, sin, pairs = cos.to(query.dtype), sin.to(query.dtype), cos.shape[-1]
    axis = -1 if interleaved else -2
    a, b = query[..., : 2 * pairs].unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(axis)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2)
    return torch.cat([turned, query[..., 2 * pairs :]], -1), None


@st.composite
def decode_calls(draw: st.DrawFn) -> Call:
    dtype, batch, kv_heads = draw(st.sampled_from(DTYPES)), draw(sizes(2)), draw(sizes(2))
    heads, queries, capacity, head_dim = kv_heads * draw(sizes(2)), draw(sizes(3)), draw(sizes(60)), draw(sizes(20))
    lengths = draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    tensors = {"query": draw_tensor(draw, batch, heads, queries, head_dim, dtype=dtype)}
    for name in ("key_cache", "value_cache"):
        tensors[name] = draw_tensor(draw, batch, kv_heads, capacity, head_dim, dtype=dtype)
    tensors["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    return tensors, {"splits": draw(st.integers(1, 4)), "softcap": draw(st.sampled_from([None, 4.0]))}


def plain_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    splits: int,
    softcap: float | None,
) -> torch.Tensor:
    position = lengths[:, None] - query.shape[2] + torch.arange(query.shape[2])
    mask = torch.arange(key_cache.shape[2]) <= position[..., None]
    return plain_attention(query, key_cache, value_cache, mask=mask[:, None], softcap=softcap)


# Each operator: calls, and the same in PyTorch, in whatever dtype it is given.
OPERATORS: dict[str, tuple[Callable[[], st.SearchStrategy[Call]], Plain]] = {
    "softmax": (softmax_calls, plain_softmax),
    "layer_norm": (norm_calls, plain_norm(F.layer_norm)),
    "rms_norm": (norm_calls, plain_norm(F.rms_norm)),
    "feed_forward": (feed_forward_calls, plain_feed_forward),
    "linear_cross_entropy": (cross_entropy_calls, plain_cross_entropy),
    "attention": (attention_calls, plain_attention),
    "merge_attention": (merge_calls, plain_merge),
    "rotary": (rotary_calls, plain_rotary),
    "decode_attention": (decode_calls, plain_decode),
}
# Tensors that have no gradient by design.
CONSTANTS = {"rotary": {"cos", "sin"}, "decode_attention": {"query", "key_cache", "value_cache"}}


def differentiable(name: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    return [n for n, t in tensors.items() if t.is_floating_point() and n not in CONSTANTS.get(name, ())]


def results(
    function: Plain, tensors: dict[str, torch.Tensor], options: dict[str, Any], leaves: list[str]
) -> list[torch.Tensor]:
    """Outputs, and gradients of the tensors named in `leaves`."""
    given = {n: t.detach().requires_grad_(n in leaves) for n, t in tensors.items()}
    output = function(**given, **options)
    outputs = [o for o in (output if isinstance(output, tuple) else (output,)) if o is not None]
    if not leaves:
        return outputs
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(o)).sum() for o in outputs)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss, [given[name] for name in leaves])]


def check(name: str, call: Call) -> None:
    """Both backends err by at most twice PyTorch, plus the roundings of a sum over the longest dimension.

    A rounding is one of the coarsest dtype in the call: gradients in float32 are computed from an output that was
    rounded to it. In float32 the roundings of exponents come to that, as many units as an exponent is large: here below
    100.
    """
    tensors, options = call
    plain, leaves = OPERATORS[name][1], differentiable(name, tensors)
    note(program(name, tensors, options, leaves))
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    exact, pytorch = results(plain, wide, options, leaves), results(plain, tensors, options, leaves)
    longest = max(max(tensor.shape) for tensor in tensors.values())
    unit = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values() if tensor.is_floating_point())
    for backend in ("triton", "torch"):
        with fastformer.backend(backend):
            actual = results(getattr(fastformer, name), tensors, options, leaves)
        for number, (a, p, e) in enumerate(zip(actual, pytorch, exact, strict=True)):
            units = longest**0.5 + (100 if unit == torch.finfo(torch.float32).eps else 0)
            magnitude = max([1.0, *e.abs().flatten().tolist()])
            allowed = 2 * (p.double() - e).abs().max() + unit * magnitude * units
            error = (a.double() - e).abs().max()
            assert error <= allowed, f"{name}, {backend}, result {number}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", OPERATORS)
def test_any_call(name: str) -> None:
    @fuzz
    @given(call=OPERATORS[name][0]())
    def run(call: Call) -> None:
        check(name, call)

    run()


def test_a_failure_is_printed_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is wrong for more than one column fails, and its smallest call is a program that fails too."""
    right = fastformer.softmax

    def wrong(input: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(input, **options) * (1.1 if input.shape[-1] > 1 else 1.0)

    monkeypatch.setattr(fastformer, "softmax", wrong)
    printed: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "note", printed.append)
    with pytest.raises(AssertionError, match="softmax, triton, result 0"):
        test_any_call("softmax")
    source = printed[-1]
    # The program compares the two backends, which know nothing of this test's fault: they agree, or are made not to.
    broken = source.replace(
        "output = fastformer.softmax", "output = (1.1 if backend == 'triton' else 1.0) * fastformer.softmax"
    )
    for text, status in ((source, 0), (broken, 1)):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
        assert (done.returncode != 0) == bool(status), done.stderr
    assert re.search(r"as_strided\(\(\d", source)
