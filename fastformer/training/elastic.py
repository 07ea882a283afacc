"""Resuming on another number of devices, or with another strategy: what a checkpoint must say for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def convert_progress(checkpoint: dict[str, Any], data: str, world_size: int) -> None:
    """Make the progress in a checkpoint that of `world_size` devices which have trained on as many batches together.

    Lightning counts batches per device. The batches of all devices are one sequence, of which optimizer steps take
    equal shares if ``accumulate`` changes with the number of devices: the run goes on as it would have. Where the
    batches so far cannot be shared out equally, the checkpoint is left as it is; the order of the batches is the same
    then too, but a step may begin at another one.

    Args:
        checkpoint: written by a `TrainingModule`, changed in place.
        data: the name of the `ResumableDataModule`'s class, under which the checkpoint has its state.
        world_size: devices of the run that resumes.
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
    """Number the parameters in an optimizer's state in the module's order, rather than in that of its groups.

    PyTorch reads any numbers; Lightning's `ModelParallelStrategy` reads these.

    Args:
        state: the optimizer's state_dict, changed in place.
        optimizer, module: whose parameters they are.
    """
    places = {parameter: place for place, parameter in enumerate(module.parameters())}
    numbers = [places[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {numbers[number]: values for number, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [numbers[number] for number in group["params"]]
