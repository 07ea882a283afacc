"""The feed-forward block's matrix products, with activation, dropout and residual in their epilogues, and gradients.

    hidden = drop(act(x U^T + b)), or drop(act(x G^T + c) * (x U^T + b)) when gated
    output = drop(hidden D^T + d) + residual
    d up, d gate and hidden recomputed, from d hidden = d output D and the pre-activations

Gated forms: Shazeer 2020, https://arxiv.org/abs/2002.05202. The two products of a gated layer share the tile of x. The
pre-activations are stored only if a backward will need them. The hidden layer, which the weight gradient of D needs, is
never saved: the backward computes it again together with the gradients.

The backward of the activation is in the epilogue of the product that makes d hidden, not in the prologue of the
products that use d up. In a prologue it would run again for every tile of d x's columns, inside the loop over the
depth, between a copy and the tensor cores, and once more for the weight gradient. Compiled for sm_90 (128 x 128 x 64,
GELU), that loop has three copies instead of two, and 202 registers instead of 163. For sm_80 it spills 1,328 bytes.

The other products (the weight and input gradients) have nothing to fuse: the GPU's library computes them. Every sum is
accumulated in float32 in a fixed order, so the result is deterministic.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastformer_kernels.activations import gradients_of, hidden_of
from fastformer_kernels.configurations import chosen
from fastformer_kernels.dropout import Dropout, drop, dropout_arguments
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import architecture_of
from fastformer_kernels.matmul import (
    Configuration,
    OperandStrides,
    column_part,
    element_offsets,
    operands,
    result_access,
    source_of,
    store_part,
    target_of,
    tile_origin,
    tile_products,
)
from fastformer_kernels.plans import product_precision, shape_class
from fastformer_kernels.precision import input_precision
from fastformer_kernels.rows import Matrix, Vector


@triton.jit
def _add_bias(x, bias, column, columns):
    """Add a `Vector`, if it has a pointer, at the columns `column` to a tile `x`."""
    if bias.pointer is not None:
        at_columns = tl.load(bias.pointer + column.to(tl.int64) * bias.stride, mask=column < columns, other=0.0)
        x += at_columns.to(tl.float32)[None, :]
    return x


@triton.jit
def _hidden_forward_kernel(
    input,
    up_weight,
    gate_weight,
    strides,
    up_bias,
    gate_bias,
    hidden,
    up,
    gate,
    dropout,
    tokens,
    intermediate_size,
    in_features,
    product,
    ACTIVATION: tl.constexpr,
):
    """Compute hidden = drop(act(x U^T + b)), or drop(act(x G^T + c) * (x U^T + b)) when gated.

    Args:
        input, up_weight, gate_weight: x, U and G (None where not gated), as `operands` returns them.
        strides: their `OperandStrides`.
        up_bias, gate_bias: b and c, a `Vector` each, whose pointer may be None.
        hidden: (tokens, intermediate_size), contiguous, written.
        up, gate: like hidden, for the pre-activations; each may be None.
        dropout: a `Dropout`.
        product: a `Product`.
    """
    PART_COLUMNS: tl.constexpr = product.BLOCK_COLUMNS // product.PARTS
    ROWS: tl.constexpr = product.BLOCK_ROWS
    COLUMNS: tl.constexpr = product.BLOCK_COLUMNS
    LEFT: tl.constexpr = product.LEFT_ACCESS
    RIGHT: tl.constexpr = product.RIGHT_ACCESS
    input = source_of(input, tokens, in_features, strides.left, strides.left_depth, LEFT, ROWS, product)
    up_weight = source_of(
        up_weight, intermediate_size, in_features, strides.right, strides.right_depth, RIGHT, COLUMNS, product
    )
    if gate_weight is not None:
        gate_weight = source_of(
            gate_weight, intermediate_size, in_features, strides.second_right, strides.second_right_depth,
            RIGHT, COLUMNS, product,
        )  # fmt: skip
    hidden = target_of(hidden, tokens, intermediate_size, product)
    if up is not None:
        up = target_of(up, tokens, intermediate_size, product)
    if gate is not None:
        gate = target_of(gate, tokens, intermediate_size, product)
    tiles = tl.cdiv(tokens, ROWS) * tl.cdiv(intermediate_size, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=product.FLATTEN, warp_specialize=product.WARP_SPECIALIZE
    ):
        first_row, first_column = tile_origin(tile, tokens, intermediate_size, product)
        up_tile, gate_tile = tile_products(
            input, up_weight, gate_weight, strides, first_row, first_column, tokens, intermediate_size, in_features,
            product,
        )  # fmt: skip
        row = first_row + tl.arange(0, ROWS)
        for part in tl.static_range(product.PARTS):
            part_column = first_column + part * PART_COLUMNS
            column = part_column + tl.arange(0, PART_COLUMNS)
            up_part = _add_bias(column_part(up_tile, part, product.PARTS), up_bias, column, intermediate_size)
            if up is not None:
                store_part(up, up_part, first_row, part_column, tokens, intermediate_size, product)
            if gate_weight is None:
                hidden_part = hidden_of(up_part, None, ACTIVATION)
            else:
                gate_part = _add_bias(column_part(gate_tile, part, product.PARTS), gate_bias, column, intermediate_size)
                if gate is not None:
                    store_part(gate, gate_part, first_row, part_column, tokens, intermediate_size, product)
                hidden_part = hidden_of(up_part, gate_part, ACTIVATION)
            hidden_part = drop(hidden_part, dropout, row, part_column, ROWS, PART_COLUMNS)
            store_part(hidden, hidden_part, first_row, part_column, tokens, intermediate_size, product)


@triton.jit
def _output_kernel(
    hidden,
    down_weight,
    strides,
    bias,
    residual,
    output,
    dropout,
    tokens,
    out_features,
    intermediate_size,
    product,
):
    """Compute output = drop(hidden D^T + d) + residual.

    Args:
        hidden, down_weight: hidden and D, as `operands` returns them.
        strides: their `OperandStrides`.
        bias, residual: d, a `Vector`, and the residual, a `Matrix`; their pointers may be None.
        output: (tokens, out_features), contiguous, written.
        dropout: a `Dropout`.
        product: a `Product`.
    """
    PART_COLUMNS: tl.constexpr = product.BLOCK_COLUMNS // product.PARTS
    ROWS: tl.constexpr = product.BLOCK_ROWS
    COLUMNS: tl.constexpr = product.BLOCK_COLUMNS
    LEFT: tl.constexpr = product.LEFT_ACCESS
    RIGHT: tl.constexpr = product.RIGHT_ACCESS
    hidden = source_of(hidden, tokens, intermediate_size, strides.left, strides.left_depth, LEFT, ROWS, product)
    down_weight = source_of(
        down_weight, out_features, intermediate_size, strides.right, strides.right_depth, RIGHT, COLUMNS, product
    )
    output = target_of(output, tokens, out_features, product)
    tiles = tl.cdiv(tokens, ROWS) * tl.cdiv(out_features, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=product.FLATTEN, warp_specialize=product.WARP_SPECIALIZE
    ):
        first_row, first_column = tile_origin(tile, tokens, out_features, product)
        result, _ = tile_products(
            hidden, down_weight, None, strides, first_row, first_column, tokens, out_features, intermediate_size,
            product,
        )  # fmt: skip
        row = first_row + tl.arange(0, ROWS)
        for part in tl.static_range(product.PARTS):
            part_column = first_column + part * PART_COLUMNS
            column = part_column + tl.arange(0, PART_COLUMNS)
            valid = (row < tokens)[:, None] & (column < out_features)[None, :]
            output_part = _add_bias(column_part(result, part, product.PARTS), bias, column, out_features)
            output_part = drop(output_part, dropout, row, part_column, ROWS, PART_COLUMNS)
            if residual.pointer is not None:
                places = residual.pointer + element_offsets(row, column, residual.stride_row, residual.stride_column)
                output_part += tl.load(places, mask=valid, other=0.0).to(tl.float32)
            store_part(output, output_part, first_row, part_column, tokens, out_features, product)


@triton.jit
def _hidden_backward_kernel(
    grad_output,
    down_weight,
    strides,
    up_pointer,
    gate_pointer,
    grad_up,
    grad_gate,
    hidden,
    dropout,
    tokens,
    intermediate_size,
    out_features,
    product,
    ACTIVATION: tl.constexpr,
):
    """Compute d up, d gate and hidden again, from d hidden = d output D and the pre-activations.

    Args:
        grad_output, down_weight: d output and D^T, as `operands` returns them.
        strides: their `OperandStrides`.
        up_pointer, gate_pointer: (tokens, intermediate_size), contiguous, the pre-activations; gate_pointer may be
            None.
        grad_up, grad_gate, hidden: (tokens, intermediate_size), contiguous, written; the last two may be None.
        dropout: a `Dropout`.
        product: a `Product`.
    """
    PART_COLUMNS: tl.constexpr = product.BLOCK_COLUMNS // product.PARTS
    ROWS: tl.constexpr = product.BLOCK_ROWS
    COLUMNS: tl.constexpr = product.BLOCK_COLUMNS
    LEFT: tl.constexpr = product.LEFT_ACCESS
    RIGHT: tl.constexpr = product.RIGHT_ACCESS
    grad_output = source_of(grad_output, tokens, out_features, strides.left, strides.left_depth, LEFT, ROWS, product)
    down_weight = source_of(
        down_weight, intermediate_size, out_features, strides.right, strides.right_depth, RIGHT, COLUMNS, product
    )
    grad_up = target_of(grad_up, tokens, intermediate_size, product)
    if grad_gate is not None:
        grad_gate = target_of(grad_gate, tokens, intermediate_size, product)
    if hidden is not None:
        hidden = target_of(hidden, tokens, intermediate_size, product)
    tiles = tl.cdiv(tokens, ROWS) * tl.cdiv(intermediate_size, COLUMNS)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=product.FLATTEN, warp_specialize=product.WARP_SPECIALIZE
    ):
        first_row, first_column = tile_origin(tile, tokens, intermediate_size, product)
        result, _ = tile_products(
            grad_output, down_weight, None, strides, first_row, first_column, tokens, intermediate_size, out_features,
            product,
        )  # fmt: skip
        row = first_row + tl.arange(0, ROWS)
        for part in tl.static_range(product.PARTS):
            part_column = first_column + part * PART_COLUMNS
            column = part_column + tl.arange(0, PART_COLUMNS)
            valid = (row < tokens)[:, None] & (column < intermediate_size)[None, :]
            offsets = element_offsets(row, column, intermediate_size, 1)
            grad_part = column_part(result, part, product.PARTS)
            grad_part = drop(grad_part, dropout, row, part_column, ROWS, PART_COLUMNS)
            up = tl.load(up_pointer + offsets, mask=valid, other=0.0).to(tl.float32)
            if gate_pointer is None:
                hidden_part = hidden_of(up, None, ACTIVATION)
                grad_up_part, _ = gradients_of(grad_part, up, None, ACTIVATION)
            else:
                gate = tl.load(gate_pointer + offsets, mask=valid, other=0.0).to(tl.float32)
                hidden_part = hidden_of(up, gate, ACTIVATION)
                grad_up_part, grad_gate_part = gradients_of(grad_part, up, gate, ACTIVATION)
                store_part(grad_gate, grad_gate_part, first_row, part_column, tokens, intermediate_size, product)
            store_part(grad_up, grad_up_part, first_row, part_column, tokens, intermediate_size, product)
            if hidden is not None:
                hidden_part = drop(hidden_part, dropout, row, part_column, ROWS, PART_COLUMNS)
                store_part(hidden, hidden_part, first_row, part_column, tokens, intermediate_size, product)


# Configurations by kernel. The exact float32 product has no tensor cores: registers limit its tiles.
_FLOAT32 = {
    "forward": Configuration(64, 64, 32, 4, 3),
    "gated_forward": Configuration(64, 64, 16, 8, 3),
    "output": Configuration(64, 64, 32, 4, 3),
    "backward": Configuration(64, 64, 16, 8, 3),
    "gated_backward": Configuration(64, 64, 16, 8, 3),
}
_AMPERE = {
    "forward": Configuration(128, 128, 64, 8, 3, parts=2),
    "gated_forward": Configuration(128, 64, 64, 8, 3, parts=4),
    "output": Configuration(128, 128, 64, 8, 3, parts=2),
    "backward": Configuration(128, 128, 64, 8, 3, parts=4),
    "gated_backward": Configuration(128, 128, 64, 8, 3, parts=4),
}
# A tile's epilogue takes a share of its time that grows as the depth shrinks: in one loop, copies run meanwhile.
_HOPPER = {
    "forward": Configuration(128, 256, 64, 8, 3, descriptors=True, parts=8, flatten=True),
    "gated_forward": Configuration(128, 128, 64, 8, 3, descriptors=True, parts=4),
    "output": Configuration(128, 256, 64, 8, 3, descriptors=True, parts=4, flatten=True),
    "backward": Configuration(128, 128, 64, 8, 4, descriptors=True, parts=4, flatten=True),
    "gated_backward": Configuration(128, 128, 64, 8, 4, descriptors=True, parts=4, flatten=True),
}
# The accumulator is in tensor memory: wide tiles need few registers.
_BLACKWELL = {
    "forward": Configuration(128, 256, 64, 8, 3, descriptors=True, parts=8),
    "gated_forward": Configuration(128, 128, 64, 8, 3, descriptors=True, parts=4),
    "output": Configuration(128, 256, 64, 8, 3, descriptors=True, parts=8),
    "backward": Configuration(128, 256, 64, 8, 3, descriptors=True, parts=8),
    "gated_backward": Configuration(128, 128, 64, 8, 4, descriptors=True, parts=4),
}
_SMALL_MEMORY = {kernel: replace(choice, depth=32) for kernel, choice in _AMPERE.items()}
_CDNA = {kernel: replace(choice, stages=2) for kernel, choice in _AMPERE.items()}
# Small tiles, so that small tests have several of them.
_TINY = dict.fromkeys(_AMPERE, Configuration(32, 16, 16, 1, 1, parts=2))
_CONFIGURATIONS = {
    "sm_80": {2: _AMPERE, 4: _FLOAT32},
    "sm_86": {2: _SMALL_MEMORY, 4: _FLOAT32},
    "sm_89": {2: _SMALL_MEMORY, 4: _FLOAT32},
    "sm_90": {2: _HOPPER, 4: _FLOAT32},
    "sm_100": {2: _BLACKWELL, 4: _FLOAT32},
    "sm_120": {2: _SMALL_MEMORY, 4: _FLOAT32},
    "gfx90a": {2: _CDNA, 4: _FLOAT32},
    "gfx942": {2: _CDNA, 4: _FLOAT32},
    "gfx950": {2: _CDNA, 4: _FLOAT32},
    "interpreter": {2: _TINY, 4: _TINY},
}


def hidden_forward(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    dropout: Dropout | None,
    store_pre_activations: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The fused plan of `feed_forward.hidden_forward`, with the same arguments and results."""
    hidden = input.new_empty((input.shape[0], up_weight.shape[0]))
    up = torch.empty_like(hidden) if store_pre_activations else None
    gate = torch.empty_like(hidden) if store_pre_activations and gate_weight is not None else None
    _launch_hidden_forward(
        input,
        up_weight,
        up_bias,
        gate_weight,
        gate_bias,
        hidden,
        up,
        gate,
        *dropout_arguments(dropout),
        activation,
        input_precision(input.dtype),
    )
    return hidden, up, gate


