"""The compiler gives copies and products separate warps where a launch configuration asks for it."""

from __future__ import annotations

import json

import pytest
from processes import python

# Compile the kernels with a matrix product of one call, forward and backward, and print which specialise warps.
COMPILE = """
import json, sys
import torch, triton
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in
from fastformer.ops import attention
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.configurations import forced

wanted = ("_attention_forward_kernel", "_key_value_gradient_kernel")
triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: fn.name not in wanted  # true stops a launch
specialized = dict(descriptors=True, warp_specialize=True, one_loop=True)
configurations = {
    "attention_forward": AttentionConfiguration(128, 128, 4, 2, **specialized),
    "attention_backward": AttentionConfiguration(64, 128, 4, 2, two_kernels=True, **specialized),
}
with stand_in("sm_90") as launched, kernels_of_meta_operators(), forced(configurations):
    tensors = [torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)]
    output = attention(*tensors, causal=sys.argv[1] == "causal")
    output.backward(torch.empty_like(output))
print(json.dumps({kernel.name: "ttg.warp_specialize" in kernel.text("ttgir") for kernel in launched}))
"""


@pytest.mark.cpu
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_attention_with_specialised_warps(mask: str) -> None:
    done = python("-c", COMPILE, mask)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"_attention_forward_kernel": True, "_key_value_gradient_kernel": True}
