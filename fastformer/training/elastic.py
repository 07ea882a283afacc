"""Adapt checkpoints so that a run can resume on another number of devices, or with another strategy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def convert_progress(checkpoint: dict[str, Any], data: str, world_size: int) -> None:
    """Convert the progress in a checkpoint to `world_size` devices that have trained on equally many batches together.

    Lightning counts batches per device, but the batches of all devices form one sequence. If ``accumulate`` changes
    inversely with the number of devices, optimizer steps take the same parts of that sequence, and the run continues as
    without a change. If the batches so far cannot be divided equally among the devices, the checkpoint is not changed.
    The order of the batches is still the same then, but a step may begin at another batch.

    Args:
        checkpoint: written by a `TrainingModule`, changed in place.
        data: the class name of the `ResumableDataModule`, the key of its state in the checkpoint.
        world_size: number of devices of the resumed run.
    """
    before = checkpoint["world_size"]
    state = checkpoint.get(data)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    counts = [progress[period] for period in ("total", "current")]
    shareable = all(count["ready"] * before % world_size == 0 for count in counts)
    if before == world_size or not shareable or not state or state["ranks"] != [[0, before]]:
        return
    for count in counts:
        too_many = count["ready"] - count["ready"] * before // world_size
        for name in count:
            count[name] -= too_many
    state["ranks"] = [[0, world_size]]


def number_by_module(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Number the parameters in an optimizer's state in the module's order instead of the order of its groups.

    PyTorch accepts any numbering; Lightning's `ModelParallelStrategy` needs this one.

    Args:
        state: the optimizer's state_dict, changed in place.
        optimizer: the optimizer of the parameters.
        module: the module that has the parameters.
    """
    places = {parameter: place for place, parameter in enumerate(module.parameters())}
    numbers = [places[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {numbers[number]: values for number, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [numbers[number] for number in group["params"]]
