"""The studies of ``fastformer bench``, a file each. What a study needs is imported once it is asked for."""

from __future__ import annotations

import importlib

from fastformer.benchmarking.study import Study

STUDIES = {
    "attention": "fastformer.benchmarking.studies.attention",
    "operators": "fastformer.benchmarking.studies.operators",
    "modules": "fastformer.benchmarking.studies.modules",
    "models": "fastformer.benchmarking.studies.models",
    "launch": "fastformer.benchmarking.studies.launch",
    "first-call": "fastformer.benchmarking.studies.first_call",
    "kernels": "fastformer.benchmarking.studies.kernels",
    "linear-cross-entropy": "fastformer.benchmarking.studies.linear_cross_entropy",
    "crossovers": "fastformer.benchmarking.studies.crossovers",
    "scaling": "fastformer.benchmarking.studies.scaling",
}
"""Each study's name and its module, which has it as `STUDY`."""


def load(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    return importlib.import_module(STUDIES[name]).STUDY
