"""The registry has every operator, its formulas are right, and all code that works on all operators uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from einops import rearrange
from processes import python
from torch import Tensor

from fastformer import ops
from fastformer.diagnostics import numerics
from fastformer.kernel_reports import workload
from fastformer.registry import OPERATORS, Call, Make, Operator

pytestmark = pytest.mark.cpu

# Public functions that make arguments of operators: tables, slopes, biases of buckets.
HELPERS = {
    "BlockMask",
    "ScoreMod",
    "alibi_slopes",
    "relative_position_bias",
    "rotary_frequencies",
    "rotary_table",
    "t5_buckets",
}
CPU = torch.device("cpu")


def call(operator: Operator, dtype: torch.dtype = torch.float64, **inputs: Any) -> Call:
    torch.manual_seed(0)
    return operator.inputs(Make(dtype, CPU), **inputs)


@pytest.mark.quick
def test_every_public_operator_is_there() -> None:
    assert set(OPERATORS) == set(ops.__all__) - HELPERS


@pytest.mark.quick
def test_numerics_and_the_workload_have_every_operator() -> None:
    """Numerics and the workload have every operator; other users of the registry have their own test of it."""
    assert {problem.operator for problem in numerics.problems()} == set(OPERATORS)
    assert {variant.operator for variants in workload._CASES.values() for variant in variants.values()} == set(
        OPERATORS
    )


@pytest.mark.quick
def test_a_name_that_no_operator_has_is_refused() -> None:
    """The error names the operator that was asked for and those that exist."""
    with pytest.raises(LookupError, match=r"is called 'sofmax'; there are append_to_cache, .*, softmax, "):
        OPERATORS["sofmax"]


# An operator that exists only in the registry, added before the registry's users are imported.
NEW = """
import fastformer, torch
from fastformer import ops, registry

fastformer.new = ops.new = lambda input: input.softmax(-1)
known = registry.OPERATORS["softmax"]
registry.OPERATORS["new"] = registry.Operator("new", known.inputs, known.plain)

from fastformer.benchmarking.operations import Sizes, operations
from fastformer.diagnostics import doctor, numerics
from fastformer.kernel_reports import workload
from fuzz.test_every_operator import OPERATORS

