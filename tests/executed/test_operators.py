"""Every kernel is right on small tensors, forward and backward, with every feature: values, bounds and races."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from einops import rearrange
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.configurations import forced
from fastformer_kernels.matmul import Configuration
from fastformer_kernels.plans import forced_plan

import fastformer
from fastformer.ops.attention.attention import attention
from fastformer.ops.attention.cache import append_to_cache
from fastformer.ops.attention.decode import decode_attention
from fastformer.ops.attention.merge import merge_attention
from fastformer.ops.attention.weights import attention_weights
from fastformer.ops.cross_entropy import cross_entropy
from fastformer.ops.embedding import transformer_embedding
from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.linear_cross_entropy import linear_cross_entropy
from fastformer.ops.normalization import layer_norm, rms_norm
from fastformer.ops.rotary import rotary
from fastformer.ops.softmax import log_softmax, softmax
from fastformer.registry import OPERATORS, Call, Make
from fastformer.registry.score_mod import DECAY

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Function = Callable[..., Any]


def results(function: Function, tensors: list[torch.Tensor], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Return outputs and gradients in `dtype`, for fixed gradients of the outputs."""
    torch.manual_seed(seed)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.manual_seed(seed)
    weights = [torch.randn(output.shape, device=output.device) for output in outputs]
    finite = [torch.where(torch.isfinite(output), output, 0.0) for output in outputs]
    loss = sum((output * weight.to(output.dtype)).sum() for output, weight in zip(finite, weights, strict=True))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def agree(
    operator: Function, exact: Function, pytorch: Function, tensors: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Fail unless the operator's results and gradients obey the rule of accuracy."""
    tensors = [tensor.to(dtype) for tensor in tensors]
    with fastformer.backend("triton"):
        actual = results(operator, tensors, dtype, seed=1)
    wanted = results(exact, tensors, torch.float64, seed=1)
    longest = max(max(tensor.shape, default=1) for tensor in tensors)
    assert_accurate(actual, results(pytorch, tensors, dtype, seed=1), wanted, dtype, longest)


def assert_accurate(
    actual: list[torch.Tensor],
    pytorch: list[torch.Tensor],
    wanted: list[torch.Tensor],
    dtype: torch.dtype,
    longest: int,
) -> None:
    """Fail unless results of a call in `dtype`, with longest dimension `longest`, obey the rule of accuracy.

    For float32 results the unit is the error of a sum over a row, added in another order than PyTorch's. Its terms are
    exponentials of numbers as large as the results, which include the log-sum-exp. The rounding of these numbers is
    the relative error of the terms. In 16 bits the rounding of the results hides both errors.
    """
    largest = max(e[torch.isfinite(e)].abs().max().item() for e in wanted if torch.isfinite(e).any())
    roundings = (1.0 + largest) * longest**0.5 if dtype == torch.float32 else 1.0
    for number, (a, p, e) in enumerate(zip(actual, pytorch, wanted, strict=True)):
        finite = torch.isfinite(e)
        assert torch.equal(torch.isfinite(a), finite), f"result {number}: infinities differ"
        magnitude = max(1.0, e[finite].abs().max().item() if finite.any() else 0.0)
        assert_as_accurate(f"result {number}", a[finite], p[finite].to(a.dtype), e[finite], scale=magnitude * roundings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
def test_ordinary_inputs(name: str, dtype: torch.dtype) -> None:
    """Every operator of the registry is accurate on its ordinary inputs; later tests add features."""
    operator = OPERATORS[name]
    torch.manual_seed(0)
    call = operator.inputs(Make(dtype, torch.device(DEVICE)))
    names = operator.differentiable(call.tensors)

    def run(function: Function, call: Call) -> list[torch.Tensor]:
        leaves = operator.leaves(call.tensors)
        outputs = operator.run(function, call._replace(tensors=leaves))
        torch.manual_seed(1)
        weights = [torch.randn(output.shape, device=output.device) for output in outputs]
        loss = sum((output * weight.to(output)).sum() for output, weight in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, [leaves[each] for each in names]) if names else ()
        return [*(output.detach() for output in outputs), *grads]

    with fastformer.backend("triton"):
        actual = run(operator.ours, call)
    longest = max(max(tensor.shape, default=1) for tensor in call.tensors.values())
    assert_accurate(actual, run(operator.plain, call), run(operator.plain, call.double()), dtype, longest)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


QUERIES, KEYS, HEADS = 37, 45, 2
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "relative-bias": lambda: {"relative_bias": randn(HEADS, 41)},
    "prefix": lambda: {"causal": True, "prefix_lengths": torch.tensor([11], dtype=torch.int32, device=DEVICE)},
    "chunk": lambda: {"chunk": 16},
    "scale-of-each-head": lambda: {"scale": torch.tensor([0.3, -0.2], device=DEVICE)},
    "causal-top-left": lambda: {"causal": True, "alignment": "top_left"},
    "window": lambda: {"window": (9, 4)},
    "softcap": lambda: {"softcap": 3.0},
    "alibi": lambda: {"alibi_slopes": torch.tensor([0.1, 0.3], device=DEVICE)},
    "sinks": lambda: {"sinks": torch.tensor([0.5, -1.0], device=DEVICE)},
    "bias": lambda: {"bias": randn(1, HEADS, QUERIES, KEYS)},
    "bias-of-keys": lambda: {"bias": randn(1, 1, 1, KEYS)},
    "mask": lambda: {"mask": torch.rand(1, 1, QUERIES, KEYS, device=DEVICE) > 0.3},
    "key-lengths": lambda: {"key_lengths": torch.tensor([21], dtype=torch.int32, device=DEVICE)},
    "everything": lambda: {
        "causal": True,
        "window": (30, None),
        "softcap": 5.0,
        "alibi_slopes": torch.tensor([0.1, 0.3], device=DEVICE),
        "sinks": torch.tensor([0.5, -1.0], device=DEVICE),
        "mask": torch.rand(1, HEADS, QUERIES, KEYS, device=DEVICE) > 0.2,
        "bias": randn(1, 1, QUERIES, KEYS),
    },
}
LEARNED = ("bias", "relative_bias", "alibi_slopes", "scale", "sinks")


def check_attention(tensors: list[torch.Tensor], options: dict[str, Any], dtype: torch.dtype) -> None:
    learned = [name for name in LEARNED if name in options]

    def call(function: Function) -> Function:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: torch.Tensor) -> Any:
            # Slopes and sinks are float32 for any dtype.
            named = {
                name: tensor.float() if "bias" not in name and tensor.dtype != torch.float64 else tensor
                for name, tensor in zip(learned, given, strict=True)
            }
            return function(query, key, value, **{**options, **named})

        return run

    def operator(*tensors: torch.Tensor, **options: Any) -> Any:
        return attention(*tensors, return_lse=True, **options)

    leaves = [*tensors, *(options[name] for name in learned)]
    agree(call(operator), call(reference.attention), call(reference.attention), leaves, dtype)


