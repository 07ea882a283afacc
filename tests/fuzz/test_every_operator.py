"""Random calls of every operator obey the rule of accuracy; a failure is printed as a program to run.

FASTFORMER_FUZZ_EXAMPLES sets how many calls of each operator are drawn (default 12), from a new seed if it is set.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import reference
import torch
from devices import here
from fastformer_kernels.attention.arguments import MASK_TILE
from fuzz.reproduction import program
from hypothesis import HealthCheck, given, note, settings

import fastformer
from fastformer import registry
from fastformer.registry import Call
from fastformer.registry.score_mod import DECAY

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["plain", "transposed", "sliced", "expanded"]
EXAMPLES = os.environ.get("FASTFORMER_FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 12),
    derandomize=EXAMPLES is None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Plain = Callable[..., Any]


def draw_tensor(
    draw: st.DrawFn, *shape: int, dtype: torch.dtype, scale: float = 1.0, layouts: Sequence[str] = LAYOUTS
) -> torch.Tensor:
    """Draw random values in a random layout: plain, transposed, sliced or expanded."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(st.sampled_from(layouts))

    def values(*shape: int) -> torch.Tensor:
        return here(torch.randn(shape, generator=generator, device="cpu") * scale).to(dtype)

    if layout == "transposed" and len(shape) > 1:
        return values(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "sliced":
        return values(*shape[:-1], shape[-1] * 2 + 1)[..., 1::2]
    if layout == "expanded" and len(shape) > 1:
        return values(1, *shape[1:]).expand(shape)
    return values(*shape)


def draw_indices(draw: st.DrawFn, *shape: int, below: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return here(torch.randint(below, shape, generator=generator, dtype=dtype, device="cpu"))


def draw_block_mask(draw: st.DrawFn, queries: int, keys: int) -> fastformer.BlockMask:
    """Draw a mask whose tiles show nothing, everything, or random elements."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tiles = torch.randint(3, (-(-queries // MASK_TILE), -(-keys // MASK_TILE)), generator=generator, device="cpu")
    kinds = tiles.repeat_interleave(MASK_TILE, 0).repeat_interleave(MASK_TILE, 1)[:queries, :keys]
    random = torch.rand(kinds.shape, generator=generator, device="cpu") > 0.5
    return fastformer.BlockMask.from_mask(here((kinds == 1) | ((kinds == 2) & random)))


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
    return Call(tensors, options)


@st.composite
def norm_calls(draw: st.DrawFn, *, centered: bool) -> Call:
    dtype, rows, columns = draw(st.sampled_from(DTYPES)), draw(sizes(9)), draw(sizes(70))
    tensors = {"input": draw_tensor(draw, rows, columns, dtype=dtype)}
    if draw(st.booleans()):
        tensors["weight"] = draw_tensor(draw, columns, dtype=dtype)
    if centered and draw(st.booleans()):
        tensors["bias"] = draw_tensor(draw, columns, dtype=dtype)
    if draw(st.booleans()):
        tensors["residual"] = draw_tensor(draw, rows, columns, dtype=dtype)
    # An eps of 1 keeps 1 / sqrt(variance + eps) below 1: a row of nearly equal elements does not amplify roundings.
    return Call(tensors, {"normalized_shape": (columns,), "eps": 1.0})


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
    return Call(tensors, {"activation": draw(st.sampled_from(["relu", "gelu", "silu", "identity"]))})


@st.composite
def linear_cross_entropy_calls(draw: st.DrawFn) -> Call:
    dtype, rows, classes, features = draw(st.sampled_from(DTYPES)), draw(sizes(20)), draw(sizes(40)), draw(sizes(12))
    target = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    if rows > 1 and draw(st.booleans()):
        target[0] = -100
    tensors = {
        "input": draw_tensor(draw, rows, features, dtype=dtype),
        "weight": draw_tensor(draw, classes, features, dtype=dtype),
        "target": target,
    }
    return Call(tensors, {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))})


@st.composite
def cross_entropy_calls(draw: st.DrawFn) -> Call:
    dtype, classes = draw(st.sampled_from(DTYPES)), draw(sizes(40))
    rows = draw(st.lists(sizes(6), max_size=3))
    # At least one row counts, and class weights are far from zero, since the mean divides by the targets' weights.
    count = torch.Size(rows).numel()
    target = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    if count > 1 and draw(st.booleans()):
        target[0] = -100
    tensors = {"input": draw_tensor(draw, *rows[:1], classes, *rows[1:], dtype=dtype, scale=3.0)}
    tensors["target"] = target.view(rows)
    if draw(st.booleans()):
        weight = draw_tensor(draw, classes, dtype=draw(st.sampled_from(DTYPES)))
        tensors["weight"] = weight.abs_().add_(0.5)
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 0.01])),
        "softcap": draw(st.sampled_from([None, 4.0])),
    }
    return Call(tensors, options)


def plain_cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    classes = input.movedim(min(1, input.dim() - 1), -1)
    rows = classes.reshape(-1, classes.shape[-1])
    logits = rows if rows.dtype == torch.float64 else rows.float()
    loss = reference.cross_entropy(logits, target.reshape(-1), class_weight=weight, **options)
    return (loss.view(target.shape) if options["reduction"] == "none" else loss).to(input.dtype)


@st.composite
def attention_calls(
    draw: st.DrawFn,
    *,
    most: int = 2,
    tokens: tuple[int, int] = (40, 40),
    head_dims: tuple[int, int] = (1, 20),
    block_mask: bool = False,
    score_mod: bool = False,
) -> Call:
    dtype, batch, kv_heads = draw(st.sampled_from(DTYPES)), draw(sizes(most)), draw(sizes(most))
    queries, keys = (draw(sizes(size)) for size in tokens)
    head_dim = draw(st.integers(*head_dims))
    heads = kv_heads * draw(sizes(most))
    tensors = {
        name: draw_tensor(draw, batch, h, n, head_dim, dtype=dtype)
        for name, h, n in (("query", heads, queries), ("key", kv_heads, keys), ("value", kv_heads, keys))
    }
    if draw(st.booleans()):
        tensors["bias"] = draw_tensor(draw, 1, heads, queries, keys, dtype=dtype)
    options: dict[str, Any] = {"softcap": draw(st.sampled_from([None, 4.0]))}
    if block_mask:
        options["mask"] = draw_block_mask(draw, queries, keys)
    elif draw(st.booleans()):
        tensors["mask"] = draw_tensor(draw, 1, 1, queries, keys, dtype=torch.float32) > -0.5
    if score_mod:
        options["score_mod"] = DECAY
    return Call(tensors, options)


@st.composite
def attention_weights_calls(draw: st.DrawFn) -> Call:
    tensors, options = draw(attention_calls())
    query, keys = tensors["query"], tensors["key"].shape[2]
    del tensors["value"]
    options |= {
        "causal": draw(st.booleans()),
        "alignment": draw(st.sampled_from(["bottom_right", "top_left"])),
        "window": draw(st.sampled_from([(None, None), (5, 3), (0, None)])),
        "chunk": draw(st.sampled_from([None, 7])),
    }
    if draw(st.booleans()):
        tensors["alibi_slopes"] = torch.linspace(0.1, 0.3, query.shape[1])
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, keys), min_size=len(query), max_size=len(query)))
        tensors["key_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    _, lse = reference.attention(value=wide["key"], **wide, **options)
    for name, size in (("heads", query.shape[1]), ("rows", query.shape[2])):
        options[name] = draw(st.none() | st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    return Call(tensors | {"lse": lse.float()}, options)


def plain_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    heads: list[int] | None,
    rows: list[int] | None,
    **options: Any,
) -> torch.Tensor:
    """The weights as the output of attention to the identity matrix, with a log-sum-exp computed again."""
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    weights, _ = reference.attention(query, key, identity, **options)
    weights = weights if heads is None else weights[:, heads]
    return weights if rows is None else weights[:, :, rows]


@st.composite
def merge_calls(draw: st.DrawFn) -> Call:
    dtype, parts, rows, head_dim = draw(st.sampled_from(DTYPES)), draw(sizes(4)), draw(sizes(20)), draw(sizes(20))
    outputs = draw_tensor(draw, parts, rows, head_dim, dtype=dtype)
    return Call({"outputs": outputs, "lses": draw_tensor(draw, parts, rows, dtype=torch.float32)}, {})


@st.composite
def rotary_calls(draw: st.DrawFn) -> Call:
    dtype, batch, heads, sequence = draw(st.sampled_from(DTYPES)), draw(sizes(2)), draw(sizes(3)), draw(sizes(20))
    pairs, rest = draw(sizes(8)), draw(st.integers(0, 5))
    cos, sin = fastformer.rotary_table(fastformer.rotary_frequencies(2 * pairs), sequence)
    query = draw_tensor(draw, batch, heads, sequence, 2 * pairs + rest, dtype=dtype)
    return Call({"query": query, "cos": cos, "sin": sin}, {"key": None, "interleaved": draw(st.booleans())})


@st.composite
def decode_calls(
    draw: st.DrawFn, *, tokens: int = 60, head_dims: tuple[int, int] = (1, 20), block_mask: bool = False
) -> Call:
    dtype, batch, kv_heads = draw(st.sampled_from(DTYPES)), draw(sizes(2)), draw(sizes(2))
    heads, queries, capacity = kv_heads * draw(sizes(2)), draw(sizes(3)), draw(sizes(tokens))
    head_dim = draw(st.integers(*head_dims))
    lengths = draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    tensors = {"query": draw_tensor(draw, batch, heads, queries, head_dim, dtype=dtype)}
    for name in ("key_cache", "value_cache"):
        tensors[name] = draw_tensor(draw, batch, kv_heads, capacity, head_dim, dtype=dtype)
    tensors["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    options = {"splits": draw(st.integers(1, 4)), "softcap": draw(st.sampled_from([None, 4.0]))}
    if block_mask:
        options["mask"] = draw_block_mask(draw, capacity, capacity)
    return Call(tensors, options)


@st.composite
def append_calls(draw: st.DrawFn) -> Call:
    dtype, batch, kv_heads, tokens = draw(st.sampled_from(DTYPES)), draw(sizes(3)), draw(sizes(2)), draw(sizes(6))
    key_dim, value_dim, cached = draw(sizes(20)), draw(sizes(20)), draw(st.integers(0, 10))
    lengths = draw(st.lists(st.integers(0, cached), min_size=batch, max_size=batch))
    tensors = {
        "key": draw_tensor(draw, batch, kv_heads, tokens, key_dim, dtype=dtype),
        "value": draw_tensor(draw, batch, kv_heads, tokens, value_dim, dtype=dtype),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }
    if draw(st.booleans()):
        new = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        tensors["new_lengths"] = torch.tensor(new, dtype=torch.int32)
    layout = [batch, kv_heads, cached + tokens]
    if draw(st.booleans()):
        page_size = draw(sizes(8))
        needed = -(-(cached + tokens) // page_size)
        order = draw(st.permutations(range(batch * needed + 1)))
        tensors["block_table"] = torch.tensor(order[:-1], dtype=torch.int32).view(batch, needed)
        layout = [len(order), page_size, kv_heads]
    for name, head_dim in (("key_cache", key_dim), ("value_cache", value_dim)):
        tensors[name] = draw_tensor(draw, *layout, head_dim, dtype=dtype, layouts=LAYOUTS[:-1])
    if key_dim > 1 and draw(st.booleans()):
        frequencies = fastformer.rotary_frequencies(2 * draw(sizes(key_dim // 2)))
        tensors["cos"], tensors["sin"] = fastformer.rotary_table(frequencies, cached + tokens)
        if draw(st.booleans()):
            tensors["query"] = draw_tensor(draw, batch, kv_heads * draw(sizes(2)), tokens, key_dim, dtype=dtype)
    return Call(tensors, {"interleaved": draw(st.booleans())})


@st.composite
def embedding_calls(draw: st.DrawFn) -> Call:
    dtype, norm_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    hidden_size, words, positions, types = draw(sizes(40)), draw(sizes(20)), draw(st.integers(9, 20)), draw(sizes(3))
    packed = draw(st.booleans())
    lengths = [*draw(st.lists(st.integers(0, 9), max_size=3)), draw(sizes(9))]
    shape = (sum(lengths),) if packed else (len(lengths), lengths[-1])
    tensors = {"input_ids": draw_indices(draw, *shape, below=words)}
    tensors["word_weight"] = draw_tensor(draw, words, hidden_size, dtype=dtype)
    if draw(st.booleans()):
        tensors["position_weight"] = draw_tensor(draw, positions, hidden_size, dtype=dtype)
        given = draw(st.sampled_from(["default", "own", "shared"]))
        if given == "default" and packed:
            tensors["cu_seqlens"] = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        elif given != "default":
            own = shape if packed or given == "own" else (1, *shape[1:])
            tensors["position_ids"] = draw_indices(draw, *own, below=positions)
    if draw(st.booleans()):
        tensors["token_type_weight"] = draw_tensor(draw, types, hidden_size, dtype=dtype)
        if draw(st.booleans()):
            tensors["token_type_ids"] = draw_indices(draw, *shape, below=types)
    for name in ("norm_weight", "norm_bias"):
        if draw(st.booleans()):
            tensors[name] = draw_tensor(draw, hidden_size, dtype=norm_dtype)
    # As for the norms, an eps of 1 keeps their gradients well conditioned.
    return Call(tensors, {"padding_idx": draw(st.none() | st.integers(0, words - 1)), "eps": 1.0})


def plain_embedding(
    input_ids: torch.Tensor,
    word_weight: torch.Tensor,
    position_weight: torch.Tensor | None = None,
    token_type_weight: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    padding_idx: int | None,
    eps: float,
) -> torch.Tensor:
    if cu_seqlens is not None:
        position_ids = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    elif position_ids is None:
        position_ids = torch.arange(input_ids.shape[-1])
    if padding_idx is not None:
        padding = torch.arange(len(word_weight))[:, None] == padding_idx
        word_weight = torch.where(padding, word_weight.detach(), word_weight)
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    tables = [word_weight, position_weight, token_type_weight]
    weight, bias = (None if t is None else t.to(word_weight.dtype) for t in (norm_weight, norm_bias))
    ids = [input_ids, position_ids.expand(input_ids.shape), types]
    return reference.transformer_embedding([*ids], [*tables], weight, bias, eps, None, 0.0)


@dataclass(frozen=True)
class Drawn(registry.Make):
    """A maker of the registry's inputs that gives them random layouts."""

    draw: st.DrawFn

    def normal(
        self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return draw_tensor(self.draw, *shape, dtype=dtype or self.dtype, scale=scale) + shift

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return draw_indices(self.draw, *shape, below=below)


@st.composite
def ordinary_calls(draw: st.DrawFn, name: str) -> Call:
    """Draw the registry's inputs, of any sizes, with and without each feature."""
    inputs = registry.OPERATORS[name].inputs
    drawn = {"int": sizes(20), "bool": st.booleans()}
    parameters = inspect.signature(inputs).parameters.values()
    given = {each.name: draw(drawn[each.annotation]) for each in parameters if each.annotation in drawn}
    return inputs(Drawn(draw(st.sampled_from(DTYPES)), torch.get_default_device(), draw), **given)


class Operator(NamedTuple):
    """A strategy for calls of an operator, its roundings, and its reference if not the registry's formula.

    It is called by the operator's name in the registry, which may be followed by ", " and what its calls have.

    `units` is the error that a result in float32 may have on top of that of sums, in units of rounding. For an
    exponential it is the size of the exponent, which is a difference of two scores. For other operators it is what
    their tests in tests/ops derive: half a unit for each operation.
    """

    calls: Callable[[], st.SearchStrategy[Call]]
    units: float
    judge: Plain | None = None


OPERATORS = {
    # Scores are below 100: 5 standard deviations of 20 each.
    "softmax": Operator(softmax_calls, units=100),
    # Six operations of the sum with the residual's gradient, and six of the norm.
    "layer_norm": Operator(lambda: norm_calls(centered=True), units=6),
    "rms_norm": Operator(lambda: norm_calls(centered=False), units=6),
    # Activations are bounded by their inputs, and their exponentials by 1: only the sums add roundings.
    "feed_forward": Operator(feed_forward_calls, units=0),
    # Logits are below 15 (cross_entropy), or sums of up to 12 products below 25; softcap rounds 4 times, within 4.
    "cross_entropy": Operator(cross_entropy_calls, units=50, judge=plain_cross_entropy),
    "linear_cross_entropy": Operator(linear_cross_entropy_calls, units=50),
    # Scores are below 5 * 5, plus 5 for the bias, where head_dim is 1, and smaller where they are sums.
    "attention": Operator(attention_calls, units=60),
    "attention_weights": Operator(attention_weights_calls, units=60, judge=plain_attention_weights),
    # One head: the backward walks through whole tiles of 128 queries and keys.
    "attention, block mask": Operator(lambda: attention_calls(most=1, tokens=(10, 140), block_mask=True), units=60),
    # DECAY makes no score larger, and adds the number of the head, below 4.
    "attention, score_mod": Operator(lambda: attention_calls(tokens=(20, 40), score_mod=True), units=60),
    "attention, wide heads": Operator(lambda: attention_calls(tokens=(20, 20), head_dims=(257, 512)), units=60),
    "decode_attention": Operator(decode_calls, units=60),
    "decode_attention, block mask": Operator(lambda: decode_calls(tokens=300, block_mask=True), units=60),
    "decode_attention, wide heads": Operator(lambda: decode_calls(head_dims=(257, 512)), units=60),
    # Log-sum-exps are below 5.
    "merge_attention": Operator(merge_calls, units=10),
    # Two products and a sum: the allowance for sums is enough.
    "rotary": Operator(rotary_calls, units=0),
    "append_to_cache": Operator(append_calls, units=0),
    # Two roundings of the sum, six of the norm and one of the output.
    "transformer_embedding": Operator(embedding_calls, units=5, judge=plain_embedding),
}
# All other operators get the registry's inputs, whose numbers, and therefore exponents, are below 5.
OPERATORS |= {
    name: Operator(partial(ordinary_calls, name), units=10) for name in registry.OPERATORS if name not in OPERATORS
}


def results(
    function: Plain,
    tensors: dict[str, torch.Tensor],
    options: dict[str, Any],
    leaves: list[str],
    written: Sequence[str],
) -> list[torch.Tensor]:
    """Return outputs, then the tensors named in `written` after the call, then gradients of those named in `leaves`."""
    given = {n: deepcopy(t).requires_grad_(n in leaves) for n, t in tensors.items()}
    output = function(**given, **options)
    outputs = [o for o in (output if isinstance(output, tuple) else (output,)) if o is not None]
    outputs += [given[name] for name in written]
    if not leaves:
        return outputs
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(o)).sum() for o in outputs)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss, [given[name] for name in leaves])]


