"""Peers take turns, must agree, and are named where they cannot take part; memory is measured in a separate process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import fastformer

from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.results import load_results
from fastformer.benchmarking.studies import STUDIES, load
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy

CPU = torch.device("cpu")
FORESEEN = ("not installed", "runs on", "on a GPU only")


def recording(log: list[str], name: str) -> Peer:
    return Peer(lambda: lambda: log.append(name))


def study(*peers: tuple[str, Peer], agree=None) -> TimedStudy:
    return TimedStudy(
        name="a-study", title="", rounds=4, cases=lambda setting: [Case("a case", dict(peers), agree=agree)]
    )


def test_each_round_gives_every_peer_a_turn_and_starts_with_another() -> None:
    log: list[str] = []
    peers = [(name, recording(log, name)) for name in (OURS, "b", "c")]
    measured = list(study(*peers).measure(Setting(CPU, rounds=3)))
    assert [(each.peer, len(each.values)) for each in measured] == [(OURS, 3), ("b", 3), ("c", 3)]
    # A turn repeats short work. Before the rounds, each peer has a first run.
    turns = [name for place, name in enumerate(log) if place == 0 or log[place - 1] != name]
    assert turns == [OURS, "b", "c"] * 2 + ["b", "c", OURS] + ["c", OURS, "b"]


def test_peers_that_disagree_are_an_error() -> None:
    def equal(results: dict[str, object]) -> None:
        assert results[OURS] == results["peer"], results

    different = study((OURS, Peer(lambda: lambda: 1)), ("peer", Peer(lambda: lambda: 2)), agree=equal)
    with pytest.raises(AssertionError, match="'peer': 2"):
        list(different.measure(Setting(CPU)))


def test_absent_and_failing_peers_are_named() -> None:
    def fails() -> None:
        raise RuntimeError("no backward here")

    peers = (
        (OURS, Peer(lambda: lambda: None)),
        ("absent", Peer(lambda: lambda: None, packages=("no_such_package",))),
        ("on a GPU", Peer(lambda: lambda: None, devices=("cuda",))),
        ("fails", Peer(lambda: fails)),
    )
    missing = {each.peer: each.missing for each in study(*peers).measure(Setting(CPU))}
    assert missing == {
        OURS: None,
        "absent": "no_such_package is not installed",
        "on a GPU": "runs on cuda only",
        "fails": "RuntimeError: no backward here",
    }


def test_failure_of_our_own_is_raised() -> None:
    def fails() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        list(study((OURS, Peer(lambda: fails))).measure(Setting(CPU)))


def test_peak_memory_is_the_works() -> None:
    """The peak memory holds the work's tensors.

    PyTorch's linear cross-entropy keeps its 512 x 1,000 logits and their gradient.
    """
    quick = load("linear-cross-entropy")
    assert isinstance(quick, TimedStudy)
    (case,) = quick.cases(Setting(CPU, quick=True))
    logits = 512 * 1000 * 4 / 2**20
    assert logits < quick._peak(case, "PyTorch", "run", Setting(CPU, quick=True)) < 10 * logits
    with pytest.raises(RuntimeError, match="nobody failed in linear-cross-entropy"):
        quick._peak(case, "nobody", "run", Setting(CPU, quick=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study_runs_small(name: str, tmp_path: Path) -> None:
    """Every study runs at its quick size. We have a result in every case, and no installed peer fails."""
    if name == "kernels":  # kernels are compiled only outside the interpreter
        done = fastformer("bench", name, "--quick", "--rounds", "1", "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        measured = load_results(tmp_path / "results.json").studies[name]
    else:
        measured = list(load(name).measure(Setting(CPU, quick=True, rounds=1)))
    ours = [each for each in measured if each.peer == OURS]
    assert ours and all(each.values for each in ours)
    for each in measured:
        assert each.values or any(reason in (each.missing or "") for reason in FORESEEN), each
