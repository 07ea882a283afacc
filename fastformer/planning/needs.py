"""What a training run needs and takes: memory of each device, operations, time. Computed, not measured."""

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
    """How a model is trained.

    Attributes:
        gpu, devices: which, and how many.
        strategy: one of `STRATEGIES`, over the devices / tensor_parallel copies of the model.
        tensor_parallel: devices that share each block's projections and the vocabulary (Shoeybi et al. 2019).
        precision: Lightning's: 32-true, bf16-mixed, 16-mixed or bf16-true.
        length: tokens of each example; of an encoder-decoder's source. Images have their own.
        target_length: tokens of an encoder-decoder's target.
        batch_size: examples of a device at a time; None for as many as fit.
        global_tokens: of an optimiser step; None for one batch of every device.
        checkpointing: whether every block is computed again in the backward (Chen et al. 2016).
        optimizer: one of `OPTIMIZERS`.
        mfu: model FLOPs utilisation (Chowdhery et al. 2022, appendix B): the share of the GPUs' peak that goes into the
            forward and the backward, without what is computed again.
        usable: share of the GPU's memory that is the run's: the rest is the driver's, the libraries' workspaces, and
            what the allocator cannot use.
        network: bytes per second in each direction between nodes, for each GPU.
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
        """Of the model, each on its own part of a batch."""
        return self.devices // self.tensor_parallel

    @property
    def computation_bytes(self) -> int:
        """Of a number in a product."""
        return 4 if self.precision == "32-true" else 2

    @property
    def weight_bytes(self) -> int:
        """Of a parameter and of its gradient. DeepSpeed's are in the computation's precision."""
        narrow = self.precision == "bf16-true" or self.strategy.startswith("zero")
        return self.computation_bytes if narrow else 4

    @property
    def optimizer_bytes(self) -> int:
        """Of a parameter's optimiser states, with DeepSpeed's float32 copy of it."""
        if self.strategy.startswith("zero"):
            return 4 * OPTIMIZERS[self.optimizer] + (4 if self.weight_bytes == 2 else 0)
        return self.weight_bytes * OPTIMIZERS[self.optimizer]


@dataclass(frozen=True)
class Memory:
    """Bytes of each device.

    Attributes:
        weights, gradients, optimizer: a parameter's share of them, as ZeRO divides them (Rajbhandari et al. 2020,
            figure 1).
        buffers: weights in the computation's precision, DDP's and DeepSpeed's buckets, the blocks that FSDP and ZeRO-3
            have gathered.
        activations: what the batch keeps for the backward, and its largest temporaries.
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
    """What a run needs and takes.

    Attributes:
        parameters: of the model.
        memory, available: of each device, in bytes.
        batch_size, accumulation, tokens: examples of a device at a time, batches of an optimiser step, tokens of it.
        flops_per_token: forward and backward. `flops`: of an optimiser step.
        attention_share: of those, what attention's scores and values take.
        tokens_per_second, seconds: of all devices; of an optimiser step.
        communication: seconds of an optimiser step that its devices would exchange data for, were nothing overlapped.
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

    Parameters, operations and what the backward keeps are counted on the model itself, on tensors without memory; see
    `model_cost`. For a block of BERT or GPT in mixed precision the latter comes to 28 hidden_size + 4 heads + 16 bytes
    a token: 2 hidden_size each for the inputs of attention and feed-forward network, 6 for queries, keys and values, 2
    for attention's output, 8 for the pre-activations of a feed-forward network four times as wide, 4 for the sum under
    each of the two norms; 4 for each head's log-sum-exp, 16 for the norms' statistics. Korthikanti et al. (2022,
    equation 1) have 34 hidden_size + 5 heads * sequence: here there are no attention matrices and no dropout masks.
    With checkpointing, 4 hidden_size a block remain, and all of one block.

    Args:
        config: of the model.
        kind: the name of its class.
        setup: how it is trained.

    Raises:
        ValueError: the model cannot be divided so, or does not know such lengths.
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
    """Of a device that has the model of `cost`."""
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
            # Two blocks and what is outside of them are gathered; of one and of the latter the gradients are whole.
            buffers = cost.casts - cost.casts_by_blocks + width * (3 * cost.block_parameters + 2 * outside)
        elif sharded:
            buffers += 2 * width * min(cost.parameters, _DEEPSPEED_BUCKET)
        else:
            buffers += gradients
    # While a block goes backward, the gradients of what it kept come and go.
    activations = batch_size * (kept + cost.saved_by_block) + GPU_MEMORY_BUDGET
    return Memory(weights, gradients, optimizer, buffers, activations)


def _communication(
    config: FastformerConfig, cost: ModelCost, setup: Setup, batch_size: int, accumulation: int
) -> float:
    """Seconds of an optimiser step that a device's data are under way, by the volumes of ring algorithms.

    DDP and ZeRO-1 and -2 add gradients up and hand out sums or new weights; FSDP and ZeRO-3 gather weights twice and
    divide gradients. Tensor-parallel devices add up each sublayer's output, and its input's gradient.
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
    """Of a device that exchanges data with so many, bytes per second."""
    return setup.gpu.link if devices <= GPUS_PER_NODE else setup.network


def _cost(config: FastformerConfig, kind: str, setup: Setup) -> ModelCost:
    # DeepSpeed computes without autocast, on weights in the computation's precision.
    precision = "bf16-true" if setup.strategy.startswith("zero") and setup.computation_bytes == 2 else setup.precision
    return model_cost(meta_model(config, kind, precision), precision, setup.length, setup.target_length)


def _part(config: FastformerConfig, parts: int) -> FastformerConfig:
    """The configuration of what one of `parts` tensor-parallel devices holds: heads, features and words divided."""
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % parts:
            raise ValueError(f"tensor_parallel must divide {name}, {getattr(config, name)}; got {parts}")
    part = copy.deepcopy(config)
    part.head_dim = config.size_per_head
    part.num_attention_heads = config.num_attention_heads // parts
    # Fewer heads than devices are repeated.
    part.num_key_value_heads = math.gcd(max(1, config.kv_heads // parts), part.num_attention_heads)
    part.intermediate_size = config.intermediate_size // parts
    part.vocab_size = math.ceil(config.vocab_size / parts)
    part.pad_token_id = None
    return part


@dataclass(frozen=True)
class Run:
    """A whole training run.

    Attributes:
        tokens, steps: of the run.
        flops: of all steps.
        seconds, gpu_hours: at the stated utilisation.
        price: of the GPUs' hours; None if none was stated.
    """

    tokens: int
    steps: int
    flops: float
    seconds: float
    gpu_hours: float
    price: float | None


def whole_run(found: Plan, setup: Setup, tokens: int, price: float | None) -> Run:
    """The run of `tokens` tokens on `setup`; `price` is that of a GPU's hour."""
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
