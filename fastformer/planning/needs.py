"""The needs of a training run: memory of each device, operations, time. They are computed, not measured."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from fastformer.arguments import PRECISIONS
from fastformer.models import FastformerConfig
from fastformer.ops.linear_cross_entropy import GPU_MEMORY_BUDGET
from fastformer.planning.choices import OPTIMIZERS, STRATEGIES
from fastformer.planning.gpus import GPUS_PER_NODE, Gpu
from fastformer.planning.model_cost import ModelCost, forward_flops, model_cost
from fastformer.planning.model_work import meta_model

_DEEPSPEED_BUCKET = 200_000_000
"""Parameters in each of the two buckets of Lightning's DeepSpeedStrategy."""


@dataclass(frozen=True)
class Setup:
    """The settings of a training run.

    Attributes:
        gpu: the GPU of each device.
        devices: the number of devices.
        strategy: one of `STRATEGIES`, over the devices / tensor_parallel copies of the model.
        tensor_parallel: devices that share each block's projections and the vocabulary (Shoeybi et al. 2019).
        precision: Lightning's: 32-true, bf16-mixed, 16-mixed or bf16-true.
        length: tokens of each example; for an encoder-decoder, of its source. Image models ignore it.
        target_length: tokens of an encoder-decoder's target.
        batch_size: examples of a device at a time; None for as many as fit.
        global_tokens: tokens of an optimiser step; None for one batch on every device.
        checkpointing: whether every block is computed again in the backward (Chen et al. 2016).
        optimizer: one of `OPTIMIZERS`.
        mfu: model FLOPs utilisation (Chowdhery et al. 2022, appendix B): the share of the GPUs' peak that the forward
            and the backward use. Recomputation does not count.
        usable: the share of the GPU's memory that the run can use. The rest is for the driver, the libraries'
            workspaces, and memory that the allocator cannot use.
        network: bandwidth between nodes, in bytes per second and direction, for each GPU.
    """

    gpu: Gpu
    devices: int = 1
    strategy: str = "ddp"
    tensor_parallel: int = 1
    precision: str = "bf16-mixed"
    length: int = 512
    target_length: int | None = None
    batch_size: int | None = None
    global_tokens: int | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"
    mfu: float = 0.4
    usable: float = 0.92
    network: float = 50e9

    def __post_init__(self) -> None:
        for name, choices in (("strategy", STRATEGIES), ("precision", PRECISIONS), ("optimizer", tuple(OPTIMIZERS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("devices", "tensor_parallel", "length", "target_length", "batch_size", "global_tokens"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more; got {size}")
        for name in ("mfu", "usable"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be above 0 and at most 1; got {getattr(self, name)}")
        if self.devices % self.tensor_parallel:
            raise ValueError(f"tensor_parallel must divide the {self.devices} devices; got {self.tensor_parallel}")
        if self.tensor_parallel > 1 and self.strategy.startswith("zero"):
            raise ValueError(f"tensor_parallel goes with ddp and fsdp; got strategy {self.strategy!r}")

    @property
    def copies(self) -> int:
        """The number of copies of the model. Each works on its own part of a batch."""
        return self.devices // self.tensor_parallel

    @property
    def computation_bytes(self) -> int:
        """Bytes of a number in a matrix product."""
        return 4 if self.precision == "32-true" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of a parameter, and of its gradient. DeepSpeed keeps both in the computation's precision."""
        narrow = self.precision == "bf16-true" or self.strategy.startswith("zero")
        return self.computation_bytes if narrow else 4

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of a parameter's optimiser states, including DeepSpeed's float32 copy of the parameter."""
        if self.strategy.startswith("zero"):
            return 4 * OPTIMIZERS[self.optimizer] + (4 if self.weight_bytes == 2 else 0)
        return self.weight_bytes * OPTIMIZERS[self.optimizer]


@dataclass(frozen=True)
class Memory:
    """The memory of each device, in bytes.

    Attributes:
        weights, gradients, optimizer: the device's share of each, as ZeRO divides them (Rajbhandari et al. 2020,
            figure 1).
        buffers: weights in the computation's precision, the buckets of DDP and DeepSpeed, and the blocks that FSDP and
            ZeRO-3 have gathered.
        activations: tensors that the batch keeps for the backward, and its largest temporaries.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Plan:
    """The needs of a training run.

    Attributes:
        parameters: parameters of the model.
        memory: memory that each device needs.
        available: bytes of memory that each device has for the run.
        batch_size: examples of a device at a time.
        accumulation: batches of each device in an optimiser step.
        tokens: tokens of an optimiser step.
        flops_per_token: operations of a token's forward and backward.
        flops: operations of an optimiser step.
        attention_share: the share of the operations that attention's scores and values take.
        tokens_per_second: tokens per second of all devices together.
        seconds: seconds of an optimiser step.
        communication: seconds in an optimiser step that the devices exchange data, if nothing overlaps.
    """

    parameters: int
    memory: Memory
    available: float
    batch_size: int
    accumulation: int
    tokens: int
    flops_per_token: float
    flops: float
    attention_share: float
    tokens_per_second: float
    seconds: float
    communication: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available


def plan(config: FastformerConfig, kind: str, setup: Setup) -> Plan:
    """Plan the training of a model.

    Parameters, operations and the memory kept for the backward are counted on the model itself, on tensors without
    data; see `model_cost`. A block of BERT or GPT in mixed precision keeps 28 hidden_size + 4 heads + 16 bytes for each
    token. These are, in units of hidden_size: 2 each for the inputs of attention and of the feed-forward network, 6 for
    queries, keys and values, 2 for attention's output, 8 for the pre-activations of a feed-forward network four times
    as wide, and 4 for the sum that each of the two norms reads. In bytes: 4 for each head's log-sum-exp, and 16 for
    the statistics of the norms. Korthikanti et al. (2022, equation 1) have 34 hidden_size + 5 heads * sequence: here
    there are no attention matrices and no dropout masks. With checkpointing, each block keeps 4 hidden_size, and one
    block at a time keeps everything.

    Args:
        config: the model's configuration.
        kind: the name of the model's class.
        setup: the settings of the run.

    Raises:
        ValueError: the model cannot be divided among `tensor_parallel` devices, or is made for shorter sequences.
    """
    if not config.image_size and config.position_limit is not None:
        longest = max(setup.length, setup.target_length or 0)
        if longest > config.position_limit:
            raise ValueError(f"length must be at most the model's {config.position_limit} positions; got {longest}")
    whole = meta_model(config, kind, setup.precision)
    part = _cost(config if setup.tensor_parallel == 1 else _part(config, setup.tensor_parallel), kind, setup)
    flops = part.flops
    if setup.tensor_parallel > 1:
        flops = forward_flops(whole, setup.length, setup.target_length)
    fixed, growing = _memory(part, setup, 0), _memory(part, setup, 1)
    available = setup.gpu.memory * setup.usable
    batch_size = setup.batch_size
    if batch_size is None:
        batch_size = max(1, int((available - fixed.total) // (growing.total - fixed.total)))
        if setup.global_tokens is not None:
            batch_size = min(batch_size, max(1, setup.global_tokens // (flops.tokens * setup.copies)))
    batch_tokens = batch_size * flops.tokens * setup.copies
    accumulation = math.ceil((setup.global_tokens or batch_tokens) / batch_tokens)
    tokens = batch_tokens * accumulation
    flops_per_token = 3 * flops.per_token
    peak = setup.gpu.flops[8 * setup.computation_bytes] * setup.devices
    tokens_per_second = setup.mfu * peak / flops_per_token
    return Plan(
        parameters=whole.num_parameters(),
        memory=_memory(part, setup, batch_size),
        available=available,
        batch_size=batch_size,
        accumulation=accumulation,
        tokens=tokens,
        flops_per_token=flops_per_token,
        flops=flops_per_token * tokens,
        attention_share=flops.attention / flops.total,
        tokens_per_second=tokens_per_second,
        seconds=tokens / tokens_per_second,
        communication=_communication(config, part, setup, batch_size, accumulation),
    )


def _memory(cost: ModelCost, setup: Setup, batch_size: int) -> Memory:
    """The memory of a device that holds the model of `cost`."""
    copies, width = setup.copies, setup.computation_bytes
    sharded = {"ddp": 0, "zero-1": 1, "zero-2": 2, "zero-3": 3, "fsdp": 3}[setup.strategy]
    weights = cost.parameters * setup.weight_bytes / (copies if sharded >= 3 else 1)
    gradients = cost.parameters * setup.weight_bytes / (copies if sharded >= 2 else 1)
    optimizer = cost.parameters * setup.optimizer_bytes / (copies if sharded >= 1 else 1)
    kept, casts = cost.saved, cost.casts
    if setup.checkpointing:
        kept += cost.block_inputs - cost.saved_by_blocks + cost.saved_by_block
        casts += cost.casts_by_block - cost.casts_by_blocks
    buffers: float = casts
    if copies > 1:
        outside = cost.parameters - cost.blocks_parameters
        if sharded >= 3:
            # Gathered are two blocks and everything outside the blocks. Gradients are whole for one block and for
            # everything outside the blocks.
            buffers = cost.casts - cost.casts_by_blocks + width * (3 * cost.block_parameters + 2 * outside)
        elif sharded:
            buffers += 2 * width * min(cost.parameters, _DEEPSPEED_BUCKET)
        else:
            buffers += gradients
    # During a block's backward, the gradients of the tensors it kept exist for a while.
    activations = batch_size * (kept + cost.saved_by_block) + GPU_MEMORY_BUDGET
    return Memory(weights, gradients, optimizer, buffers, activations)


def _communication(
    config: FastformerConfig, cost: ModelCost, setup: Setup, batch_size: int, accumulation: int
) -> float:
    """Seconds in an optimiser step that a device exchanges data, by the volumes of ring algorithms.

    DDP and ZeRO-1 and -2 add up gradients, and distribute the sums or the new weights. FSDP and ZeRO-3 gather weights
    twice and scatter gradients. Tensor-parallel devices add up each sublayer's output and its input's gradient.
    """
    copies, parts, width = setup.copies, setup.tensor_parallel, setup.computation_bytes
    gathers = setup.strategy in ("fsdp", "zero-3")
    each = 3 * width if gathers else 2 * setup.weight_bytes
    times = accumulation if gathers or setup.strategy == "zero-2" else 1
    of_copies = times * each * cost.parameters * (copies - 1) / copies
    sums = accumulation * batch_size * cost.sublayer_tokens * (3 if setup.checkpointing else 2)
    of_parts = sums * config.hidden_size * width * 2 * (parts - 1) / parts
    return of_copies / _bandwidth(setup, setup.devices) + of_parts / _bandwidth(setup, parts)


def _bandwidth(setup: Setup, devices: int) -> float:
    """Bytes per second that each of `devices` devices can exchange with the others."""
    return setup.gpu.link if devices <= GPUS_PER_NODE else setup.network


def _cost(config: FastformerConfig, kind: str, setup: Setup) -> ModelCost:
    # DeepSpeed computes without autocast, on weights in the computation's precision.
    precision = "bf16-true" if setup.strategy.startswith("zero") and setup.computation_bytes == 2 else setup.precision
    return model_cost(meta_model(config, kind, precision), precision, setup.length, setup.target_length)


def _part(config: FastformerConfig, parts: int) -> FastformerConfig:
    """The configuration of the part of a model on one of `parts` tensor-parallel devices.

    Heads, features and words are divided among the devices.
    """
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % parts:
            raise ValueError(f"tensor_parallel must divide {name}, {getattr(config, name)}; got {parts}")
    part = copy.deepcopy(config)
    part.head_dim = config.size_per_head
    part.num_attention_heads = config.num_attention_heads // parts
    # If there are fewer key/value heads than devices, they are repeated.
    part.num_key_value_heads = math.gcd(max(1, config.kv_heads // parts), part.num_attention_heads)
    part.intermediate_size = config.intermediate_size // parts
    part.vocab_size = math.ceil(config.vocab_size / parts)
    part.pad_token_id = None
    return part


@dataclass(frozen=True)
class Run:
    """A whole training run.

    Attributes:
        tokens, steps: the tokens and optimiser steps of the run.
        flops: the operations of all steps.
        seconds, gpu_hours: the time at the given utilisation.
        price: the price of all GPU hours; None if no price was given.
    """

    tokens: int
    steps: int
    flops: float
    seconds: float
    gpu_hours: float
    price: float | None


def whole_run(found: Plan, setup: Setup, tokens: int, price: float | None) -> Run:
    """Compute a run of `tokens` tokens with `setup`. `price` is the price of one GPU for an hour."""
    seconds = tokens / found.tokens_per_second
    gpu_hours = seconds * setup.devices / 3600
    return Run(
        tokens=tokens,
        steps=-(-tokens // found.tokens),
        flops=found.flops_per_token * tokens,
        seconds=seconds,
        gpu_hours=gpu_hours,
        price=None if price is None else price * gpu_hours,
    )
