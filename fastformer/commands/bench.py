"""``fastformer bench``: the studies, or after the word ``gpu`` the benchmark for a few minutes on a GPU."""

from __future__ import annotations

import importlib


def main(arguments: list[str], begin: float) -> None:
    """Run whichever it is. The GPU's imports none of the studies' packages."""
    if arguments[:1] == ["gpu"]:
        importlib.import_module("fastformer.commands.bench_gpu").main(arguments[1:], begin)
    else:
        importlib.import_module("fastformer.commands.bench_studies").main(arguments, begin)
