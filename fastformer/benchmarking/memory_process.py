"""Measure the memory of one peer in one case of a study, in a new process that does nothing else.

Run it as a module:
``python -m fastformer.benchmarking.memory_process STUDY CASE PEER run|everything DEVICE quick|full``.
"""

from __future__ import annotations

import sys

import torch

from fastformer.benchmarking.memory import MemoryOf, peak_mebibytes
from fastformer.benchmarking.studies import load
from fastformer.benchmarking.study import Setting, TimedStudy


def main(study: str, case: str, peer: str, memory: MemoryOf, device_name: str, size: str) -> None:
    """Print the peak MiB of the peer's run."""
    device = torch.device(device_name)
    loaded = load(study)
    if not isinstance(loaded, TimedStudy):
        raise ValueError(f"study must have timed cases; got {study!r}")
    # Warm up with a small case so that lazy imports and compilation are not counted.
    small = next(each for each in loaded.cases(Setting(device, quick=True)) if peer in each.peers)
    small.peers[peer].prepare()()
    found = next(each for each in loaded.cases(Setting(device, size == "quick")) if each.name == case)
    print(peak_mebibytes(found.peers[peer].prepare, memory, device))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
