"""Every launch configuration of attention compiles, and fits into the shared memory of its architecture."""

from __future__ import annotations

import pytest
from fastformer_kernels.launch import ARCHITECTURES
from inspection.processes import python

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_fits(architecture: str) -> None:
    done = python("-m", "inspection.every_configuration", architecture)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.endswith(" fits")] == []
    # Forward, and of the backward two kernels or more, for three head_dims in two sizes of elements.
    assert len(lines) >= 3 * 3 * 2
