"""A program, run without the interpreter, that counts attention kernels' tests, loads and stores.

Triton compiles an argument that is 1 as a constant. The program prints the counts with arguments that are 1 and with
others: they must be the same.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from kernel_reports.offsets import intermediate_representations
from torch import Tensor

from fastformer.ops.attention.attention import attention

SEQUENCE = 67
OPERATIONS = r"\b(arith\.cmp[if]|tt\.load|tt\.store|tt\.atomic_rmw|tt\.dot)\b"


def call(heads: int = 2, deterministic: bool = False, **options: object) -> None:
    """Run attention, forward and backward, on meta tensors."""
    query, key, value = (torch.empty(2, heads, SEQUENCE, 32, device="meta", requires_grad=True) for _ in range(3))
    torch.use_deterministic_algorithms(deterministic)
    output = attention(query, key, value, **options)
    output.backward(torch.empty_like(output))
    torch.use_deterministic_algorithms(False)


def strided(*strides: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a bias or mask for a batch of two with two heads, with these strides."""
    return torch.empty_strided((2, 2, SEQUENCE, SEQUENCE), strides, dtype=dtype, device="meta")


def learned(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


BIAS = {"bias": strided(7, 7, 7, 7).requires_grad_()}
PAIRS: dict[str, tuple[dict, dict]] = {
    "window (1, 5)": ({"window": (1, 5)}, {"window": (2, 5)}),
    "window (5, 1), deterministic": (
        {"window": (5, 1), "deterministic": True},
        {"window": (5, 2), "deterministic": True},
    ),
    "window (1, 0) and dropout": ({"window": (1, 0), "dropout_p": 0.1}, {"window": (2, 0), "dropout_p": 0.1}),
    "relative_bias of three": ({"relative_bias": learned(2, 3)}, {"relative_bias": learned(2, 5)}),
    "contiguous bias": ({"bias": strided(7, 7, 7, 1).requires_grad_()}, BIAS),
    "transposed mask and window (1, 1)": (
        {"mask": strided(7, 7, 1, 7, dtype=torch.bool), "window": (1, 1)},
        {"mask": strided(7, 7, 7, 7, dtype=torch.bool), "window": (2, 2)},
    ),
    "bias, alibi_slopes and window (1, 1)": (
        {**BIAS, "alibi_slopes": learned(2), "window": (1, 1)},
        {**BIAS, "alibi_slopes": learned(2), "window": (2, 2)},
    ),
    "alibi_slopes of one head": (
        {"heads": 1, "alibi_slopes": learned(2, 1)},
        {"heads": 3, "alibi_slopes": learned(2, 3)},
    ),
    "scale for each head, softcap and window (1, None)": (
        {"scale": learned(2), "softcap": 5.0, "window": (1, None)},
        {"scale": learned(2), "softcap": 5.0, "window": (2, None)},
    ),
}


def counts(work: Callable[[], None]) -> dict[str, Counter[str]]:
    """Count, for each kernel, the occurrences of each of `OPERATIONS` in its IR."""
    return {name: Counter(re.findall(OPERATIONS, text)) for name, text in intermediate_representations([work], "sm_90")}


def main() -> None:
    found = {name: [counts(partial(call, **options)) for options in pair] for name, pair in PAIRS.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
