"""The first training step of a layer in a new process, with and without kernels compiled ahead of time.

The time of compiling ahead is measured too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from fastformer.benchmarking.first_call import PEERS, step
from fastformer.benchmarking.measurement import OURS, TIME, Measurement
from fastformer.benchmarking.study import MeasuredStudy, Setting

_WITHOUT = f"{OURS}, without the cache"
_ARCHITECTURES = ("sm_90", "gfx942")


def measurements(setting: Setting) -> Iterator[Measurement]:
    gpu = setting.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        ahead = Path(folder) / "ahead"
        for architecture in _architectures(setting):
            case = f"compiling a layer's kernels ahead of time for {architecture}"
            yield Measurement("first-call", case, OURS, TIME, [_compile_ahead(architecture, ahead)])
        yield from _first_steps(setting, ahead if gpu else None, Path(folder))


def _architectures(setting: Setting) -> tuple[str, ...]:
    """The architecture of the GPU; without a GPU, some architectures to compile for."""
    if setting.device.type == "cuda":
        from fastformer_kernels.launch import architecture_of

        return (architecture_of(torch.empty(0, device=setting.device)).name,)
    return () if setting.quick else _ARCHITECTURES


def _compile_ahead(architecture: str, cache: Path) -> float:
    """Compile a layer's kernels ahead of time. Returns the seconds."""
    from fastformer.kernel_reports.compilation import compile_ahead

    begin = time.perf_counter()
    _, failures = compile_ahead([_layer_on_meta], [architecture], cache)
    if failures:
        raise RuntimeError(f"{architecture}: {failures[0].reason}")
    return time.perf_counter() - begin


def _layer_on_meta() -> None:
    step(OURS, torch.device("meta"))()


def _first_steps(setting: Setting, ahead: Path | None, folder: Path) -> Iterator[Measurement]:
    case = "first training step of an encoder layer"
    rounds = setting.rounds or (1 if setting.quick else 3)
    caches = {OURS: ahead, _WITHOUT: None} if ahead else {OURS: None}
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        for place, peer in enumerate((*caches, *PEERS[1:])):
            if peer == PEERS[2] and setting.quick:
                continue
            # Every process except the one with our cache starts with empty caches. The path has no spaces, which
            # compilers do not accept.
            cache = caches.get(peer) or folder / f"{number}-{place}"
            found.setdefault(peer, []).append(_seconds(peer.split(",")[0], setting.device, cache))
    measured = partial(Measurement, "first-call", case)
    for peer, values in found.items():
        yield measured(peer, TIME, values)
    if ahead is None:
        yield measured(_WITHOUT, TIME, [], missing="runs on cuda only: on a CPU there is nothing to compile")


def _seconds(peer: str, device: torch.device, cache: Path) -> float:
    caches = {"TRITON_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    command = [sys.executable, "-m", "fastformer.benchmarking.first_call", peer, str(device)]
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{peer} failed at its first step: {done.stderr.strip()[-2000:]}")
    return float(done.stdout.split()[-1])


STUDY = MeasuredStudy(
    name="first-call",
    title="the first step of a new process, compilation included",
    measurements=measurements,
    note="Times leave out imports, and the start of the device and of its matrix library.",
)
