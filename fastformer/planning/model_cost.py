"""The cost of a model: parameters, operations and memory of a training step, counted by running it on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from fastformer.models.block import Block
from fastformer.planning.model_work import Batch, arguments, autocast

MASKED_SHARE = 0.15
"""The share of tokens that a masked-LM head predicts (Devlin et al. 2019)."""


@dataclass(frozen=True)
class Flops:
    """The floating-point operations of one example's forward. A backward takes twice as many.

    Attributes:
        tokens: tokens of the example; for an encoder-decoder, source and target together.
        products: operations of matrix products with weights. Embeddings are looked up and take none.
        attention: operations of the two matrix products of attention, over the (query, key) pairs that may attend.
    """

    tokens: int
    products: int
    attention: int

    @property
    def total(self) -> int:
        return self.products + self.attention

    @property
    def per_token(self) -> float:
        return self.total / self.tokens


@dataclass(frozen=True)
class ModelCost:
    """The size of a model, and the cost of a training step for each example.

    Attributes:
        parameters: parameters of the whole model; tied ones count once.
        blocks_parameters: parameters of all blocks, of both stacks together.
        block_parameters: parameters of the largest block.
        flops: operations of an example's forward.
        sublayer_tokens: the sum, over all sublayers (attention, cross-attention, feed-forward), of an example's tokens
            that go through the sublayer.
        saved: bytes that an example keeps for the backward.
        saved_by_blocks: the part of `saved` that all blocks keep together.
        saved_by_block: the part of `saved` that is kept by the block that keeps most.
        block_inputs: bytes of the inputs of all blocks for an example: they are kept when each block is recomputed.
        casts: bytes kept for the backward that do not depend on the number of examples: weights in the computation's
            precision, and the gradient of the vocabulary projection.
        casts_by_blocks: the part of `casts` that all blocks keep together.
        casts_by_block: the part of `casts` that is kept by the block that keeps most.
    """

    parameters: int
    blocks_parameters: int
    block_parameters: int
    flops: Flops
    sublayer_tokens: int
    saved: int
    saved_by_blocks: int
    saved_by_block: int
    block_inputs: int
    casts: int
    casts_by_blocks: int
    casts_by_block: int


def forward_flops(model: PreTrainedModel, length: int, target_length: int | None = None) -> Flops:
    """Count the operations of one example's forward by running `model` on meta. For the lengths see `model_cost`."""
    with torch.no_grad():
        return _count(model, "32-true", 1, length, target_length).flops


def model_cost(model: PreTrainedModel, precision: str, length: int, target_length: int | None = None) -> ModelCost:
    """Count a training step of `model` on meta, by two runs with different numbers of examples.

    Args:
        model: a model on meta, in the dtype of its weights.
        precision: Lightning's precision, one of `fastformer.arguments.PRECISIONS`.
        length: tokens of each example; for an encoder-decoder, of its source. An image model ignores it.
        target_length: tokens of an encoder-decoder's target; by default `length`.
    """
    model.train()
    once, twice = (_count(model, precision, examples, length, target_length) for examples in (1, 2))
    blocks = _blocks(model)
    growing = {part: twice.saved[part] - saved for part, saved in once.saved.items()}
    fixed = {part: saved - growing[part] for part, saved in once.saved.items()}
    return ModelCost(
        parameters=_size(model),
        blocks_parameters=sum(map(_size, blocks)),
        block_parameters=max(map(_size, blocks)),
        flops=once.flops,
        sublayer_tokens=once.sublayer_tokens,
        saved=sum(growing.values()),
        saved_by_blocks=sum(growing.values()) - growing[None],
        saved_by_block=max(growing[block] for block in range(len(blocks))),
        block_inputs=once.block_inputs,
        casts=sum(fixed.values()),
        casts_by_blocks=sum(fixed.values()) - fixed[None],
        casts_by_block=max(fixed[block] for block in range(len(blocks))),
    )


@dataclass
class _Counts:
    """The counts of one run. `saved` has the bytes by block number; None stands for everything outside the blocks."""

    flops: Flops = field(init=False)
    tokens: int = 0
    sublayer_tokens: int = 0
    block_inputs: int = 0
    saved: dict[int | None, int] = field(default_factory=lambda: {None: 0})


def _count(model: PreTrainedModel, precision: str, examples: int, length: int, target_length: int | None) -> _Counts:
    target_length = target_length or length
    labelled = max(1, round(MASKED_SHARE * length)) * examples
    batch = Batch(examples, examples * length, length, examples * target_length, target_length, labelled)
    counts = _Counts()
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with _counting_blocks(model, counts), autocast(precision), counter:
        model(**arguments(model, batch))
    by_operator = counter.get_flop_counts()["Global"]
    attention = by_operator.get(torch.ops.fastformer.attention, 0)
    counts.flops = Flops(counts.tokens, sum(by_operator.values()) - attention, attention)
    return counts


@contextmanager
def _counting_blocks(model: PreTrainedModel, counts: _Counts) -> Iterator[None]:
    """Count the inputs of the model's blocks and what autograd keeps. Each storage counts once, parameters do not."""
    own = [*model.parameters(), *model.buffers()]
    known = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in own}
    current: int | None = None

    def enter(index: int, block: Block, inputs: tuple[Any, ...]) -> None:
        nonlocal current
        current, hidden = index, inputs[0]
        counts.saved[index] = 0
        counts.block_inputs += hidden.numel() * hidden.element_size()
        counts.sublayer_tokens += hidden.shape[0] * (2 if block.cross_attention is None else 3)
        if block.attention.layer == 0:
            counts.tokens += hidden.shape[0]

    def leave(*_: Any) -> None:
        nonlocal current
        current = None

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage
            counts.saved[current] += storage.nbytes()
        return tensor

    blocks = _blocks(model)
    hooks = [block.register_forward_pre_hook(partial(enter, index)) for index, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(model: PreTrainedModel) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Make `FlopCounterMode` pass tensors, instead of their shapes, to `formula`."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@_raw
def _projection_flops(input: torch.Tensor, weight: torch.Tensor, *_: Any, out_val: Any) -> int:
    return 2 * (input.numel() // input.shape[-1]) * weight.numel()


@_raw
def _feed_forward_flops(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    *_: Any,
    out_val: Any,
) -> int:
    weights = up_weight.numel() + down_weight.numel() + (0 if gate_weight is None else gate_weight.numel())
    return 2 * (input.numel() // input.shape[-1]) * weights


@_raw
def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, out_val: Any) -> int:
    """Count an attention call with packed sequences that all have the same length."""
    call = AttentionArguments(*arguments)
    sequences = call.batch(query)
    pairs = attended_pairs(query.shape[0] // sequences, key.shape[0] // sequences, call.left, call.right)
    return 2 * query.shape[1] * (query.shape[2] + value.shape[2]) * sequences * pairs


def attended_pairs(queries: int, keys: int, left: int, right: int) -> int:
    """The number of (query, key) pairs that attend when a query sees `left` keys before its position and `right` after.

    `left` and `right` may be UNBOUNDED. Positions count from the start of both sequences.
    """
    position = np.arange(queries)
    first = np.zeros_like(position) if left == UNBOUNDED else np.maximum(position - left, 0)
    last = np.full_like(position, keys - 1) if right == UNBOUNDED else np.minimum(position + right, keys - 1)
    return int(np.maximum(last - first + 1, 0).sum())


_FORMULAS = {
    torch.ops.fastformer.feed_forward: _feed_forward_flops,
    torch.ops.fastformer.linear_cross_entropy: _projection_flops,
    torch.ops.fastformer.attention: _attention_flops,
}