@pytest.mark.parametrize("feature", FEATURES)
def test_attention(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.INTERPRETER)
    torch.manual_seed(0)
    tensors = [randn(1, HEADS, size, 16) for size in (QUERIES, KEYS, KEYS)]
    check_attention(tensors, FEATURES[feature](), torch.bfloat16)


def test_attention_with_a_score_mod(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.INTERPRETER)
    torch.manual_seed(0)
    tensors = [randn(1, HEADS, size, 16) for size in (QUERIES, KEYS, KEYS)]
    q, k = torch.arange(QUERIES, device=DEVICE)[:, None], torch.arange(KEYS, device=DEVICE)
    factor = torch.exp2(-0.1 * (q - k).abs())

    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        scores = query @ key.transpose(-1, -2) / 4 * factor.to(query.dtype)
        scores = scores + torch.arange(HEADS, device=DEVICE)[:, None, None]
        scores = scores.masked_fill(k > q + KEYS - QUERIES, float("-inf"))
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    def operator(*tensors: torch.Tensor) -> Any:
        return attention(*tensors, causal=True, score_mod=DECAY, return_lse=True)

    agree(operator, exact, exact, tensors, torch.bfloat16)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("architecture", ["interpreter", "sm_90"])
def test_attention_with_a_block_mask(architecture: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", {**launch.ARCHITECTURES, "interpreter": launch.INTERPRETER}[architecture])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    torch.manual_seed(0)
    # With this head_dim no tensor descriptor adds up dQ, whose atomic addition the executor takes for a race.
    tensors = [randn(1, heads, size, 20) for heads, size in ((2, 140), (1, 150), (1, 150))]
    mask = torch.rand(1, 2, 140, 150, device=DEVICE) > 0.5
    mask[:, 0, :128, :128] = True
    mask[:, 0, :128, 128:] = False
    mask[:, 1, 128:] = False
    block_mask = fastformer.BlockMask.from_mask(mask)

    def operator(*tensors: torch.Tensor) -> Any:
        return attention(*tensors, mask=block_mask, return_lse=True)

    def exact(*tensors: torch.Tensor) -> Any:
        return reference.attention(*tensors, mask=mask)

    agree(operator, exact, exact, tensors, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"window": (100, 5)}], ids=str)
