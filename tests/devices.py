"""Helpers for the device that the tests run on."""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch
from torch.utils._pytree import tree_map_only

Value = TypeVar("Value")


def here(value: Value) -> Value:
    """Return `value`, made while tests were collected, with its tensors moved to the running test's device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(torch.get_default_device()), value)


def need_kernels() -> None:
    """Skip the running test if it is on a CPU without the interpreter, as on a machine with a GPU."""
    if torch.get_default_device().type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a GPU there is no interpreter to run kernels on the CPU")


def end_without_a_gpu() -> None:
    """End this process if it can no longer use the GPU, for example after an illegal access: later tests would fail.

    pytest-xdist starts another process for the remaining tests.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU cannot be used any more by this process: {error}", returncode=1)