@kept_launch
def _launch_hidden_forward(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    hidden: torch.Tensor,
    up: torch.Tensor | None,
    gate: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
    activation: str,
    precision: str,
) -> Launch:
    """Describe the launch. `up` and `gate` are the pre-activations to be written, or None."""
    tokens, in_features = input.shape
    intermediate_size = up_weight.shape[0]
    configuration = _configuration(input, "forward" if gate_weight is None else "gated_forward", in_features)
    (x,), input_access = operands(configuration.rows, (input,), configuration)
    (w, v), weight_access = operands(configuration.columns, (up_weight, gate_weight), configuration)
    written = result_access((hidden, up, gate), configuration)
    return Launch(
        _hidden_forward_kernel,
        configuration.grid(tokens, intermediate_size, input),
        {
            "input": x,
            "up_weight": w,
            "gate_weight": v,
            "strides": _strides(input, up_weight, gate_weight),
            "up_bias": _vector(up_bias),
            "gate_bias": _vector(gate_bias),
            "hidden": hidden,
            "up": up,
            "gate": gate,
            "dropout": Dropout(seed, threshold, scale),
            "tokens": tokens,
            "intermediate_size": intermediate_size,
            "in_features": in_features,
            "product": configuration.constants(in_features, precision, input_access, weight_access, written),
            "ACTIVATION": activation,
            **configuration.options,
        },
        descriptors=configuration.descriptor_stores or configuration.warp_specialize,
    )


