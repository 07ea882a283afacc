"""The work of every operator in given sizes, as Fastformer, PyTorch and Liger-Kernel do it.

The inputs and PyTorch's version come from the registry, unless users of PyTorch have a faster version. Attention has a
separate study. This module has only the operators that are used together with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastformer import ops
from fastformer.benchmarking.calls import Call, Function, compiled, tensors
from fastformer.benchmarking.inputs import Make, maker
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Peer
from fastformer.registry import OPERATORS

PYTORCH, COMPILED, LIGER = "PyTorch eager", "torch.compile", "Liger-Kernel"


@dataclass(frozen=True)
class Sizes:
    """The sizes of the operators' inputs.

    Attributes:
        batch, sequence: the number of sequences, and the tokens of each sequence.
        hidden, heads: the features of a token, and the number of heads. The head_dim is hidden / heads.
        intermediate: the features of the hidden layer of a feed-forward block.
        classes: the classes of a loss, and the words of an embedding.
        cached: the keys of each sequence in a cache.
        dtype: the dtype of all tensors, except those that are float32 in every run.
        page: the tokens of a page of a paged cache.
    """

    batch: int
    sequence: int
    hidden: int
    heads: int
    intermediate: int
    classes: int
    cached: int
    dtype: torch.dtype
    page: int = 16

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


@dataclass(frozen=True)
class Work:
    """The least amount of work of one run.

    Attributes:
        unit: "FLOP", or "bytes" that are read or written.
        forward, backward: the amount of the forward and of the backward.
    """

    unit: str
    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def products(flop: float) -> Work:
    """Return the work of matrix products with `flop` operations in the forward, and twice as many in the backward."""
    return Work("FLOP", flop, 2 * flop)


@dataclass(frozen=True)
class Operation:
    """One operator with certain options and sizes.

    Attributes:
        name: the name, which begins with the operator's name.
        inputs: makes the inputs of the functions. Tensors that require a gradient get one.
        ours, eager, liger: the same function of these inputs, by Fastformer, by PyTorch and by Liger-Kernel.
        backward: whether the gradients are part of the work.
        random: whether each peer has different results, as with dropout.
        work: the least work. None if it is to read the inputs and write the outputs, and in the backward gradients too.
        others: the functions of further peers, by name.
        exact: a version of `eager` without the rounding of inputs that are only tables; None if `eager` has none.
    """

    name: str
    inputs: Callable[[Make], Sequence[Any]]
    ours: Function
    eager: Function
    liger: Function | None = None
    backward: bool = True
    random: bool = False
    work: Work | None = None
    others: Mapping[str, Function] = field(default_factory=dict)
    exact: Function | None = None

    def peers(self, sizes: Sizes, device: torch.device, compile_eager: bool) -> dict[str, Peer]:
        """The peers that do the work on `device`, by name.

        Args:
            sizes: the sizes of the inputs.
            device: the device that does the work.
            compile_eager: whether to include the eager function with torch.compile.
        """
        run = partial(self.run, sizes=sizes, device=device)
        found = {OURS: Peer(partial(run, self.ours)), PYTORCH: Peer(partial(run, self.eager))}
        if compile_eager:
            found[COMPILED] = Peer(lambda: run(compiled(self.eager)), compiled=True)
        if self.liger is not None:
            found[LIGER] = Peer(partial(run, self.liger), packages=("liger_kernel",), devices=("cuda",))
        return found | {name: Peer(partial(run, other)) for name, other in self.others.items()}

    def run(self, function: Function, sizes: Sizes, device: torch.device, backward: bool | None = None) -> Call:
        """Make a call of one of the functions. None: with the backward if the gradients are part of the work."""
        make = maker(sizes.dtype, device)
        inputs = self.inputs(make)
        if not (self.backward if backward is None else backward):
            return Call(function, inputs)
        shapes = [each for each in self._outputs(sizes) if each.is_floating_point()]
        return Call(function, inputs, [make.normal(*each.shape, grad=False, dtype=each.dtype) for each in shapes])

    def exactly(self, sizes: Sizes, device: torch.device) -> list[Tensor]:
        """The outputs and gradients of the same inputs, computed in float32."""

        def widened(tensor: Tensor) -> Tensor:
            wide = tensor.detach().float() if tensor.is_floating_point() else tensor
            return wide.requires_grad_(tensor.requires_grad)

        call = self.run(self.exact or self.eager, sizes, device)
        gradients = None if call.gradients is None else [each.float() for each in call.gradients]
        return Call(call.function, tree_map_only(Tensor, widened, list(call.inputs)), gradients)()

    def least(self, sizes: Sizes) -> Work:
        """The least work of one run."""
        if self.work is not None:
            return self.work
        leaves, outputs = tree_leaves(list(self._meta_inputs(sizes))), self._outputs(sizes)
        inputs = [each for each in leaves if isinstance(each, Tensor)]
        forward = sum(each.nbytes for each in (*inputs, *outputs))
        # The backward reads the inputs and the outputs' gradients, and writes the inputs' gradients.
        backward = forward + sum(each.nbytes for each in inputs if each.requires_grad)
        return Work("bytes", float(forward), float(backward) if self.backward else 0.0)

    def _outputs(self, sizes: Sizes) -> list[Tensor]:
        """The outputs on the device meta: only their shapes and dtypes."""
        return tensors(self.eager(*self._meta_inputs(sizes)))

    def _meta_inputs(self, sizes: Sizes) -> Sequence[Any]:
        return self.inputs(maker(sizes.dtype, torch.device("meta")))


def operations(sizes: Sizes) -> list[Operation]:
    """The operations of every operator in these sizes. Operators not listed below have the sizes of the registry."""
    known = [
        *_softmax(sizes),
        *_norms(sizes),
        *_positions(sizes),
        _embedding(sizes),
        *_feed_forward(sizes),
        *_losses(sizes),
        *_decoding(sizes),
        *_attention_parts(sizes),
    ]
    named = {word for operation in known for word in operation.name.replace(",", "").split()}
    return [*known, *(_registered(name, name) for name in OPERATORS if name not in named | _OF_ATTENTION)]


_OF_ATTENTION = {"attention", "scaled_dot_product_attention"}


def _registered(
    operator: str,
    title: str,
    inputs: Mapping[str, Any] | None = None,
    eager: Function | None = None,
    liger: Function | None = None,
    others: Mapping[str, Function] | None = None,
    random: bool = False,
    work: Work | None = None,
    options: Mapping[str, Any] | None = None,
) -> Operation:
    """Make the operation of an operator of the registry.

    Args:
        operator: the name of the operator.
        title: the name of the operation.
        inputs: the sizes and features that the operator's inputs are made with.
        eager: PyTorch's version; None for the registry's formula.
        liger, others, random, work: see `Operation`. `eager`, `liger` and `others` take the operator's arguments.
        options: further arguments of the operator.
    """
    entry, given = OPERATORS[operator], inputs or {}
    example = entry.inputs(maker(torch.float32, torch.device("meta")), **given)
    arguments = example.options | dict(options or {})

    def make_tensors(make: Make) -> Sequence[Any]:
        with torch.no_grad():
            made = entry.inputs(make, **given)
        return [entry.leaves(made.tensors)]

    def of_tensors(function: Function) -> Function:
        return lambda tensors: function(**tensors, **arguments)

    return Operation(
        title,
        make_tensors,
        of_tensors(getattr(ops, operator)),
        of_tensors(eager or entry.plain),
        None if liger is None else of_tensors(liger),
        backward=bool(entry.differentiable(example.tensors)),
        random=random,
        work=work,
        others={name: of_tensors(function) for name, function in (others or {}).items()},
    )


def _softmax(sizes: Sizes) -> list[Operation]:
    keys = sizes.sequence
    rows, scale = sizes.batch * sizes.heads * sizes.sequence, sizes.head_dim**-0.5

    def masked(make: Make) -> Sequence[Any]:
        padding = torch.arange(keys) < keys - keys // 4
        later = torch.ones(keys, keys, dtype=torch.bool).triu(1)
        scores = make.normal(sizes.batch, sizes.heads, keys, keys)
        return [scores, make.constant(padding[None, None, None]), make.constant(later)]

    def eager_masked(scores: Tensor, padding: Tensor, later: Tensor) -> Tensor:
        return (scores * scale).masked_fill(~padding | later, float("-inf")).softmax(-1)

    def liger(input: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_softmax

        return liger_softmax(input)

    shape = f"{rows:,} x {keys:,}"
    matrix = {"rows": rows, "columns": keys}
    return [
        _registered("softmax", f"softmax, {shape}", matrix, liger=liger),
        Operation(
            f"softmax, scaled, causal, mask, {shape}",
            masked,
            lambda scores, padding, later: ops.softmax(scores, mask=padding, causal=True, scale=scale),
            eager_masked,
        ),
        _registered("log_softmax", f"log_softmax, {shape}", matrix),
    ]


def _norms(sizes: Sizes) -> list[Operation]:
    def liger(input: Tensor, normalized_shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from liger_kernel.transformers.functional import liger_layer_norm

        return liger_layer_norm(input, weight, bias, eps)

    def liger_rms(input: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(input, weight, eps)

    def liger_rms_residual(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        return liger_fused_add_rms_norm(input, residual, weight, eps)

    # Forward and backward each move four tensors of this size. The forward reads the input and the residual, and writes
    # their sum and the norm of the sum. The backward reads the sum and the gradients of the sum and of the norm. It
    # writes one gradient, which is the same for the input and the residual.
    rows = 4.0 * sizes.tokens * sizes.hidden * sizes.dtype.itemsize
    with_residual = Work("bytes", rows, rows)
    shape = f"{sizes.tokens:,} x {sizes.hidden:,}"
    matrix = {"rows": sizes.tokens, "columns": sizes.hidden}
    layer, rms = matrix | {"bias": True}, matrix
    added = {"residual": True}
    return [
        _registered("layer_norm", f"layer_norm, {shape}", layer, liger=liger),
        _registered("layer_norm", f"layer_norm, residual, {shape}", layer | added, work=with_residual),
        _registered(
            "layer_norm",
            f"layer_norm, dropout, residual, {shape}",
            layer | added | {"dropout_p": 0.1},
            random=True,
            options={"return_sum": False},
        ),
        _registered("rms_norm", f"rms_norm, {shape}", rms, liger=liger_rms),
        _registered(
            "rms_norm", f"rms_norm, residual, {shape}", rms | added, liger=liger_rms_residual, work=with_residual
        ),
    ]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _tables(make: Make, sizes: Sizes, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosine and sine in Fastformer's form and in Llama's, which is (positions, head_dim) in the query's dtype."""
    cos, sin = ops.rotary_table(ops.rotary_frequencies(sizes.head_dim), positions)
    wide = (make.constant(torch.cat((each, each), -1).to(sizes.dtype)) for each in (cos, sin))
    return (make.constant(cos), make.constant(sin), *wide)  # type: ignore[return-value]


