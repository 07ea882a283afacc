"""BERT's pretraining step, ours and Hugging Face's, each with and without torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.studies.pretraining import Work, our_steps, their_steps
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.benchmarking.training import HUGGING_FACE, SMALL, TINY


def cases(setting: Setting) -> list[Case]:
    work = Work(TINY, pairs=4, max_length=64) if setting.quick else Work(SMALL, pairs=8)
    peers = {
        OURS: Peer(lambda: our_steps(work)),
        f"{OURS}, compiled": Peer(lambda: compiled(our_steps, work)),
        HUGGING_FACE: Peer(lambda: their_steps(work)),
        f"{HUGGING_FACE}, compiled": Peer(lambda: compiled(their_steps, work)),
    }
    name = "1 layer, 64 wide, 4 pairs" if setting.quick else "4 layers, 512 wide, 8 pairs"
    return [Case(name, peers, {"tokens": work.data().tokens})]


def compiled(steps: Callable[[Work, bool], Run], work: Work) -> Run:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RuntimeError("a C++ compiler is not installed")
    return steps(work, True)


STUDY = TimedStudy(
    name="compiled-pretraining",
    title="BERT's pretraining step with torch.compile",
    cases=cases,
    rounds=3,
    note="The setup is that of the study pretraining. Times leave out compilation, which needs a C++ compiler and "
    "takes minutes.",
)
