"""Where dQ has its own kernel, that kernel computes delta of its rows: no launch reads output and gradient for it."""

from __future__ import annotations

import json

import pytest
from processes import python

# Print the kernels of a backward, none of which is compiled.
LAUNCH = """
import json, sys
import torch, triton
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in
from fastformer.ops import attention

torch.use_deterministic_algorithms(sys.argv[2] == "deterministic")
with stand_in("sm_90"), kernels_of_meta_operators():
    head_dim = int(sys.argv[1])
    # Tensors that no descriptor describes: the compiler specialises no warps.
    tensors = [torch.empty(1, 2, 64, head_dim + 1, dtype=torch.bfloat16, device="meta")[..., 1:] for _ in range(3)]
    names = []
    triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: names.append(fn.name) or True  # true stops a launch
    output = attention(*(tensor.requires_grad_() for tensor in tensors))
    output.backward(torch.empty_like(output))
print(json.dumps(names))
"""
FORWARD, KEYS = "_attention_forward_kernel", "_key_value_gradient_kernel"
ALONE = [FORWARD, "_query_gradient_kernel", KEYS]
ADDED_UP = [FORWARD, "_row_statistics_kernel", KEYS, "_scale_and_round_kernel"]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("head_dim", "mode", "kernels"), [(64, "deterministic", ALONE), (512, "fast", ALONE), (64, "fast", ADDED_UP)]
)
def test_kernels_of_a_backward(head_dim: int, mode: str, kernels: list[str]) -> None:
    done = python("-c", LAUNCH, str(head_dim), mode)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == kernels