def _positions(sizes: Sizes) -> list[Operation]:
    def inputs(make: Make) -> Sequence[Any]:
        # The layout of a projection's result: the heads of a token are next to each other.
        shape = (sizes.batch, sizes.sequence, sizes.heads, sizes.head_dim)
        query, key = (make.normal(*shape, grad=False).transpose(1, 2).requires_grad_() for _ in range(2))
        return [query, key, *_tables(make, sizes, sizes.sequence)]

    def liger(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, wide_cos: Tensor, wide_sin: Tensor) -> Any:
        from liger_kernel.transformers.functional import liger_rope

        return liger_rope(query, key, wide_cos[None], wide_sin[None])

    def exact(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        wide_cos, wide_sin = (torch.cat((each, each), -1) for each in (cos, sin))
        return _turned(query, wide_cos, wide_sin), _turned(key, wide_cos, wide_sin)

    def ours_table(anchor: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary_table(ops.rotary_frequencies(sizes.head_dim), sizes.sequence, device=anchor.device)

    def eager_table(anchor: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, sizes.head_dim, 2, device=anchor.device, dtype=torch.float64)
        places = torch.arange(sizes.sequence, device=anchor.device, dtype=torch.float64)
        angles = torch.outer(places, 10000.0 ** (-pairs / sizes.head_dim))
        return angles.cos().float(), angles.sin().float()

    def ours_slopes(anchor: Tensor) -> Tensor:
        return ops.alibi_slopes(sizes.heads).to(anchor.device)

    def eager_slopes(anchor: Tensor) -> Tensor:
        power = 1 << (sizes.heads.bit_length() - 1)
        heads = torch.arange(sizes.heads, device=anchor.device)
        exponents = torch.where(heads < power, -8.0 * (heads + 1), -4.0 * (2 * (heads - power) + 1))
        return 2.0 ** (exponents / power)

    def anchor(make: Make) -> Sequence[Any]:
        return [make.normal(1, grad=False)]

    # The forward reads and writes query and key. The backward reads and writes their gradients.
    moved = 4.0 * sizes.tokens * sizes.hidden * sizes.dtype.itemsize
    shape = f"{sizes.batch} x {sizes.heads} x {sizes.sequence:,} x {sizes.head_dim}"
    return [
        Operation(
            f"rotary, query and key, {shape}",
            inputs,
            lambda query, key, cos, sin, wide_cos, wide_sin: ops.rotary(query, key, cos, sin),
            lambda query, key, cos, sin, wide_cos, wide_sin: (
                _turned(query, wide_cos, wide_sin),
                _turned(key, wide_cos, wide_sin),
            ),
            liger,
            work=Work("bytes", moved, moved),
            exact=exact,
        ),
        Operation(
            f"rotary_table of rotary_frequencies, {sizes.sequence:,} x {sizes.head_dim}",
            anchor,
            ours_table,
            eager_table,
            backward=False,
        ),
        Operation(f"alibi_slopes, {sizes.heads} heads", anchor, ours_slopes, eager_slopes, backward=False),
    ]


def _embedding(sizes: Sizes) -> Operation:
    # The forward reads the row of each word and writes the result. The backward reads as many bytes again, and writes
    # the gradient of the table of words. The other tables stay in the cache.
    rows, words = sizes.tokens * sizes.hidden, sizes.classes * sizes.hidden
    tokens = {"batch": sizes.batch, "tokens": sizes.sequence, "hidden": sizes.hidden, "words": sizes.classes}
    return _registered(
        "transformer_embedding",
        f"transformer_embedding, {sizes.tokens:,} x {sizes.hidden:,}, {sizes.classes:,} words",
        {**tokens, "padding_idx": 0, "scale": 0.02},
        work=Work("bytes", 2.0 * rows * sizes.dtype.itemsize, float((2 * rows + words) * sizes.dtype.itemsize)),
    )


def _feed_forward(sizes: Sizes) -> list[Operation]:
    def liger(input: Tensor, up_weight: Tensor, down_weight: Tensor, gate_weight: Tensor, activation: str) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        hidden = liger_swiglu(F.linear(input, gate_weight), F.linear(input, up_weight))
        return F.linear(hidden, down_weight)

    shape = f"{sizes.tokens:,} x {sizes.hidden:,} to {sizes.intermediate:,}"
    product = 2.0 * sizes.tokens * sizes.hidden * sizes.intermediate
    widths = {"tokens": sizes.tokens, "features": sizes.hidden, "intermediate": sizes.intermediate}
    return [
        _registered(
            "feed_forward", f"feed_forward, gelu, {shape}", {**widths, "biases": True}, work=products(2 * product)
        ),
        _registered(
            "feed_forward",
            f"feed_forward, gated silu, {shape}",
            {**widths, "gated": True, "activation": "silu"},
            liger=liger,
            work=products(3 * product),
        ),
    ]


def _losses(sizes: Sizes) -> list[Operation]:
    def eager_regularised(
        input: Tensor, target: Tensor, label_smoothing: float, z_loss: float, softcap: float
    ) -> Tensor:
        capped = softcap * torch.tanh(input.float() / softcap)
        loss = F.cross_entropy(capped, target, label_smoothing=label_smoothing)
        return (loss + z_loss * capped.logsumexp(-1).square().mean()).to(input.dtype)

    def liger(input: Tensor, target: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(input, target)

    def liger_regularised(
        input: Tensor, target: Tensor, label_smoothing: float, z_loss: float, softcap: float
    ) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(
            input, target, label_smoothing=label_smoothing, lse_square_scale=z_loss, softcap=softcap
        )

    def liger_linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(input, weight, target)

    def torch_linear(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # PyTorch has this function since 2.13. Without options it keeps all logits.
        return F.linear_cross_entropy(input, weight, target, options=torch.nn.LinearCrossEntropyOptions())

    shape = f"{sizes.tokens:,} x {sizes.classes:,}"
    logits = {"rows": sizes.tokens, "classes": sizes.classes}
    return [
        # PyTorch's loss is computed in the dtype of the logits, which takes less memory than float32.
        _registered("cross_entropy", f"cross_entropy, {shape}", logits, F.cross_entropy, liger),
        _registered(
            "cross_entropy",
            f"cross_entropy, label smoothing, z-loss, softcap, {shape}",
            logits,
            eager_regularised,
            liger_regularised,
            options={"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0},
        ),
        _registered(
            "linear_cross_entropy",
            f"linear_cross_entropy, {shape}, {sizes.hidden:,} features",
            {**logits, "features": sizes.hidden},
            lambda input, weight, target: F.cross_entropy(F.linear(input, weight), target),
            liger_linear,
            others={"PyTorch linear_cross_entropy": torch_linear},
            work=products(2.0 * sizes.tokens * sizes.classes * sizes.hidden),
        ),
    ]


def _decoding(sizes: Sizes) -> list[Operation]:
    """Operations of one new token for each sequence of a batch. Each sequence has a different length in the cache."""
    batch, heads, head_dim, kv_heads = sizes.batch, sizes.heads, sizes.head_dim, max(1, sizes.heads // 4)
    lengths = torch.tensor([sizes.cached - place * sizes.cached // (2 * batch) for place in range(batch)])

    def new(make: Make) -> Sequence[Any]:
        query, key, value = (make.normal(batch, each, 1, head_dim, grad=False) for each in (heads, kv_heads, kv_heads))
        return [query, key, value]

    def contiguous(make: Make) -> Sequence[Any]:
        return [make.normal(batch, kv_heads, sizes.cached, head_dim, grad=False) for _ in range(2)]

    def eager(
        query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, block_table: Tensor | None = None
    ) -> Tensor:
        key, value = key_cache, value_cache
        if block_table is not None:
            key, value = (each[block_table].flatten(1, 2).transpose(1, 2) for each in (key, value))
        mask = torch.arange(key.shape[2], device=key.device) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    def ours_append(new: Sequence[Tensor], caches: Sequence[Tensor], tables: Sequence[Tensor], last: Tensor) -> Any:
        query, key, value = new
        cos, sin, _, _ = tables
        turned = ops.append_to_cache(key, value, *caches, lengths=last, query=query, cos=cos, sin=sin)
        return turned, *caches

    def eager_append(new: Sequence[Tensor], caches: Sequence[Tensor], tables: Sequence[Tensor], last: Tensor) -> Any:
        query, key, value = new
        cos, sin = (table[last][:, None, None] for table in tables[2:])
        rows = torch.arange(batch, device=last.device)
        caches[0][rows, :, last] = _turned(key, cos, sin)[:, :, 0]
        caches[1][rows, :, last] = value[:, :, 0]
        return _turned(query, cos, sin), *caches

    def appended(make: Make) -> Sequence[Any]:
        return [new(make), contiguous(make), _tables(make, sizes, sizes.cached), make.constant((lengths - 1).int())]

    read = 2.0 * int(lengths.sum()) * kv_heads * head_dim * sizes.dtype.itemsize
    written = 2.0 * batch * (heads + 2 * kv_heads) * head_dim * sizes.dtype.itemsize
    shape = f"{batch} x {heads} heads over {kv_heads}, to {sizes.cached:,} keys"
    tokens = {"heads": heads, "kv_heads": kv_heads, "queries": 1, "head_dim": head_dim, "lengths": lengths.tolist()}
    return [
        _registered("decode_attention", f"decode_attention, {shape}", tokens, eager, work=Work("bytes", read)),
        _registered(
            "decode_attention",
            f"decode_attention, paged, {shape}",
            {**tokens, "page_size": sizes.page},
            eager,
            work=Work("bytes", read),
        ),
        Operation(
            f"append_to_cache, with rotary, {shape}",
            appended,
            ours_append,
            eager_append,
            backward=False,
            work=Work("bytes", written),
        ),
    ]


def _attention_parts(sizes: Sizes) -> list[Operation]:
    batch, heads, sequence, head_dim = sizes.batch, sizes.heads, sizes.sequence, sizes.head_dim
    parts, rows = 4, min(64, sizes.sequence)
    last = range(sequence - rows, sequence)

    def attended(make: Make) -> Sequence[Any]:
        query, key = (make.normal(batch, heads, sequence, head_dim, grad=False) for _ in range(2))
        scores = (query @ key.transpose(2, 3)).float() * head_dim**-0.5
        later = make.constant(torch.ones(sequence, sequence, dtype=torch.bool).triu(1))
        return [query, key, scores.masked_fill(later, float("-inf")).logsumexp(-1), later]

    def eager_weights(query: Tensor, key: Tensor, lse: Tensor, later: Tensor) -> Tensor:
        scores = query[:, :, -rows:] @ key.transpose(2, 3) * head_dim**-0.5
        return scores.masked_fill(later[-rows:], float("-inf")).softmax(-1)

    def distant(make: Make) -> Sequence[Any]:
        query, key, value = (make.normal(batch, heads, sequence, head_dim) for _ in range(3))
        return [query, key, value, make.normal(32, heads, dtype=torch.float32)]

    def ours_distant(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        bias = ops.relative_position_bias(table, ops.t5_buckets(), max_distance=128)
        return ops.attention(query, key, value, relative_bias=bias, scale=1.0)  # type: ignore[return-value]

    def eager_distant(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        place = torch.arange(sequence, device=query.device)
        bias = table[_t5_bucket(place - place[:, None])].permute(2, 0, 1).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, bias[None], scale=1.0)

    shape = f"{batch} x {heads} x {sequence:,} x {head_dim}"
    return [
        _registered(
            "merge_attention",
            f"merge_attention, {parts} parts, {shape}",
            {"parts": parts, "rows": batch * heads * sequence, "head_dim": head_dim},
        ),
        Operation(
            f"attention_weights, {rows} rows of {shape}",
            attended,
            lambda query, key, lse, later: ops.attention_weights(query, key, lse, causal=True, rows=last),
            eager_weights,
            backward=False,
            work=Work("FLOP", 2.0 * batch * heads * rows * sequence * head_dim),
        ),
        Operation(
            f"relative_position_bias of t5_buckets, in attention, {shape}",
            distant,
            ours_distant,
            eager_distant,
            work=products(4.0 * batch * heads * sequence**2 * head_dim),
        ),
    ]


def _t5_bucket(distance: Tensor) -> Tensor:
    """T5's bucket of each distance, by T5's formula: 32 buckets for distances up to 128 in both directions."""
    later = (distance > 0).long() * 16
    far = distance.abs()
    beyond = 8 + ((far.clamp_min(1).float() / 8).log() / torch.log(torch.tensor(16.0)) * 8).long()
    return later + torch.where(far < 8, far, beyond.clamp_max(15))
