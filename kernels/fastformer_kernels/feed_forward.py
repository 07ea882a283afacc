"""The hidden layer of a feed-forward block, h = act(x U^T + b), or act(x G^T + c) * (x U^T + b) when gated,
and its gradient.

Gated forms: Shazeer 2020, https://arxiv.org/abs/2002.05202. Forward: one matrix product (two that share the tile of
x, when gated) with the biases and the activation in its epilogue; the pre-activations are stored only when a backward
will need them. Backward: dh = dy D with D the down projection's weight, and in its epilogue, from the stored pre-
activations, their gradients and h again, which the down projection's weight gradient needs and which is therefore
never saved. The products left over (the down projection, the weight and input gradients) have nothing to fuse and
belong to the GPU's library. Tiles are visited in groups of rows, so that both operands' tiles are reread from the L2
cache. Everything is accumulated in float32 in a fixed order: the result is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from fastformer_kernels.launch import Architecture, architecture_of, device_guard
from fastformer_kernels.precision import dot, input_precision, round_to

LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
GELU_CUBIC = tl.constexpr(0.044715)
GELU_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _gelu_tanh_gate(x):
    """(1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): one exponential, no NaN."""
    return _sigmoid(x * (1.0 + x * x * GELU_CUBIC) * TWO_SQRT_2_OVER_PI)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 `x`. NaN gives NaN (the comparisons of ReLU are written for that)."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.math.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return x * _gelu_tanh_gate(x)
    elif ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "squared_relu":
        positive = tl.where(x <= 0.0, 0.0, x)
        return positive * positive
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at float32 `x`; PyTorch's choice, 0, at the kink of ReLU."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = tl.exp2(x * x * -HALF_LOG2_E) * INVERSE_SQRT_2_PI
        return 0.5 + 0.5 * tl.math.erf(x * SQRT_HALF) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = _gelu_tanh_gate(x)
        return s + x * s * (1.0 - s) * TWO_SQRT_2_OVER_PI * (1.0 + x * x * GELU_CUBIC_SLOPE)
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "squared_relu":
        return 2.0 * tl.where(x <= 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """Rows and columns of this program's tile: GROUP_ROWS rows of tiles are walked column by column."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    group_tiles = GROUP_ROWS * tl.cdiv(columns, BLOCK_COLUMNS)
    first_row_tile = program // group_tiles * GROUP_ROWS
    group_rows = tl.minimum(row_tiles - first_row_tile, GROUP_ROWS)
    row_tile = first_row_tile + program % group_tiles % group_rows
    column_tile = program % group_tiles // group_rows
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row, column


@triton.jit
def _tile_pointers(pointer, first, second, stride_first, stride_second):
    """Pointers to the elements [first, second] of a matrix, with 64-bit offsets."""
    return pointer + first.to(tl.int64)[:, None] * stride_first + second.to(tl.int64)[None, :] * stride_second


@triton.jit
def _load_tile(pointers, valid, valid_depth, EVEN_DEPTH: tl.constexpr):
    """A tile of an operand, zero outside the matrix; `valid_depth` matters only in an uneven matrix."""
    if EVEN_DEPTH:
        return tl.load(pointers, mask=valid, other=0.0)
    else:
        return tl.load(pointers, mask=valid & valid_depth, other=0.0)