def test_attention_with_a_mask_that_is_packed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer.ops.attention import packed_mask

    monkeypatch.setattr(packed_mask, "_FEWEST_ELEMENTS", 1)
    torch.manual_seed(0)
    tensors = [randn(1, heads, size, 20) for heads, size in ((2, 140), (1, 150), (1, 150))]
    mask = torch.rand(1, 1, 140, 150, device=DEVICE) > 0.5
    mask[:, :, :128, :128] = True
    mask[:, :, 128:, 128:] = False
    packed_mask._kept.clear()

    def operator(*tensors: torch.Tensor) -> Any:
        return attention(*tensors, mask=mask, return_lse=True, **options)

    def exact(*tensors: torch.Tensor) -> Any:
        return reference.attention(*tensors, mask=mask, **options)

    agree(operator, exact, exact, tensors, torch.bfloat16)
    assert len(packed_mask._kept) == 2  # by query and by key


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_as_an_architecture_launches_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.ARCHITECTURES["sm_90"])
    torch.manual_seed(0)
    # Two tiles of queries and of keys, a group of two heads, head_dims that fill no tile, and unusual strides.
    tensors = [randn(1, 150, 2, 20).transpose(1, 2), randn(1, 1, 140, 20), randn(1, 1, 140, 9 * 2)[..., ::2]]
    check_attention(tensors, {"causal": True}, dtype)


@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
def test_attention_of_wide_heads(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.ARCHITECTURES[architecture])
    torch.manual_seed(0)
    tensors = [randn(1, heads, size, dim) for heads, size, dim in ((2, 35, 320), (1, 20, 320), (1, 20, 264))]
    check_attention(tensors, {"causal": True}, torch.bfloat16)


def test_decoding_with_wide_keys() -> None:
    """A key of 576 elements is split between two tiles, and the values are a view of the keys."""
    torch.manual_seed(0)
    query, cache = randn(1, 3, 1, 576).bfloat16(), randn(1, 1, 37, 576).bfloat16()
    values = cache[..., :512]
    with fastformer.backend("triton"):
        actual = decode_attention(query, cache, values, lengths=torch.tensor([37], dtype=torch.int32, device=DEVICE))
    wanted, plain = (
        reference.attention(*(t.to(kind) for t in (query, cache, values)))[0]
        for kind in (torch.float64, torch.bfloat16)
    )
    assert_as_accurate("output", actual, plain, wanted)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_attention_by_tensor_descriptors(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is right with tiles copied in bulk, dQ added in bulk, and specialised warps for whole tiles.

    There is one tile of keys: the copy engine's additions are atomic, but those of several programs would count as a
    race here.
    """
    from fastformer_kernels import launch
    from fastformer_kernels.attention.launch import uses_descriptors

    monkeypatch.setattr(launch, "_target", launch.ARCHITECTURES["sm_90"])
    torch.manual_seed(0)
    tensors = [randn(1, size, 2, 32).transpose(1, 2) for size in (256, 128, 128)]
    assert uses_descriptors(*(tensor.bfloat16() for tensor in tensors))
    check_attention(tensors, options, torch.bfloat16)


SPECIALIZED = {
    operation: AttentionConfiguration(*tile, descriptors=True, warp_specialize=True, one_loop=True)
    for operation, tile in {
        "attention_forward": (128, 128, 4, 2),
        "attention_deterministic": (32, 128, 4, 2),
    }.items()
}


@pytest.fixture
def specialized_warps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launches of sm_90 with specialised warps, forward and backward: each program writes only what it owns."""
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.ARCHITECTURES["sm_90"])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.manual_seed(0)
    with forced(SPECIALIZED):
        yield


