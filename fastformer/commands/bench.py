"""The command ``fastformer bench``: the studies, or with ``gpu`` the benchmark for a few minutes on a GPU."""

from __future__ import annotations

import importlib


def main(arguments: list[str], begin: float) -> None:
    """Run the studies or the GPU benchmark. The GPU benchmark does not import the packages that studies need."""
    if arguments[:1] == ["gpu"]:
        importlib.import_module("fastformer.commands.bench_gpu").main(arguments[1:], begin)
    else:
        importlib.import_module("fastformer.commands.bench_studies").main(arguments, begin)
