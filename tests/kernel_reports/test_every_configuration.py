"""Every launch configuration compiles, and fits in the memory and threads of a block of its architecture."""

from __future__ import annotations

import re

import pytest
from fastformer_kernels.launch import ARCHITECTURES
from processes import python

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


# The time limit; an idle machine needs a minute and a half.
SECONDS = 1800


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_fits(architecture: str) -> None:
    done = python("-m", "kernel_reports.every_configuration", architecture, seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.endswith(" fits")] == []
    # At least the kernels of attention, decoding and feed-forward, for two sizes of elements.
    assert len(lines) >= 70


# Plant an entry that needs too much memory, and one that no call chooses.
PLANTED = """
from dataclasses import replace
from functools import partial
import torch
from fastformer_kernels.attention import decode
from kernel_reports import every_configuration

table = decode._BY_ARCHITECTURE["sm_86"][2]
table[64], table[512] = replace(table[64], num_stages=12), table[64]
every_configuration.calls_of_products = lambda: [partial(every_configuration.decode, 64, torch.bfloat16)]
every_configuration.calls_of_rows = lambda: []
every_configuration.main("sm_86")
"""


def test_what_does_not_fit_and_what_no_call_chooses_are_found() -> None:
    done = python("-c", PLANTED)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "fastformer_kernels.attention.decode _BY_ARCHITECTURE sm_86 2 512 is chosen by no call" in lines
    assert "fastformer_kernels.attention.decode _BY_ARCHITECTURE sm_86 2 64 is chosen by no call" not in lines
    assert "fastformer_kernels.rotary _rotary_kernel is launched by no call" in lines
    failed = [line for line in lines if "does not fit" in line]
    # One for the contiguous cache and one for the paged cache.
    assert len(failed) == 2
    assert all(re.fullmatch(r"_decode_kernel .* needs \d+ bytes of shared memory, sm_86 has 101376", e) for e in failed)
