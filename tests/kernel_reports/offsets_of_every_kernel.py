"""A program, run without the interpreter, that prints the products that can overflow in each kernel."""

import json
import sys

import triton
import triton.language as tl
from kernel_reports.offsets import intermediate_representations, narrow_products

from fastformer.kernel_reports.workload import cases


@triton.jit
def narrow_kernel(x_pointer, y_pointer, stride, columns: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_pointer + row * stride + tl.arange(0, columns))
    tl.store(y_pointer + row.to(tl.int64) * stride + tl.arange(0, columns), x)


@triton.jit
def carried_kernel(x_pointer, rows, stride, columns: tl.constexpr):
    """A kernel in which the narrow product is the start of a loop's variable."""
    at = tl.program_id(0) * stride
    for _ in range(rows):
        tl.store(x_pointer + at + tl.arange(0, columns), 0.0)
        at += columns


@triton.jit
def wide_kernel(x_pointer, stride, columns: tl.constexpr):
    row = (tl.program_id(0) * 4 + tl.arange(0, 4)).to(tl.int64)[:, None]
    tl.store(x_pointer + row * stride + tl.arange(0, columns)[None, :], 0.0)


def planted() -> None:
    import torch

    x = torch.empty(64, 32, device="meta")
    narrow_kernel[(64,)](x, x, 32, 32)
    carried_kernel[(64,)](x, 4, 32, 32)
    wide_kernel[(16,)](x, 32, 32)


def main() -> None:
    layouts = ["odd"]  # nothing is a multiple of 16: Triton would split off a stride's factor as a constant
    work = [case.run for case in cases(dtypes=["bfloat16"], layouts=layouts)]
    found: dict[str, list[str]] = {}
    for name, text in [*intermediate_representations([planted], "sm_90"), *intermediate_representations(work, "sm_90")]:
        found.setdefault(name, []).extend(narrow_products(text))
    json.dump({name: sorted(set(lines)) for name, lines in found.items()}, sys.stdout)


if __name__ == "__main__":
    main()
