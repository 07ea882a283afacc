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
from training.tasks import command, scratch

KILLS = 1
PRETRAINING = ("mlm", "clm", "span-corruption", "denoising")
FINE_TUNING = {
    "classify": ("--patience", "5", "--monitor", "accuracy"),
    "qa": ("--activation_checkpointing",),
    "summarize": ("--adversarial", "fgm", "--adversary.epsilon", "0.05"),
    "generate": (),
}


def kill(step: int, while_writing: bool) -> list[str]:
    options = {"step": step, "while_writing": while_writing}
    return ["--trainer.callbacks", json.dumps([{"class_path": "training.killing.Kill", "init_args": options}])]


@pytest.fixture(params=[*PRETRAINING, *FINE_TUNING])
def options(request: pytest.FixtureRequest, tiny_run: list[str], data: Path) -> list[str]:
    """Return the options of a run of eight steps with a checkpoint after each second step."""
    common = ["--max_steps", "8", "--evaluate_every", "2", "--accumulate", "2", "--elastic"]
    if request.param in PRETRAINING:
        return [*tiny_run, "--objective", request.param, *common]
    return [*command(request.param, data, Path("absent")), *scratch(), *FINE_TUNING[request.param], *common]


def test_killed_at_any_moment_resumes_to_identical_weights(options: list[str], tmp_path: Path) -> None:
    begin = time.monotonic()
    finish(start([*options, "--output", str(tmp_path / "whole")]))
    duration = time.monotonic() - begin

    killed = tmp_path / "killed"
    options += ["--output", str(killed)]
    (writing,) = start([*options, *kill(6, while_writing=True)])
    writing.join(120)
    assert writing.exitcode == -signal.SIGKILL
    assert [path.name for path in (killed / "checkpoints").glob(".*.tmp")]
    options += ["--trainer.callbacks", "null"]
    for _ in range(KILLS):
        (process,) = start(options)
        process.join(random.uniform(0.2, 1) * duration)
        process.kill()
        process.join()
    newest = max((killed / "checkpoints").glob("*.ckpt"))
    newest.write_bytes(newest.read_bytes()[: random.randrange(newest.stat().st_size)])
    finish(start(options))

    found, expected = (load_file(folder / "model/model.safetensors") for folder in (killed, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (killed, tmp_path / "whole"))
    assert all(found[name] == expected[name] for name in ("start", "end", "steps", "tokens"))
    assert found.get("test") == expected.get("test")
