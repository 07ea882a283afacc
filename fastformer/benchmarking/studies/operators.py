"""Every operator except attention, with its backward, compared with PyTorch, torch.compile and Liger-Kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastformer.benchmarking.calls import same
from fastformer.benchmarking.operations import Sizes, operations
from fastformer.benchmarking.study import Case, Setting, TimedStudy

# On a CPU, where compiling takes seconds, only the operators that torch.compile fuses best are compiled.
_COMPILED = ("softmax, scaled", "layer_norm, dropout", "rms_norm, residual", "rotary, ", "cross_entropy, label")


def sizes(setting: Setting) -> Sizes:
    """The sizes of a training step: of a small model on a CPU, of a layer of a 7B model on a GPU."""
    if setting.device.type == "cuda" and not setting.quick:
        return Sizes(8, 2048, 4096, 32, 11008, 32000, 8192, torch.bfloat16)
    if setting.quick:
        return Sizes(2, 32, 64, 2, 128, 96, 64, torch.float32)
    return Sizes(2, 512, 768, 12, 3072, 8192, 2048, torch.float32)


def cases(setting: Setting) -> Iterator[Case]:
    size, gpu = sizes(setting), setting.device.type == "cuda"
    for operation in operations(size):
        work = operation.least(size)
        compile_eager = gpu or (not setting.quick and operation.name.startswith(_COMPILED))
        yield Case(
            operation.name,
            operation.peers(size, setting.device, compile_eager),
            {work.unit: work.total if operation.backward else work.forward},
            None if operation.random else same(size.dtype),
            memory=gpu,
        )


STUDY = TimedStudy(
    name="operators",
    title="operators, with their backward if they have one",
    cases=cases,
    memory="run",
    note=(
        "Bytes are the least that must be moved: inputs are read and results are written once, in the forward and in "
        "the backward."
    ),
)
