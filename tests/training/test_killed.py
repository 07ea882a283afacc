"""A run killed while writing a checkpoint, and again at a random moment, ends with the weights of one left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.processes import finish, start

KILLS = 1
KILL_WHILE_WRITING = json.dumps(
    [{"class_path": "training.killing.Kill", "init_args": {"step": 6, "while_writing": True}}]
)


@pytest.mark.parametrize("objective", ["mlm", "clm", "span-corruption", "denoising"])
def test_killed_at_any_moment_resumes_to_identical_weights(objective: str, tiny_run: list[str], tmp_path: Path) -> None:
    options = [*tiny_run, "--objective", objective, "--max_steps", "8", "--accumulate", "2", "--elastic"]
    begin = time.monotonic()
    finish(start([*options, "--output", str(tmp_path / "whole")]))
    duration = time.monotonic() - begin

    options += ["--output", str(tmp_path / "killed")]
    (writing,) = start([*options, "--trainer.callbacks", KILL_WHILE_WRITING])
    writing.join(120)
    assert writing.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed/checkpoints").glob(".*.tmp")]
    options += ["--trainer.callbacks", "null"]
    for _ in range(KILLS):
        (process,) = start(options)
        process.join(random.uniform(0.2, 1) * duration)
        process.kill()
        process.join()
    finish(start(options))

    killed, whole = (load_file(tmp_path / name / "model/model.safetensors") for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole"))
    assert all(found[name] == expected[name] for name in ("start", "end", "steps", "tokens"))
