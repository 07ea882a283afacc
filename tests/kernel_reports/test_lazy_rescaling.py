"""A warp whose maxima stay skips the multiplications of the forward's sums, and specialised warps stay."""

from __future__ import annotations

import json

import pytest
from processes import python

# Compile the forward of one call with the sums rescaled always and lazily, and print each kernel's PTX and registers.
COMPILE = """
import json, sys
from dataclasses import replace
import torch, triton
from fastformer.kernel_reports.binary import read_kernel
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in
from fastformer.ops import attention
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.configurations import forced

always = eval("AttentionConfiguration(" + sys.argv[2] + ")")
found = []
for configuration in (always, replace(always, lazy_rescale=True)):
    with stand_in(sys.argv[1]) as launched, kernels_of_meta_operators(), forced({"attention_forward": configuration}):
        attention(*(torch.empty(1, 2, 256, 128, dtype=torch.bfloat16, device="meta") for _ in range(3)))
    (kernel,) = launched
    assembly = kernel.text("ptx" if sys.argv[1].startswith("sm") else "amdgcn")
    resources, code = read_kernel(kernel)
    found.append({
        "skips": assembly.count("vote.sync.any"),
        "specialised": "ttg.warp_specialize" in kernel.text("ttgir"),
        "spills": resources.spill_bytes,
        "loop": len(code.loop),
    })
print(json.dumps(found))
"""
SPECIALIZED = "128, 128, 4, 2, descriptors=True, warp_specialize=True, one_loop=True"


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("architecture", "configuration"), [("sm_80", "128, 64, 8, 2"), ("sm_90", SPECIALIZED), ("gfx942", "128, 32, 4, 1")]
)
def test_what_a_lazy_forward_compiles_to(architecture: str, configuration: str) -> None:
    done = python("-c", COMPILE, architecture, configuration)
    assert done.returncode == 0, done.stderr
    always, lazily = json.loads(done.stdout.splitlines()[-1])
    assert always["skips"] == 0 and lazily["spills"] == 0
    assert lazily["specialised"] == always["specialised"] == ("warp_specialize" in configuration)
    if architecture == "gfx942":
        assert lazily["skips"] == 0
    else:
        # Each warp group has one skip, of the multiplications of 64 numbers a thread.
        assert lazily["skips"] > 0
        assert lazily["loop"] - 64 < always["loop"] - 40
