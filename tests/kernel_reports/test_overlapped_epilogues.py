"""On sm_90 the compiler overlaps the epilogue of a product with copies of the next tile, as it was asked."""

from __future__ import annotations

import json

import pytest
from fastformer_kernels.launch import for_triton
from processes import python

# Compile a hidden layer, shipped and with separate warps, and print what the compiler made of it.
COMPILE = """
import json
import torch
from fastformer.kernel_reports.binary import read_kernel
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in
from fastformer_kernels.configurations import forced
from fastformer_kernels.feed_forward.fused import hidden_forward
from fastformer_kernels.matmul import Configuration

apart = Configuration(128, 128, 64, 4, 3, descriptors=True, parts=4, descriptor_stores=True, warp_specialize=True)
with stand_in("sm_90") as launched, kernels_of_meta_operators():
    for configurations in ({}, {"fused_forward": apart}):
        tensors = [torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta") for _ in range(2)]
        try:
            with forced(configurations):
                hidden_forward(*tensors, None, None, None, "relu", None, False)
        except RuntimeError:
            if not configurations:
                raise
            break
        kernel = launched[-1]
        resources, code = read_kernel(kernel)
        found = {
            "specialises warps": "ttg.warp_specialize" in kernel.text("ttgir"),
            "bytes spilled": resources.spill_bytes,
            "loop": [instruction.name for instruction in code.loop],
            "kernel": [instruction.name for instruction in code.instructions],
        }
        print(json.dumps(found))
"""


@pytest.mark.cpu
def test_epilogues_are_overlapped() -> None:
    done = python("-c", COMPILE)
    assert done.returncode == 0, done.stderr
    shipped, *apart = map(json.loads, done.stdout.splitlines())
    # One loop: products, the copies of the next operands, and no wait between the products of one step.
    assert any(name.startswith("UTMALDG") for name in shipped["loop"])
    products = [name for name in shipped["loop"] if name.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
    assert [name.split(".")[0] for name in products] == ["HGMMA"] * 4 + ["WARPGROUP"]
    assert shipped["bytes spilled"] == 0
    if for_triton({(3, 6): False, (3, 9): True}):
        (apart,) = apart
        assert apart["specialises warps"] and apart["bytes spilled"] == 0
        assert any(name.startswith("UTMASTG") for name in apart["kernel"])
