"""Every operator's work in a size, as Fastformer, PyTorch and Liger-Kernel do it.

Attention has a study of its own; here is what stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastformer import ops
from fastformer.benchmarking.calls import Call, Function, compiled, tensors
from fastformer.benchmarking.inputs import Make, maker
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.study import Peer

PYTORCH, COMPILED, LIGER = "PyTorch eager", "torch.compile", "Liger-Kernel"


@dataclass(frozen=True)
class Sizes:
    """How much there is to do.

    Attributes:
        batch, sequence, hidden, heads: of the tokens; the head_dim is hidden / heads.
        intermediate: of the feed-forward. classes: of losses and words.
        cached: keys of each sequence in a cache, in pages of `page`.
        dtype: of what is not said to be float32.
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
    """The least that one run must do.

    Attributes:
        unit: FLOP, or bytes: what is read and what is written.
        forward, backward: how many.
    """

    unit: str
    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def products(flop: float) -> Work:
    """Of matrix products whose forward does `flop`, and whose backward has two for each."""
    return Work("FLOP", flop, 2 * flop)


@dataclass(frozen=True)
class Operation:
    """One operator in one form.

    Attributes:
        name: begins with the operators' names.
        inputs: makes what the functions take; what requires a gradient gets one.
        ours, eager, liger: the same function of these inputs.
        backward: whether the gradients are part of the work.
        random: results are everybody's own, as dropout's are.
        work: what it does; None: it moves inputs and outputs, and in the backward gradients too.
        others: who else does it, by name.
        exact: what `eager` would find if its inputs that are only tables were not rounded; None: that is the same.
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
        """Who does it on `device`.

        Args:
            compile_eager: whether torch.compile of the eager function takes part.
        """
        run = partial(self.run, sizes=sizes, device=device)
        found = {OURS: Peer(partial(run, self.ours)), PYTORCH: Peer(partial(run, self.eager))}
        if compile_eager:
            found[COMPILED] = Peer(lambda: run(compiled(self.eager)), compiled=True)
        if self.liger is not None:
            found[LIGER] = Peer(partial(run, self.liger), packages=("liger_kernel",), devices=("cuda",))
        return found | {name: Peer(partial(run, other)) for name, other in self.others.items()}

    def run(self, function: Function, sizes: Sizes, device: torch.device, backward: bool | None = None) -> Call:
        """A call of one of the functions, with the backward or without (None: as the operation has it)."""
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
        """What one run must do."""
        if self.work is not None:
            return self.work
        inputs, outputs = tensors(list(self._meta_inputs(sizes))), self._outputs(sizes)
        forward = sum(each.nbytes for each in (*inputs, *outputs))
        # The inputs and the outputs' gradients are read, and the inputs' gradients written.
        backward = forward + sum(each.nbytes for each in inputs if each.requires_grad)
        return Work("bytes", float(forward), float(backward) if self.backward else 0.0)

    def _outputs(self, sizes: Sizes) -> list[Tensor]:
        """In shape and dtype alone."""
        return tensors(self.eager(*self._meta_inputs(sizes)))

    def _meta_inputs(self, sizes: Sizes) -> Sequence[Any]:
        return self.inputs(maker(sizes.dtype, torch.device("meta")))


def operations(sizes: Sizes) -> list[Operation]:
    """Of every operator, in these sizes."""
    return [
        *_softmax(sizes),
        *_norms(sizes),
        *_positions(sizes),
        _embedding(sizes),
        *_feed_forward(sizes),
        *_losses(sizes),
        *_decoding(sizes),
        *_attention_parts(sizes),
    ]


def _softmax(sizes: Sizes) -> list[Operation]:
    rows, keys = sizes.heads * sizes.sequence, sizes.sequence
    scale = sizes.head_dim**-0.5

    def scores(make: Make) -> Sequence[Any]:
        return [make.normal(sizes.batch, sizes.heads, keys, keys)]

    def masked(make: Make) -> Sequence[Any]:
        padding = torch.arange(keys) < keys - keys // 4
        later = torch.ones(keys, keys, dtype=torch.bool).triu(1)
        return [*scores(make), make.constant(padding[None, None, None]), make.constant(later)]

    def eager_masked(scores: Tensor, padding: Tensor, later: Tensor) -> Tensor:
        return (scores * scale).masked_fill(~padding | later, float("-inf")).softmax(-1)

    def liger(x: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_softmax

        return liger_softmax(x)

    shape = f"{sizes.batch * rows:,} x {keys:,}"
    return [
        Operation(f"softmax, {shape}", scores, ops.softmax, partial(F.softmax, dim=-1), liger),
        Operation(
            f"softmax, scaled, causal, mask, {shape}",
            masked,
            lambda scores, padding, later: ops.softmax(scores, mask=padding, causal=True, scale=scale),
            eager_masked,
        ),
        Operation(f"log_softmax, {shape}", scores, ops.log_softmax, partial(F.log_softmax, dim=-1)),
    ]


def _norms(sizes: Sizes) -> list[Operation]:
    hidden, eps = [sizes.hidden], 1e-5

    def inputs(make: Make, rows: int = 1, bias: bool = True) -> Sequence[Any]:
        x = [make.normal(sizes.tokens, sizes.hidden) for _ in range(rows)]
        return [*x, *(make.normal(sizes.hidden) for _ in range(1 + bias))]

    def eager_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, hidden, weight, bias, eps), total

    def eager_dropout(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x, 0.1), hidden, weight, bias, eps)

    def eager_rms_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, hidden, weight, eps), total

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_layer_norm

        return liger_layer_norm(x, weight, bias, eps)

    def liger_rms(x: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, weight, eps)

    def liger_rms_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        return liger_fused_add_rms_norm(x, residual, weight, eps)

    # Both ways four: two added, their sum and the norm of it; the sum, the gradients of it and of the norm, and the
    # gradient of what was added, which is one for both.
    rows = 4.0 * sizes.tokens * sizes.hidden * sizes.dtype.itemsize
    with_residual = Work("bytes", rows, rows)
    shape = f"{sizes.tokens:,} x {sizes.hidden:,}"
    return [
        Operation(
            f"layer_norm, {shape}",
            inputs,
            lambda x, weight, bias: ops.layer_norm(x, hidden, weight, bias, eps),
            lambda x, weight, bias: F.layer_norm(x, hidden, weight, bias, eps),
            liger,
        ),
        Operation(
            f"layer_norm, residual, {shape}",
            partial(inputs, rows=2),
            lambda x, residual, weight, bias: ops.layer_norm(x, hidden, weight, bias, eps, residual=residual),
            eager_residual,
            work=with_residual,
        ),
        Operation(
            f"layer_norm, dropout, residual, {shape}",
            partial(inputs, rows=2),
            lambda x, residual, weight, bias: ops.layer_norm(
                x, hidden, weight, bias, eps, residual, dropout_p=0.1, return_sum=False
            ),
            eager_dropout,
            random=True,
        ),
        Operation(
            f"rms_norm, {shape}",
            partial(inputs, bias=False),
            lambda x, weight: ops.rms_norm(x, hidden, weight, eps),
            lambda x, weight: F.rms_norm(x, hidden, weight, eps),
            liger_rms,
        ),
        Operation(
            f"rms_norm, residual, {shape}",
            partial(inputs, rows=2, bias=False),
            lambda x, residual, weight: ops.rms_norm(x, hidden, weight, eps, residual=residual),
            eager_rms_residual,
            liger_rms_residual,
            work=with_residual,
        ),
    ]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _tables(make: Make, sizes: Sizes, positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosine and sine as we take them, and as Llama does: (positions, head_dim) in the dtype of the query."""
    cos, sin = ops.rotary_table(ops.rotary_frequencies(sizes.head_dim), positions)
    wide = (make.constant(torch.cat((each, each), -1).to(sizes.dtype)) for each in (cos, sin))
    return (make.constant(cos), make.constant(sin), *wide)  # type: ignore[return-value]