assert [problem.regime for problem in numerics.problems() if problem.operator == "new"] == ["ordinary"]
assert doctor.run_test("new", doctor.devices()[0], torch.float32).passed
(case,) = workload.cases(operators=["new"], dtypes=["bfloat16"], layouts=["aligned"])
assert case.guarded
case.run()
sizes = Sizes(2, 8, 16, 2, 32, 10, 16, torch.float32)
(operation,) = (each for each in operations(sizes) if each.name == "new")
assert len(operation.run(operation.ours, sizes, torch.device("cpu"))()) == 2
assert "new" in OPERATORS and OPERATORS["new"].calls().example().tensors
"""


@pytest.mark.slow
def test_a_new_operator_is_with_all_of_them() -> None:
    """A new operator in the registry reaches all its users without a line in any of them."""
    done = python("-W", "ignore", "-c", NEW)
    assert done.returncode == 0, done.stderr


def _appended(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, **more: Any) -> Any:
    """Append to the caches token by token."""
    query, table, angles = more["query"], more.get("block_table"), torch.atan2(more["sin"], more["cos"]).double()
    turned = torch.empty_like(query)
    for b, start in enumerate(lengths.tolist()):
        for token in range(key.shape[2]):
            at = start + token
            turned[b, :, token] = reference.rotary(query[b, :, token], angles[at], interleaved=False)
            for cache, new in (
                (key_cache, reference.rotary(key[b, :, token], angles[at], interleaved=False)),
                (value_cache, value[b, :, token]),
            ):
                if table is None:
                    cache[b, :, at] = new
                else:
                    cache[table[b, at // cache.shape[1]], at % cache.shape[1]] = new
    return turned


def _decoded(query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, **more: Any) -> Tensor:
    if "block_table" in more:
        pages = [cache[more["block_table"]] for cache in (key_cache, value_cache)]
        contiguous = "batch pages slots heads dim -> batch heads (pages slots) dim"
        key_cache, value_cache = (rearrange(each, contiguous) for each in pages)
    return reference.attention(query, key_cache, value_cache, key_lengths=lengths, causal=True)[0]


def _embedded(input_ids: Tensor, token_type_ids: Tensor, **tables: Tensor) -> Tensor:
    positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    weights = [tables[name] for name in ("word_weight", "position_weight", "token_type_weight")]
    ids = [input_ids, positions, token_type_ids]
    norm = tables["norm_weight"], tables["norm_bias"]
    return reference.transformer_embedding([*ids], [*weights], *norm, eps=1e-12, keep=None, dropout_p=0.0)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, **more: Tensor) -> Any:
    angles = torch.atan2(sin, cos)
    angles = angles[more["position_ids"][0]] if "position_ids" in more else angles
    return tuple(reference.rotary(x, angles, interleaved) for x in (query, key))


def _merged(outputs: Tensor, lses: Tensor) -> Any:
    weights = lses.exp() / lses.exp().sum(0)
    return (weights[..., None] * outputs).sum(0), lses.exp().sum(0).log()


def _normalized(norm: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(input: Tensor, residual: Tensor | None = None, *, normalized_shape: Any, **options: Any) -> Any:
        total = input if residual is None else input + residual
        output = norm(total, **options)
        return output if residual is None else (output, total)

    return run


# For each operator, the reference with the same arguments, and inputs in addition to the ordinary ones.
JUDGES: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "append_to_cache": (_appended, [{"page_size": 16}]),
    "attention": (
        lambda **given: reference.attention(**given)[0],
        [{"features": ()}, {"features": ("mask", "bias", "softcap"), "queries": 20, "heads": 4, "kv_heads": 2}],
    ),
    "attention_weights": (
        lambda query, key, lse, causal, rows: reference.attention(
            query, key, torch.eye(key.shape[2]).double().expand(*key.shape[:2], -1, -1), causal=causal
        )[0][:, :, list(rows)],
        [],
    ),
    "cross_entropy": (
        lambda input, target, **options: reference.cross_entropy(input, target, **options),
        [{"reduction": "none", "ignored": True, "label_smoothing": 0.1}, {"ignored": True}],
    ),
    "decode_attention": (_decoded, [{"page_size": 5}, {"queries": 1, "heads": 2, "kv_heads": 2}]),
    "feed_forward": (
        lambda input, up_weight, down_weight, activation, **more: reference.feed_forward(
            input,
            up_weight,
            down_weight,
            *(more.get(name) for name in ("up_bias", "down_bias", "gate_weight", "gate_bias")),
            activation,
        ),
        [{"activation": name, "gated": gated, "biases": True} for name in reference.ACTIVATIONS for gated in (0, 1)],
    ),
    "layer_norm": (
        _normalized(lambda x, weight, bias=None, **options: reference.layer_norm(x, weight, bias, **options)),
        [{"bias": True, "residual": True}],
    ),
    "linear_cross_entropy": (lambda input, weight, target: reference.cross_entropy(input @ weight.T, target), []),
    "log_softmax": (
        lambda input, mask=None, causal=False: reference.softmax(
            input, -1, mask=mask, log=True, causal_offset=input.shape[1] - input.shape[0] if causal else None
        ),
        [{"masked": True, "causal": True}, {"causal": True, "rows": 9, "columns": 5}],
    ),
    "merge_attention": (_merged, [{"masked": True}]),
    "rms_norm": (_normalized(reference.rms_norm), [{"residual": True}]),
    "rotary": (_rotated, [{"interleaved": True, "rotary_dim": 16}, {"first_position": 7}]),
    "scaled_dot_product_attention": (
        lambda query, key, value, is_causal: reference.attention(query, key, value, causal=is_causal)[0],
        [{"is_causal": False}],
    ),
    "softmax": (
        lambda input, mask=None, causal=False: reference.softmax(
            input, -1, mask=mask, causal_offset=input.shape[1] - input.shape[0] if causal else None
        ),
        [{"masked": True, "causal": True}, {"causal": True, "rows": 9, "columns": 5}],
    ),
    "transformer_embedding": (_embedded, []),
}


@pytest.mark.parametrize("name", JUDGES)
def test_the_formula_is_the_judge_s(name: str) -> None:
    """Formula and reference agree in float64 on ordinary and other inputs, and with PyTorch's fused function if any."""
    operator, (judge, others) = OPERATORS[name], JUDGES[name]
    for inputs in ({}, *others):
        given = call(operator, **inputs).double()
        expected = operator.run(judge, given)
        # PyTorch's function is left out if it lacks a feature.
        fused = operator.fused is not None and not {"bias", "softcap"} & {*given.tensors, *given.options}
        for function in (operator.plain, *([operator.fused] if fused else ())):
            assert function is not None
            for actual, wanted in zip(operator.run(function, given), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6, msg=lambda m, i=inputs: f"{i}: {m}")


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_takes_its_inputs(name: str) -> None:
    """Each operator takes its inputs in any dtype, and has a gradient for all that are not constants."""
    operator = OPERATORS[name]
    for dtype in (torch.float32, torch.bfloat16):
        given = call(operator, dtype)
        leaves = operator.leaves(given.tensors)
        output = operator.output(operator.ours, given._replace(tensors=leaves))
        wanted = [leaves[each] for each in operator.differentiable(given.tensors)]
        assert output.requires_grad == bool(wanted)
        if wanted:
            assert all(each.abs().sum() > 0 for each in torch.autograd.grad(output.square().sum(), wanted))


def test_a_call_does_not_change_its_tensors() -> None:
    operator = OPERATORS["append_to_cache"]
    given = call(operator)
    before = given.tensors["key_cache"].clone()
    *_, key_cache, _ = operator.run(operator.plain, given)
    assert torch.equal(given.tensors["key_cache"], before) and not torch.equal(key_cache, before)


def test_the_same_numbers_are_drawn_for_every_dtype() -> None:
    exact, rounded = (call(OPERATORS["softmax"], dtype).tensors["input"] for dtype in (torch.float64, torch.bfloat16))
    assert torch.equal(exact.bfloat16(), rounded)
