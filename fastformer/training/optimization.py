"""What every objective optimises with: AdamW without decay on biases and norms, and a schedule with warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine"]

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def adamw(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    allow_fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW over the parameters of `module` that require gradients, fused where the device has it.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).

    Args:
        weight_decay: applied to matrices alone; vectors (biases and the weights of norms) are not decayed.
        allow_fused: False for float16 with a gradient scaler, whose unscaling a fused step does by itself, after
            the gradients have been clipped.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    fused = allow_fused and all(parameter.device.type in _FUSED_DEVICES for parameter in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps, fused=fused
    )


def warmup_and_decay(warmup_steps: int, total_steps: int, schedule: Schedule) -> Callable[[int], float]:
    """The factor on the peak learning rate at each optimizer step, counted from 0.

    It rises linearly to 1 over `warmup_steps` and falls to 0 at `total_steps`, in a line or along half a cosine.

    Raises:
        ValueError: the warm-up is as long as the run, or longer.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be at least 0 and below the run's {total_steps} steps; got {warmup_steps}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        remaining = max(0.0, (total_steps - step) / (total_steps - warmup_steps))
        return remaining if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * remaining))

    return factor