def registered(name: str) -> registry.Operator:
    """The registry's operator of a name in `OPERATORS`."""
    return registry.OPERATORS[name.partition(", ")[0]]


def check(name: str, call: Call) -> None:
    """Fail if a backend errs by more than twice PyTorch, plus the roundings of a sum over the longest dimension.

    A rounding is one of the coarsest dtype in the call, since even float32 gradients are computed from an output that
    was rounded to it. In a float32 call the operator's own roundings are added.
    """
    tensors, options = call
    operator = registered(name)
    plain, leaves, written = OPERATORS[name].judge or operator.plain, operator.differentiable(tensors), operator.written
    note(program(operator.name, tensors, options, leaves, [*written]))
    exact, pytorch = (results(plain, given, options, leaves, written) for given in (call.double().tensors, tensors))
    longest = max(max(tensor.shape, default=1) for tensor in tensors.values())
    unit = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values() if tensor.is_floating_point())
    units = longest**0.5 + (OPERATORS[name].units if unit == torch.finfo(torch.float32).eps else 0)
    for backend in ("triton", "torch"):
        with fastformer.backend(backend):
            actual = results(getattr(fastformer, operator.name), tensors, options, leaves, written)
        for number, (a, p, e) in enumerate(zip(actual, pytorch, exact, strict=True)):
            finite = e.isfinite()
            assert torch.equal(a.isfinite(), finite), f"{name}, {backend}, result {number}: infinities differ"
            a, p, e = (each.double().where(finite, 0.0) for each in (a, p, e))
            magnitude = max([1.0, *e.abs().flatten().tolist()])
            allowed = 2 * (p - e).abs().max() + unit * magnitude * units
            error = (a - e).abs().max()
            assert error <= allowed, f"{name}, {backend}, result {number}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", OPERATORS)
