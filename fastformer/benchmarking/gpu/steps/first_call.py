"""The first training step of a layer in a new process, with and without kernels compiled beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

from fastformer.benchmarking.first_call import step
from fastformer.benchmarking.gpu.step import Launch, Record, Setting, Step
from fastformer.benchmarking.measurement import OURS

_CASE = "encoder layer, forward and backward"


def _run(setting: Setting) -> Iterator[Record]:
    """Time our first step with the benchmark's cache, then the steps of all peers and ours with empty caches."""
    ahead = os.environ.get("TRITON_CACHE_DIR")
    if ahead is None:
        yield Record(_CASE, OURS, "compiled beforehand", None, "s", "no --cache was given")
    else:
        yield _first("fastformer", OURS, "compiled beforehand", ahead, setting)
    for peer in ("torch.nn", "fastformer") if setting.dry else ("torch.nn", "fastformer", "torch.compile(torch.nn)"):
        with tempfile.TemporaryDirectory() as empty:
            metric = "nothing compiled" if peer != "torch.nn" else "compiled beforehand"
            yield _first(peer, OURS if peer == "fastformer" else peer, metric, empty, setting)


def _first(peer: str, name: str, metric: str, cache: str, setting: Setting) -> Record:
    variables = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    if setting.dry:
        variables["FASTFORMER_BACKEND"] = "torch"  # a whole layer takes minutes in the interpreter
    try:
        done = _process(peer, variables, setting)
    except subprocess.TimeoutExpired:
        return Record(_CASE, name, metric, None, "s", "no time left")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return Record(_CASE, name, metric, None, "s", done.stderr.strip().splitlines()[-1])
    return Record(_CASE, name, metric, float(done.stdout.splitlines()[-1]), "s")


def _process(peer: str, variables: dict[str, str], setting: Setting) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastformer.benchmarking.first_call", peer, setting.device.type],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=max(setting.left, 0.0),
    )


def _launches() -> Iterator[Launch]:
    yield step("fastformer", torch.device("meta"))


STEP = Step("first_call", "the first step of a new process, with and without compiled kernels", 35, _run, _launches)