@triton.jit
def _add_bias(accumulator, bias_pointer, bias_stride, column, columns):
    if bias_pointer is not None:
        bias = tl.load(bias_pointer + column.to(tl.int64) * bias_stride, mask=column < columns, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    return accumulator


@triton.jit
def _hidden_forward_kernel(
    input_pointer,
    up_weight_pointer,
    up_bias_pointer,
    gate_weight_pointer,
    gate_bias_pointer,
    hidden_pointer,
    up_pointer,
    gate_pointer,
    tokens,
    intermediate_size,
    in_features,
    input_stride_token,
    input_stride_feature,
    up_weight_stride_row,
    up_weight_stride_feature,
    up_bias_stride,
    gate_weight_stride_row,
    gate_weight_stride_feature,
    gate_bias_stride,
    ACTIVATION: tl.constexpr,
    STORE_PRE_ACTIVATIONS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    GATED: tl.constexpr = gate_weight_pointer is not None
    row, column = _tile_of_program(tokens, intermediate_size, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS)
    row_valid = (row < tokens)[:, None]
    column_valid = (column < intermediate_size)[None, :]
    depth = tl.arange(0, BLOCK_DEPTH)
    block_depth = tl.full((), BLOCK_DEPTH, tl.int64)
    x_tile = _tile_pointers(input_pointer, row, depth, input_stride_token, input_stride_feature)
    up_tile = _tile_pointers(up_weight_pointer, depth, column, up_weight_stride_feature, up_weight_stride_row)
    up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if GATED:
        gate_tile = _tile_pointers(
            gate_weight_pointer, depth, column, gate_weight_stride_feature, gate_weight_stride_row
        )
        gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, in_features, BLOCK_DEPTH):
        depth_valid = depth < in_features - start
        x = _load_tile(x_tile, row_valid, depth_valid[None, :], EVEN_DEPTH)
        up_weight = _load_tile(up_tile, column_valid, depth_valid[:, None], EVEN_DEPTH)
        up = dot(x, up_weight, up, INPUT_PRECISION)
        if GATED:
            gate_weight = _load_tile(gate_tile, column_valid, depth_valid[:, None], EVEN_DEPTH)
            gate = dot(x, gate_weight, gate, INPUT_PRECISION)
            gate_tile += block_depth * gate_weight_stride_feature
        x_tile += block_depth * input_stride_feature
        up_tile += block_depth * up_weight_stride_feature

    dtype: tl.constexpr = hidden_pointer.dtype.element_ty
    valid = row_valid & column_valid
    up = _add_bias(up, up_bias_pointer, up_bias_stride, column, intermediate_size)
    if STORE_PRE_ACTIVATIONS:
        tl.store(_tile_pointers(up_pointer, row, column, intermediate_size, 1), round_to(up, dtype), mask=valid)
    if GATED:
        gate = _add_bias(gate, gate_bias_pointer, gate_bias_stride, column, intermediate_size)
        if STORE_PRE_ACTIVATIONS:
            tl.store(_tile_pointers(gate_pointer, row, column, intermediate_size, 1), round_to(gate, dtype), mask=valid)
        hidden = activate(gate, ACTIVATION) * up
    else:
        hidden = activate(up, ACTIVATION)
    tl.store(_tile_pointers(hidden_pointer, row, column, intermediate_size, 1), round_to(hidden, dtype), mask=valid)


@triton.jit
def _hidden_backward_kernel(
    grad_output_pointer,
    down_weight_pointer,
    up_pointer,
    gate_pointer,
    grad_up_pointer,
    grad_gate_pointer,
    hidden_pointer,
    tokens,
    intermediate_size,
    out_features,
    grad_output_stride_token,
    grad_output_stride_feature,
    down_weight_stride_row,
    down_weight_stride_feature,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    row, column = _tile_of_program(tokens, intermediate_size, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS)
    row_valid = (row < tokens)[:, None]
    column_valid = (column < intermediate_size)[None, :]
    depth = tl.arange(0, BLOCK_DEPTH)
    block_depth = tl.full((), BLOCK_DEPTH, tl.int64)
    dy_tile = _tile_pointers(grad_output_pointer, row, depth, grad_output_stride_token, grad_output_stride_feature)
    weight_tile = _tile_pointers(down_weight_pointer, depth, column, down_weight_stride_row, down_weight_stride_feature)
    grad_hidden = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, out_features, BLOCK_DEPTH):
        depth_valid = depth < out_features - start
        dy = _load_tile(dy_tile, row_valid, depth_valid[None, :], EVEN_DEPTH)
        weight = _load_tile(weight_tile, column_valid, depth_valid[:, None], EVEN_DEPTH)
        grad_hidden = dot(dy, weight, grad_hidden, INPUT_PRECISION)
        dy_tile += block_depth * grad_output_stride_feature
        weight_tile += block_depth * down_weight_stride_row

    dtype: tl.constexpr = grad_up_pointer.dtype.element_ty
    valid = row_valid & column_valid
    up = tl.load(_tile_pointers(up_pointer, row, column, intermediate_size, 1), mask=valid, other=0.0).to(tl.float32)
    if gate_pointer is not None:
        gate_tile = _tile_pointers(gate_pointer, row, column, intermediate_size, 1)
        gate = tl.load(gate_tile, mask=valid, other=0.0).to(tl.float32)
        activation = activate(gate, ACTIVATION)
        hidden = activation * up
        grad_up = grad_hidden * activation
        grad_gate = grad_hidden * up * activation_derivative(gate, ACTIVATION)
        grad_gate_tile = _tile_pointers(grad_gate_pointer, row, column, intermediate_size, 1)
        tl.store(grad_gate_tile, round_to(grad_gate, dtype), mask=valid)
    else:
        hidden = activate(up, ACTIVATION)
        grad_up = grad_hidden * activation_derivative(up, ACTIVATION)
    tl.store(_tile_pointers(grad_up_pointer, row, column, intermediate_size, 1), round_to(grad_up, dtype), mask=valid)
    if hidden_pointer is not None:
        tl.store(_tile_pointers(hidden_pointer, row, column, intermediate_size, 1), round_to(hidden, dtype), mask=valid)


@dataclass(frozen=True)
class Configuration:
    """How a product is tiled and launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_DEPTH": self.depth,
            "GROUP_ROWS": 8,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# By element size and kernel. The exact float32 product has no tensor cores: its tiles are bounded by registers.
_FLOAT32 = {
    "forward": Configuration(64, 64, 32, 4, 3),
    "gated_forward": Configuration(64, 64, 16, 8, 3),
    "backward": Configuration(64, 64, 16, 8, 3),
}
_LARGE = {
    2: {
        "forward": Configuration(128, 128, 64, 8, 3),
        "gated_forward": Configuration(128, 64, 64, 8, 3),
        "backward": Configuration(128, 64, 64, 8, 3),
    },
    4: _FLOAT32,
}
_SMALL = {
    2: {
        "forward": Configuration(128, 128, 32, 8, 3),
        "gated_forward": Configuration(128, 64, 32, 8, 3),
        "backward": Configuration(128, 64, 32, 8, 3),
    },
    4: _FLOAT32,
}
_HOPPER = {2: {**_LARGE[2], "gated_forward": Configuration(128, 128, 64, 8, 3)}, 4: _FLOAT32}
_CDNA = {
    size: {kernel: replace(choice, stages=2) for kernel, choice in kernels.items()} for size, kernels in _SMALL.items()
}
# Small tiles, so that small tests cross their borders.
_TINY = dict.fromkeys(("forward", "gated_forward", "backward"), Configuration(32, 16, 16, 1, 1))
_CONFIGURATIONS = {
    "sm_80": _LARGE,
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90": _HOPPER,
    "sm_100": _LARGE,
    "sm_120": _SMALL,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "interpreter": {2: _TINY, 4: _TINY},
}


def hidden_forward(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    store_pre_activations: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The hidden layer of `input` (tokens, in_features) and weights (intermediate_size, in_features), any strides.

    Returns:
        The hidden layer (tokens, intermediate_size) and the pre-activations of up and gate, each None unless it exists
        and `store_pre_activations` is set; all contiguous, of `input`'s dtype.
    """
    tokens, in_features = input.shape
    intermediate_size = up_weight.shape[0]
    hidden = input.new_empty(tokens, intermediate_size)
    up = torch.empty_like(hidden) if store_pre_activations else None
    gate = torch.empty_like(hidden) if store_pre_activations and gate_weight is not None else None
    kernel = "forward" if gate_weight is None else "gated_forward"
    configuration = _configuration(architecture_of(input), input.dtype, kernel)
    with device_guard(input):
        _hidden_forward_kernel[_grid(tokens, intermediate_size, configuration)](
            input,
            up_weight,
            up_bias,
            gate_weight,
            gate_bias,
            hidden,
            up,
            gate,
            tokens,
            intermediate_size,
            in_features,
            *input.stride(),
            *up_weight.stride(),
            _stride(up_bias),
            *((0, 0) if gate_weight is None else gate_weight.stride()),
            _stride(gate_bias),
            ACTIVATION=activation,
            STORE_PRE_ACTIVATIONS=store_pre_activations,
            INPUT_PRECISION=input_precision(input.dtype),
            EVEN_DEPTH=in_features % configuration.depth == 0,
            **configuration.options,
        )
    return hidden, up, gate


def hidden_backward(
    grad_output: torch.Tensor,
    down_weight: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    activation: str,
    store_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the pre-activations `up` and `gate` (tokens, intermediate_size; contiguous), and the hidden layer.

    Args:
        grad_output: (tokens, out_features), any strides.
        down_weight: (out_features, intermediate_size), any strides.

    Returns:
        The gradient of `up`, that of `gate` (None without it) and the recomputed hidden layer (None unless
        `store_hidden` is set), all shaped like `up`.
    """
    tokens, intermediate_size = up.shape
    out_features = down_weight.shape[0]
    grad_up = torch.empty_like(up)
    grad_gate = None if gate is None else torch.empty_like(gate)
    hidden = torch.empty_like(up) if store_hidden else None
    configuration = _configuration(architecture_of(up), up.dtype, "backward")
    with device_guard(up):
        _hidden_backward_kernel[_grid(tokens, intermediate_size, configuration)](
            grad_output,
            down_weight,
            up,
            gate,
            grad_up,
            grad_gate,
            hidden,
            tokens,
            intermediate_size,
            out_features,
            *grad_output.stride(),
            *down_weight.stride(),
            ACTIVATION=activation,
            INPUT_PRECISION=input_precision(up.dtype),
            EVEN_DEPTH=out_features % configuration.depth == 0,
            **configuration.options,
        )
    return grad_up, grad_gate, hidden


def _configuration(architecture: Architecture, dtype: torch.dtype, kernel: str) -> Configuration:
    """The configuration of `kernel`: forward, gated_forward or backward."""
    return _CONFIGURATIONS[architecture.name][dtype.itemsize][kernel]


def _grid(rows: int, columns: int, configuration: Configuration) -> tuple[int]:
    return (triton.cdiv(rows, configuration.rows) * triton.cdiv(columns, configuration.columns),)


def _stride(bias: torch.Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)