def _positions(sizes: Sizes) -> list[Operation]:
    def inputs(make: Make) -> Sequence[Any]:
        # As projections leave it: the heads of a token beside each other.
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

    # Query and key are read and written; so are their gradients.
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
    def inputs(make: Make) -> Sequence[Any]:
        tables = [make.normal(rows, sizes.hidden, scale=0.02) for rows in (sizes.classes, sizes.sequence, 2)]
        ids = [make.integers(high, sizes.batch, sizes.sequence) for high in (sizes.classes, 2)]
        return [*ids, *tables, make.normal(sizes.hidden), make.normal(sizes.hidden)]

    def ours(
        ids: Tensor, types: Tensor, words: Tensor, places: Tensor, of_types: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return ops.transformer_embedding(
            ids, words, places, of_types, weight, bias, token_type_ids=types, padding_idx=0
        )

    def eager(
        ids: Tensor, types: Tensor, words: Tensor, places: Tensor, of_types: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        position = torch.arange(sizes.sequence, device=ids.device)
        total = F.embedding(ids, words, 0) + F.embedding(position, places) + F.embedding(types, of_types)
        return F.layer_norm(total, [sizes.hidden], weight, bias, 1e-12)

    # A word's row is read and the result written; the backward reads both again and writes the words' gradient. The
    # other tables stay in the cache.
    rows, words = sizes.tokens * sizes.hidden, sizes.classes * sizes.hidden
    return Operation(
        f"transformer_embedding, {sizes.tokens:,} x {sizes.hidden:,}, {sizes.classes:,} words",
        inputs,
        ours,
        eager,
        work=Work("bytes", 2.0 * rows * sizes.dtype.itemsize, float((2 * rows + words) * sizes.dtype.itemsize)),
    )


def _feed_forward(sizes: Sizes) -> list[Operation]:
    hidden, intermediate = sizes.hidden, sizes.intermediate

    def inputs(make: Make) -> Sequence[Any]:
        up, down = make.normal(intermediate, hidden, scale=0.02), make.normal(hidden, intermediate, scale=0.02)
        return [make.normal(sizes.tokens, hidden), up, down, make.normal(intermediate), make.normal(hidden)]

    def gated(make: Make) -> Sequence[Any]:
        weights = [make.normal(intermediate, hidden, scale=0.02) for _ in range(2)]
        return [make.normal(sizes.tokens, hidden), *weights, make.normal(hidden, intermediate, scale=0.02)]

    def eager(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    def liger(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        return F.linear(liger_swiglu(F.linear(x, gate), F.linear(x, up)), down)

    shape = f"{sizes.tokens:,} x {hidden:,} to {intermediate:,}"
    product = 2.0 * sizes.tokens * hidden * intermediate
    return [
        Operation(f"feed_forward, gelu, {shape}", inputs, ops.feed_forward, eager, work=products(2 * product)),
        Operation(
            f"feed_forward, gated silu, {shape}",
            gated,
            lambda x, gate, up, down: ops.feed_forward(x, up, down, gate_weight=gate, activation="silu"),
            lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
            liger,
            work=products(3 * product),
        ),
    ]


def _losses(sizes: Sizes) -> list[Operation]:
    def logits(make: Make) -> Sequence[Any]:
        return [make.normal(sizes.tokens, sizes.classes), make.integers(sizes.classes, sizes.tokens)]

    def features(make: Make) -> Sequence[Any]:
        weight = make.normal(sizes.classes, sizes.hidden, scale=0.02)
        return [make.normal(sizes.tokens, sizes.hidden), weight, make.integers(sizes.classes, sizes.tokens)]

    def eager_regularised(logits: Tensor, target: Tensor) -> Tensor:
        capped = 30.0 * torch.tanh(logits.float() / 30.0)
        loss = F.cross_entropy(capped, target, label_smoothing=0.1)
        return (loss + 1e-4 * capped.logsumexp(-1).square().mean()).to(logits.dtype)

    def liger(logits: Tensor, target: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(logits, target)

    def liger_regularised(logits: Tensor, target: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy(logits, target, label_smoothing=0.1, lse_square_scale=1e-4, softcap=30.0)

    def liger_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(x, weight, target)

    def torch_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # In PyTorch since 2.13; without options it would keep all logits.
        return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())

    shape = f"{sizes.tokens:,} x {sizes.classes:,}"
    return [
        Operation(f"cross_entropy, {shape}", logits, ops.cross_entropy, F.cross_entropy, liger),
        Operation(
            f"cross_entropy, label smoothing, z-loss, softcap, {shape}",
            logits,
            partial(ops.cross_entropy, label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
            eager_regularised,
            liger_regularised,
        ),
        Operation(
            f"linear_cross_entropy, {shape}, {sizes.hidden:,} features",
            features,
            ops.linear_cross_entropy,
            lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
            liger_linear,
            others={"PyTorch linear_cross_entropy": torch_linear},
            work=products(2.0 * sizes.tokens * sizes.classes * sizes.hidden),
        ),
    ]


def _decoding(sizes: Sizes) -> list[Operation]:
    """One new token for each sequence of a batch, whose caches are filled to lengths of their own."""
    batch, heads, head_dim, page = sizes.batch, sizes.heads, sizes.head_dim, sizes.page
    kv_heads, pages = max(1, heads // 4), sizes.cached // page
    lengths = torch.tensor([sizes.cached - place * sizes.cached // (2 * batch) for place in range(batch)])

    def new(make: Make) -> Sequence[Any]:
        query, key, value = (make.normal(batch, each, 1, head_dim, grad=False) for each in (heads, kv_heads, kv_heads))
        return [query, key, value]

    def contiguous(make: Make) -> Sequence[Any]:
        return [make.normal(batch, kv_heads, sizes.cached, head_dim, grad=False) for _ in range(2)]

    def paged(make: Make) -> Sequence[Any]:
        caches = [make.normal(batch * pages, page, kv_heads, head_dim, grad=False) for _ in range(2)]
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
        return [*caches, make.constant(order.view(batch, pages).int())]

    def filled(make: Make) -> Tensor:
        return make.constant(lengths.int())

    def eager(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(key.shape[2], device=key.device) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    def eager_paged(query: Tensor, key: Tensor, value: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = (each[table].flatten(1, 2).transpose(1, 2) for each in (key, value))
        return eager(query, key, value, lengths)

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
    return [
        Operation(
            f"decode_attention, {shape}",
            lambda make: [new(make)[0], *contiguous(make), filled(make)],
            lambda query, key, value, lengths: ops.decode_attention(query, key, value, lengths=lengths),
            eager,
            backward=False,
            work=Work("bytes", read),
        ),
        Operation(
            f"decode_attention, paged, {shape}",
            lambda make: [new(make)[0], *paged(make), filled(make)],
            lambda query, key, value, table, lengths: ops.decode_attention(
                query, key, value, lengths=lengths, block_table=table
            ),
            eager_paged,
            backward=False,
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

    def split(make: Make) -> Sequence[Any]:
        outputs = make.normal(parts, batch, heads, sequence, head_dim)
        return [outputs, make.normal(parts, batch, heads, sequence, dtype=torch.float32)]

    def eager_merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        weights = lses.softmax(0)[..., None]
        return (weights * outputs).sum(0).to(outputs.dtype), lses.logsumexp(0)

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
        Operation(f"merge_attention, {parts} parts, {shape}", split, ops.merge_attention, eager_merge),
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
    """T5's buckets, 32 up to a distance of 128 in both directions, of (queries, keys) distances, as T5 has it."""
    later = (distance > 0).long() * 16
    far = distance.abs()
    beyond = 8 + ((far.clamp_min(1).float() / 8).log() / torch.log(torch.tensor(16.0)) * 8).long()
    return later + torch.where(far < 8, far, beyond.clamp_max(15))