def output_forward(
    hidden: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout: Dropout | None,
) -> torch.Tensor:
    """The fused plan of `feed_forward.output_forward`, with the same arguments and results."""
    dtype = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
    output = hidden.new_empty(hidden.shape[0], down_weight.shape[0], dtype=dtype)
    _launch_output(
        hidden, down_weight, down_bias, residual, output, *dropout_arguments(dropout), input_precision(hidden.dtype)
    )
    return output


@kept_launch
def _launch_output(
    hidden: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output: torch.Tensor,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
    precision: str,
) -> Launch:
    """Describe the launch that computes the block's output from the hidden layer."""
    tokens, intermediate_size = hidden.shape
    out_features = down_weight.shape[0]
    configuration = _configuration(hidden, "output", intermediate_size)
    (h,), input_access = operands(configuration.rows, (hidden,), configuration)
    (w,), weight_access = operands(configuration.columns, (down_weight,), configuration)
    written = result_access((output,), configuration)
    return Launch(
        _output_kernel,
        configuration.grid(tokens, out_features, hidden),
        {
            "hidden": h,
            "down_weight": w,
            "strides": _strides(hidden, down_weight),
            "bias": _vector(down_bias),
            "residual": Matrix(residual, *((0, 0) if residual is None else residual.stride())),
            "output": output,
            "dropout": Dropout(seed, threshold, scale),
            "tokens": tokens,
            "out_features": out_features,
            "intermediate_size": intermediate_size,
            "product": configuration.constants(intermediate_size, precision, input_access, weight_access, written),
            **configuration.options,
        },
        descriptors=configuration.descriptor_stores or configuration.warp_specialize,
    )


