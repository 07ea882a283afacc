"""The first call of a new process that has an ahead-of-time cache compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastformer_kernels.launch import architecture_of
from gpu import first_call

from fastformer.models import FastformerConfig, FastformerForMaskedLM

pytestmark = pytest.mark.slow
PROGRAM = first_call.__file__


def run(command: list[str], environment: dict[str, str]) -> str:
    """Run the program and return what it prints."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a small masked language model."""
    config = FastformerConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=16,
    )
    folder = tmp_path / "model"
    FastformerForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def test_the_program_itself(model: str, capsys: pytest.CaptureFixture[str], dry: bool) -> None:
    """The program reports no compiled kernels in the interpreter, which compiles nothing."""
    if not dry:
        pytest.skip("the next test runs it")
    first_call.main(model, "cpu")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == []


def test_nothing_is_compiled(model: str, tmp_path: Path, real_gpu: None) -> None:
    architecture = architecture_of(torch.empty(0, device="cuda")).name
    cache, empty = tmp_path / "cache", tmp_path / "empty"
    compile = ["-m", "fastformer.cli", "kernels", "compile", "--arch", architecture]
    compile += ["--model", model, "--precision", "bf16-mixed", "--out", str(cache), "--processes", "8"]
    run(compile, {"CUDA_VISIBLE_DEVICES": ""})
    call = [PROGRAM, model, "cuda"]
    assert json.loads(run(call, {"TRITON_CACHE_DIR": str(cache)}).splitlines()[-1]) == []
    assert json.loads(run(call, {"TRITON_CACHE_DIR": str(empty)}).splitlines()[-1]), "the count itself is broken"
