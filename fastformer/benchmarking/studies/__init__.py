"""The studies of ``fastformer bench``, a file each. What a study needs is imported once it is asked for."""

from __future__ import annotations

import importlib

from fastformer.benchmarking.study import Study

STUDIES = {
    "compiled-pretraining": "fastformer.benchmarking.studies.compiled_pretraining",
    "finetuning": "fastformer.benchmarking.studies.finetuning",
    "linear-cross-entropy": "fastformer.benchmarking.studies.linear_cross_entropy",
    "pretraining": "fastformer.benchmarking.studies.pretraining",
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