def hidden_backward(
    grad_output: torch.Tensor,
    down_weight: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    activation: str,
    dropout: Dropout | None,
    store_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The fused plan of `feed_forward.hidden_backward`, with the same arguments and results."""
    grad_up = torch.empty_like(up)
    grad_gate = None if gate is None else torch.empty_like(gate)
    hidden = torch.empty_like(up) if store_hidden else None
    _launch_hidden_backward(
        grad_output,
        down_weight.T,
        up,
        gate,
        grad_up,
        grad_gate,
        hidden,
        *dropout_arguments(dropout),
        activation,
        input_precision(up.dtype),
    )
    return grad_up, grad_gate, hidden


@kept_launch
def _launch_hidden_backward(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    grad_up: torch.Tensor,
    grad_gate: torch.Tensor | None,
    hidden: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    scale: float,
    activation: str,
    precision: str,
) -> Launch:
    """Describe the launch. `weight` is (intermediate_size, out_features)."""
    tokens, intermediate_size = up.shape
    out_features = weight.shape[1]
    configuration = _configuration(up, "backward" if gate is None else "gated_backward", out_features)
    (dy,), input_access = operands(configuration.rows, (grad_output,), configuration)
    (w,), weight_access = operands(configuration.columns, (weight,), configuration)
    written = result_access((grad_up, grad_gate, hidden), configuration)
    return Launch(
        _hidden_backward_kernel,
        configuration.grid(tokens, intermediate_size, up),
        {
            "grad_output": dy,
            "down_weight": w,
            "strides": _strides(grad_output, weight),
            "up_pointer": up,
            "gate_pointer": gate,
            "grad_up": grad_up,
            "grad_gate": grad_gate,
            "hidden": hidden,
            "dropout": Dropout(seed, threshold, scale),
            "tokens": tokens,
            "intermediate_size": intermediate_size,
            "out_features": out_features,
            "product": configuration.constants(out_features, precision, input_access, weight_access, written),
            "ACTIVATION": activation,
            **configuration.options,
        },
        descriptors=configuration.descriptor_stores or configuration.warp_specialize,
    )


def _configuration(tensor: torch.Tensor, kernel: str, depth: int) -> Configuration:
    """The configuration of `kernel`, a product over `depth`, for `tensor`'s device, dtype and rows."""
    default = _CONFIGURATIONS[architecture_of(tensor).name][tensor.dtype.itemsize][kernel]

    def shape() -> tuple[str, ...]:
        return shape_class(product_precision(tensor.dtype), tensor.shape[0], depth)

    return chosen(f"fused_{kernel}", tensor, default, shape)


def _strides(left: torch.Tensor, right: torch.Tensor, second_right: torch.Tensor | None = None) -> OperandStrides:
    return OperandStrides(*left.stride(), *right.stride(), *((0, 0) if second_right is None else second_right.stride()))


def _vector(bias: torch.Tensor | None) -> Vector:
    return Vector(bias, 0 if bias is None else bias.stride(0))
