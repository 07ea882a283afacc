"""A kept launch is not used again after a switch of PyTorch's that chooses another kernel."""

from __future__ import annotations

import json

import pytest
from processes import python

pytestmark = pytest.mark.cpu

# Print the precision of the products of two calls with the switch off, then of two with it on.
SCRIPT = """
import json
import fastformer
import torch
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in

def decode(x):
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    with torch.no_grad():
        fastformer.decode_attention(x[:, :, :1], x, x, lengths=lengths)

def attention(x):
    fastformer.attention(x, x, x).backward(torch.empty_like(x))

found = {}
with stand_in("sm_90") as kernels, kernels_of_meta_operators():
    for function in (attention, decode):
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            kernels.clear()
            for _ in range(2):
                function(torch.empty(1, 1, 64, 64, device="meta", requires_grad=True))
            constants = [constant for kernel in kernels for constant in kernel.constants.items()]
            precisions = [value for name, value in constants if name.split(".")[-1] == "INPUT_PRECISION"]
            found.setdefault(function.__name__, []).append(precisions)
print(json.dumps(found))
"""


def test_tf32_is_switched_between_calls() -> None:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "attention": [[precision] * 4 for precision in ("ieee", "tf32", "ieee")],
        "decode": [[precision] * 2 for precision in ("ieee", "tf32", "ieee")],
    }
