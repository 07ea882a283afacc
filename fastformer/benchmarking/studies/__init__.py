"""The studies of ``fastformer bench``, one file for each. A study is imported only when it is loaded."""

from __future__ import annotations

import importlib

from fastformer.benchmarking.study import Study

STUDIES = {
    "attention": "fastformer.benchmarking.studies.attention",
    "operators": "fastformer.benchmarking.studies.operators",
    "modules": "fastformer.benchmarking.studies.modules",
    "models": "fastformer.benchmarking.studies.models",
    "accelerated": "fastformer.benchmarking.studies.accelerated",
    "launch": "fastformer.benchmarking.studies.launch",
    "first-call": "fastformer.benchmarking.studies.first_call",
    "kernels": "fastformer.benchmarking.studies.kernels",
    "linear-cross-entropy": "fastformer.benchmarking.studies.linear_cross_entropy",
    "pretraining": "fastformer.benchmarking.studies.pretraining",
    "compiled-pretraining": "fastformer.benchmarking.studies.compiled_pretraining",
    "finetuning": "fastformer.benchmarking.studies.finetuning",
    "generation": "fastformer.benchmarking.studies.generation",
    "startup": "fastformer.benchmarking.studies.startup",
    "tokenizing": "fastformer.benchmarking.studies.tokenizing",
    "scaling": "fastformer.benchmarking.studies.scaling",
    "crossovers": "fastformer.benchmarking.studies.crossovers",
    "sentiment": "fastformer.benchmarking.studies.sentiment",
    "tasks": "fastformer.benchmarking.studies.tasks",
}
"""The module of each study by the study's name. The module defines the study as `STUDY`."""


def load(name: str) -> Study:
    """Load a study by its name.

    Raises:
        ValueError: there is no such study.
    """
    if name not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}; got {name!r}")
    return importlib.import_module(STUDIES[name]).STUDY