def test_any_call(name: str) -> None:
    @fuzz
    @given(call=OPERATORS[name].calls())
    def run(call: Call) -> None:
        check(name, call)

    run()


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "append_to_cache"])
def test_each_gradient_alone(name: str, backend: str) -> None:
    """A gradient is the same whether it is computed alone or together with the others."""
    operator = registered(name)
    function = getattr(fastformer, operator.name)

    @settings(max_examples=4)
    @given(call=OPERATORS[name].calls())
    def run(call: Call) -> None:
        tensors, options = call
        leaves = operator.differentiable(tensors)
        together = results(function, tensors, options, leaves, [])
        count = len(together) - len(leaves)
        unit = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values() if tensor.is_floating_point())
        for number, leaf in enumerate(leaves):
            *_, alone = results(function, tensors, options, [leaf], [])
            wanted = together[count + number]
            # The same up to the order of its sums: alone, a faster way may be possible.
            scale = max(1.0, *wanted.abs().flatten().tolist()) if wanted.numel() else 1.0
            torch.testing.assert_close(
                alone, wanted, rtol=0.0, atol=8 * unit * scale, msg=lambda m, n=leaf: f"{n}: {m}"
            )

    run()


def test_a_failure_is_printed_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is wrong for several columns fails, and prints a program that can fail too."""
    right = fastformer.softmax

    def wrong(input: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(input, **options) * (1.1 if input.shape[-1] > 1 else 1.0)

    monkeypatch.setattr(fastformer, "softmax", wrong)
    printed: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "note", printed.append)
    with pytest.raises(AssertionError, match="softmax, triton, result 0"):
        test_any_call("softmax")
    source = printed[-1]
    # The program compares the two backends, without this test's fault: they agree, unless one is changed.
    broken = source.replace(
        "output = fastformer.softmax", "output = (1.1 if backend == 'triton' else 1.0) * fastformer.softmax"
    )
    for text, status in ((source, 0), (broken, 1)):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
        assert (done.returncode != 0) == bool(status), done.stderr
    assert re.search(r"as_strided\(\(\d", source)