@pytest.mark.parametrize("feature", ["causal", "window", "chunk", "prefix", "key-lengths", "softcap", "alibi", "sinks"])
def test_attention_with_specialized_warps(specialized_warps: None, feature: str) -> None:
    """Several tiles of queries and keys, whose numbers fill neither a tile nor 16 bytes."""
    tensors = [randn(1, size, HEADS, 16).transpose(1, 2) for size in (149, 139, 139)]
    check_attention(tensors, FEATURES[feature](), torch.bfloat16)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_by_descriptors_of_whole_tensors(
    specialized_warps: None, batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs take all tiles, and find each head by its place in a descriptor that they make once."""
    from fastformer_kernels.attention import launch

    monkeypatch.setattr(launch, "multiprocessors_of", lambda tensor: 2)
    found = []
    describes = launch.describes_whole_tensors
    monkeypatch.setattr(
        "fastformer_kernels.attention.forward.describes_whole_tensors",
        lambda *given: found.append(describes(*given)) or found[-1],
    )
    configurations = {"attention_forward": replace(SPECIALIZED["attention_forward"], resident=1)}
    tensors = [randn(2, heads, 256, 16) for heads in (2, 1, 1)]
    if batch_first:
        tensors = [rearrange(randn(2, 256, heads, 16), "b n h d -> b h n d") for heads in (2, 1, 1)]
    with forced(configurations):
        check_attention(tensors, {"causal": True}, torch.bfloat16)
    assert found == [True]


def test_packed_attention_with_specialized_warps(specialized_warps: None) -> None:
    """The NaN of one sequence stays there, although tiles and statistics reach into the next sequence."""
    lengths = [67, 0, 150, 3]
    boundaries = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    tensors = [randn(sum(lengths), 2, 16).bfloat16() for _ in range(4)]
    whole, spoiled = (slice(0, 67), slice(67, 217))

    def gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
        with fastformer.backend("triton"):
            output = attention(*leaves, cu_seqlens_q=boundaries, max_seqlen_q=max(lengths), causal=True)
        return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3])]

    clean = gradients(*tensors)
    for tensor in tensors:
        tensor[spoiled] = float("nan")
    for got, wanted in zip(gradients(*tensors), clean, strict=True):
        torch.testing.assert_close(got[whole], wanted[whole], rtol=0, atol=0)
        torch.testing.assert_close(got[217:], wanted[217:], rtol=0, atol=0)
        assert got[spoiled].isnan().all()


def test_packed_attention(tiles: str) -> None:
    torch.manual_seed(0)
    lengths = [5, 0, 40, 17]
    boundaries = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    tensors = [randn(sum(lengths), 2, 16).bfloat16() for _ in range(3)]
    options = {"causal": True}
    with fastformer.backend("triton"):
        packed = attention(*tensors, cu_seqlens_q=boundaries, max_seqlen_q=max(lengths), **options)
        start = 0
        for length in lengths:
            part = [tensor[start : start + length].transpose(0, 1)[None] for tensor in tensors]
            if length:
                alone = attention(*part, **options)
                torch.testing.assert_close(packed[start : start + length].transpose(0, 1)[None], alone)
            start += length


def test_dropout_of_attention_is_the_reference_s(tiles: str) -> None:
    torch.manual_seed(0)
    tensors = [randn(1, 2, size, 8) for size in (35, 19, 19)]
    torch.manual_seed(1)
    state = torch.randint(0, 2**63 - 1, (2,)).tolist()
    keep = reference.dropout_keep(*state, 0.3, (1, 2, 35, 19))

    def exact(*tensors: torch.Tensor) -> Any:
        return reference.attention(*tensors, keep=keep, dropout_p=0.3)[0]

    agree(lambda *tensors: attention(*tensors, dropout_p=0.3), exact, exact, tensors, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 33), (3, 17000), (3, 17001), (5, 17001)])
def test_softmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pytorch = lambda x: torch.softmax(x, -1)  # noqa: E731
    agree(lambda x: softmax(x, -1), lambda x: reference.softmax(x, -1), pytorch, [randn(*shape) * 3], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(5, 33), (300, 24), (2, 20000), (19, 521), (3, 9000)])
def test_norm(shape: tuple[int, int], centered: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    columns = shape[1]
    x, weight, bias = randn(*shape) * 2 + 1, randn(columns), randn(columns)
    if centered:
        agree(
            lambda x, w, b: layer_norm(x, (columns,), w, b, 1e-5),
            lambda x, w, b: reference.layer_norm(x, w, b, 1e-5),
            lambda x, w, b: F.layer_norm(x, (columns,), w, b, 1e-5),
            [x, weight, bias],
            dtype,
        )
    else:
        agree(
            lambda x, w: rms_norm(x, (columns,), w, 1e-5),
            lambda x, w: reference.rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, (columns,), w, 1e-5),
            [x, weight],
            dtype,
        )


@pytest.mark.parametrize("columns", [24, 515])
def test_norm_with_residual(columns: int) -> None:
    torch.manual_seed(0)
    agree(
        lambda x, r, w, b: layer_norm(x, (columns,), w, b, 1e-5, residual=r),
        lambda x, r, w, b: (reference.layer_norm(x + r, w, b, 1e-5), x + r),
        lambda x, r, w, b: (F.layer_norm(x + r, (columns,), w, b, 1e-5), x + r),
        [randn(9, columns), randn(9, columns), randn(columns), randn(columns)],
        torch.bfloat16,
    )


@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_feed_forward(activation: str, gated: bool, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.INTERPRETER)
    with forced_plan(plan):
        check_feed_forward(activation, gated, torch.bfloat16)


@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward_as_an_architecture_launches_it(
    dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastformer_kernels import launch

    monkeypatch.setattr(launch, "_target", launch.ARCHITECTURES["sm_90"])
    with forced_plan(plan):
        check_feed_forward("silu", True, dtype)


OVERLAPS = {
    "plain": {},
    "stores": {"descriptor_stores": True},
    "one-loop": {"flatten": True},
    "stores-in-one-loop": {"descriptor_stores": True, "flatten": True},
    "separate-warps": {"descriptor_stores": True, "warp_specialize": True},
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_by_descriptors(gated: bool, overlap: str) -> None:
    """Rows are aligned, so that tiles are copied by descriptors. Each program computes several tiles, one not whole."""
    tile = Configuration(16, 32, 16, 4, 2, descriptors=True, parts=2, **OVERLAPS[overlap])
    kernels = ("forward", "gated_forward", "output", "backward", "gated_backward")
    with forced_plan("fused"), forced({f"fused_{kernel}": tile for kernel in kernels}):
        check_feed_forward("silu", gated, torch.bfloat16, features=24, intermediate=56)


def feed_forward_tensors(gated: bool, features: int = 20, intermediate: int = 45) -> list[torch.Tensor]:
    tokens = 37
    shapes = [(tokens, features), (intermediate, features), (features, intermediate), (intermediate,), (features,)]
    shapes += [(intermediate, features), (intermediate,)] if gated else []
    # So small that the exponentials of the reference stay finite in float16.
    return [randn(*shape) / 2 for shape in shapes]


def check_feed_forward(activation: str, gated: bool, dtype: torch.dtype, **sizes: int) -> None:
    torch.manual_seed(0)

    def call(function: Function) -> Function:
        def run(*tensors: torch.Tensor) -> torch.Tensor:
            return function(*tensors, *([] if gated else [None, None]), activation)

        return run

    plain = call(reference.feed_forward)
    agree(call(feed_forward), plain, plain, feed_forward_tensors(gated, **sizes), dtype)


def check_backends_agree(function: Function, tensors: list[torch.Tensor]) -> None:
    """Fail unless the backends agree, with the same dropout, up to a rounding or two of results in bfloat16."""

    def run(backend: str) -> list[torch.Tensor]:
        with fastformer.backend(backend):
            return results(function, tensors, torch.bfloat16, seed=1)

    for kernel, pytorch in zip(run("triton"), run("torch"), strict=True):
        magnitude = max(1.0, pytorch.abs().max().item())
        torch.testing.assert_close(kernel, pytorch, atol=2**-6 * magnitude, rtol=0.0)


@pytest.mark.parametrize("plan", ["fused", "library"])
def test_feed_forward_with_dropout_and_residual(plan: str) -> None:
    torch.manual_seed(0)
    residual = randn(37, 20).bfloat16()

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        options = {"hidden_dropout_p": 0.3, "output_dropout_p": 0.2}
        return feed_forward(*tensors[:-1], activation="gelu", residual=tensors[-1], **options)

    with forced_plan(plan):
        check_backends_agree(run, [*feed_forward_tensors(gated=False), residual])


def test_embedding() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (3, 11), device=DEVICE)
    types = torch.randint(0, 2, (3, 11), device=DEVICE)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return transformer_embedding(ids, *tensors, token_type_ids=types, padding_idx=0, eps=1e-5, dropout_p=0.3)

    check_backends_agree(run, [randn(30, 24), randn(11, 24), randn(2, 24), randn(24), randn(24)])


def test_attention_weights() -> None:
    torch.manual_seed(0)
    query, key = randn(1, 2, 37, 16).bfloat16(), randn(1, 2, 45, 16).bfloat16()
    scores = query.double() @ key.double().transpose(-1, -2) / 4
    scores = scores.masked_fill(~torch.ones(37, 45, dtype=torch.bool).tril(8), float("-inf"))
    with fastformer.backend("triton"):
        weights = attention_weights(query, key, scores.logsumexp(-1).float(), causal=True, heads=[1], rows=[0, 5, 36])
    expected = scores.softmax(-1)[:, 1:, [0, 5, 36]]
    torch.testing.assert_close(weights.double(), expected, atol=2**-9, rtol=2**-8)


@pytest.mark.parametrize("classes", [5000, 5001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: torch.dtype, classes: int) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 5000, (7,), device=DEVICE)
    agree(
        lambda x: cross_entropy(x, target, reduction="sum"),
        lambda x: F.cross_entropy(x, target, reduction="sum"),
        lambda x: F.cross_entropy(x.float(), target, reduction="sum"),
        [randn(7, classes)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 70, (21,), device=DEVICE)
    target[::4] = -100
    agree(
        lambda x, w, b: linear_cross_entropy(x, w, target, b, reduction="sum"),
        lambda x, w, b: F.cross_entropy(x @ w.T + b, target, reduction="sum"),
        lambda x, w, b: F.cross_entropy((x @ w.T + b).float(), target, reduction="sum"),
        [randn(21, 16), randn(70, 16), randn(70)],
        dtype,
    )


@pytest.mark.parametrize("options", [{"log": True}, {"mask": True, "causal": True, "scale": 0.5}], ids=str)
def test_forms_of_softmax(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = dict(options)
    log, masked = given.pop("log", False), given.pop("mask", False)
    mask = torch.rand(1, 33, device=DEVICE) > 0.3 if masked else None

    def exact(x: torch.Tensor) -> torch.Tensor:
        scores = x * given.get("scale", 1.0)
        if given.get("causal"):
            scores = scores.masked_fill(torch.ones(5, 33, dtype=torch.bool).tril(28).logical_not(), float("-inf"))
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return scores.log_softmax(-1) if log else scores.softmax(-1)

    operator = log_softmax if log else softmax
    agree(lambda x: operator(x, mask=mask, **given), exact, exact, [randn(2, 5, 33)], torch.bfloat16)


@pytest.mark.parametrize("log", [False, True])
def test_masked_softmax_of_few_long_rows(log: bool) -> None:
    """Several programs share a row, of which a causal one leaves nothing to the last programs."""
    torch.manual_seed(0)
    size = 16401
    hidden = torch.rand(size, device=DEVICE) > 0.7

    def exact(x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(2, size, dtype=torch.bool, device=DEVICE).tril().logical_not()
        scores = (x * 0.5).masked_fill(later | hidden, float("-inf"))
        return scores.log_softmax(-1) if log else scores.softmax(-1)

    operator = partial(log_softmax if log else softmax, mask=~hidden, scale=0.5, causal=True, alignment="top_left")
    hidden[0] = False
    agree(operator, exact, exact, [randn(2, size)], torch.bfloat16)


def test_norm_with_dropout_and_input_bias() -> None:
    torch.manual_seed(0)
    tensors = [randn(9, 40).bfloat16() for _ in range(2)] + [randn(40).bfloat16() for _ in range(3)]

    def run(backend: str) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        x, residual, weight, bias, input_bias = leaves
        torch.manual_seed(1)
        with fastformer.backend(backend):
            output, total = layer_norm(x, (40,), weight, bias, residual=residual, input_bias=input_bias, dropout_p=0.4)
            loss = output.float().square().sum() + total.float().square().sum()
        return [output.detach(), total.detach(), *torch.autograd.grad(loss, leaves)]

    # Both backends drop the same elements, and round alike except for the order of their float32 sums.
    for kernel, pytorch in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(kernel, pytorch, atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    torch.manual_seed(0)
    angles = torch.rand(21, 6, dtype=torch.float64) * 6
    cos, sin = angles.cos().float(), angles.sin().float()
    features = "(pairs two)" if interleaved else "(two pairs)"

    def exact(*tensors: torch.Tensor) -> Any:
        rotated = []
        for x in tensors:
            a, b = rearrange(x[..., :12], f"... {features} -> two ... pairs", two=2)
            c, s = cos.to(x.dtype), sin.to(x.dtype)
            turned = rearrange([a * c - b * s, b * c + a * s], f"two ... pairs -> ... {features}")
            rotated.append(torch.cat([turned, x[..., 12:]], -1))
        return tuple(rotated)

    tensors = [randn(2, heads, 21, 16) for heads in (4, 2)]
    agree(lambda q, k: rotary(q, k, cos, sin, interleaved=interleaved), exact, exact, tensors, torch.bfloat16)


@pytest.mark.parametrize("paged", [False, True])
def test_decoding_with_a_cache(paged: bool) -> None:
    """Appending, rotating and decoding over split keys give the rows of attention over the whole sequences."""
    torch.manual_seed(0)
    batch, heads, kv_heads, head_dim, tokens = 2, 4, 2, 16, 3
    lengths = torch.tensor([70, 9], dtype=torch.int32, device=DEVICE)
    shape = (14, 16, kv_heads, head_dim) if paged else (batch, kv_heads, 96, head_dim)
    table = torch.randperm(14)[: batch * 6].view(batch, 6).to(torch.int32) if paged else None
    start = [randn(*shape).bfloat16() for _ in range(2)]
    query, key, value = (randn(batch, h, tokens, head_dim).bfloat16() for h in (heads, kv_heads, kv_heads))
    angles = torch.rand(96, head_dim // 2)

    def run(backend: str) -> list[torch.Tensor]:
        caches = [cache.clone() for cache in start]
        with fastformer.backend(backend):
            rotated = append_to_cache(
                key, value, *caches, lengths=lengths, block_table=table, query=query, cos=angles.cos(), sin=angles.sin()
            )
            output, lse = decode_attention(
                rotated, *caches, lengths=lengths + tokens, block_table=table, splits=3, return_lse=True
            )
        return [*caches, rotated, output, lse]

    for kernel, pytorch in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(kernel, pytorch, atol=2**-7, rtol=2**-7)


@pytest.mark.parametrize("page_size", [None, 16])
def test_decoding_with_a_block_mask(page_size: int | None) -> None:
    """Two queries in different tiles of the mask, and a sequence whose first query has no position."""
    torch.manual_seed(0)
    operator = OPERATORS["decode_attention"]
    sizes = {"lengths": [129, 144], "kv_heads": 2, "page_size": page_size, "block_mask": True}
    call = operator.inputs(Make(torch.bfloat16, torch.device(DEVICE)), **sizes)
    call.options["splits"] = 3
    with fastformer.backend("triton"):
        (actual,) = operator.run(operator.ours, call)
    torch.testing.assert_close(actual, operator.run(operator.plain, call)[0], atol=2**-6, rtol=2**-6)
    call.tensors["lengths"].fill_(1)
    with fastformer.backend("triton"):
        (actual,) = operator.run(operator.ours, call)
    assert not actual[:, :, 0].any()


def test_merging_of_attention() -> None:
    torch.manual_seed(0)
    lses = randn(3, 2, 7)
    lses[1, 0, 2] = float("-inf")

    def exact(outputs: torch.Tensor) -> torch.Tensor:
        return (outputs * lses.to(outputs.dtype).softmax(0)[..., None]).sum(0)

    agree(lambda outputs: merge_attention(outputs, lses)[0], exact, exact, [randn(3, 2, 7, 20)], torch.bfloat16)


def test_deterministic_attention() -> None:
    torch.manual_seed(0)
    tensors = [randn(1, HEADS, size, 16) for size in (QUERIES, KEYS, KEYS)]
    torch.use_deterministic_algorithms(True)
    try:
        check_attention(tensors, FEATURES["bias"](), torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
