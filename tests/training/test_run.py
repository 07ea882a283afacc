"""Tests of what all commands that train do in the same way."""

import logging

import pytest

from fastformer.training import run


def test_the_terminal_is_left_to_progress_and_warnings() -> None:
    run.quieten()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(f"{name}.utilities")
        assert logger.isEnabledFor(logging.WARNING) and not logger.isEnabledFor(logging.INFO)


def test_variables_of_slurm_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "pretraining")
    with pytest.raises(ValueError, match="ntasks"):
        run._cluster_environment()
