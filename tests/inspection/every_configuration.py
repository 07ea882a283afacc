"""Compiles attention for one architecture with each entry of its tables, and prints which of its kernels fit."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fastformer.inspection.compilation import compiler, specializations_of
from fastformer.inspection.workload import cases

# By head_dim and the size of an element.
VARIANTS = ("d64-causal", "d128-causal", "d256-causal")
DTYPES = ["float32", "bfloat16"]


def main(architecture: str) -> None:
    work = [case.run for case in cases(["attention"], DTYPES, ["aligned"]) if case.variant in VARIANTS]
    with tempfile.TemporaryDirectory() as cache, compiler(Path(cache), 1) as submit:
        for each, done in [(each, submit(each)) for each in specializations_of(work, architecture)]:
            reason = done.result()
            print(each.kernel, "fits" if reason is None else f"does not fit: {reason}")


if __name__ == "__main__":
    main(sys.argv[1])
