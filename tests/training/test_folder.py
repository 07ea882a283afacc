"""Tests of the output folder: what a run may remove, what it never removes, and that one process at a time writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from fastformer.files import atomic_folder
from fastformer.stopping import Stopped
from fastformer.training.folder import RunFolder

RUN = (
    *("config.yaml", "metrics.json", "loss.png", "report.md", "checkpoints/step-0000010.ckpt"),
    *("logs/csv/version_0/metrics.csv", "logs/tensorboard/version_0/events.out.tfevents.1.host.2", "model/config.json"),
)


def folder(path: Path) -> RunFolder:
    return RunFolder(path / "output", "pretraining")


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """Return a folder with all that a run leaves."""
    run = folder(tmp_path)
    with run.opened(resume=False, overwrite=False):
        run.begin()
        run.claim_model(["config.json"])
        for name in RUN:
            write(run.path / name)
    return run


def write(path: Path, text: str = "of the run") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(path: Path) -> set[str]:
    found = {each.relative_to(path).as_posix() for each in path.rglob("*") if not each.is_dir() or each.is_symlink()}
    return found - {"manifest.json", ".lock"}


def test_a_run_is_removed_once_the_next_one_begins_and_not_before(finished: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no learning rate"), folder(tmp_path).opened(False, overwrite=True):
        raise ValueError("no learning rate")
    assert files(finished.path) == set(RUN)
    run = folder(tmp_path)
    with run.opened(False, overwrite=True):
        write(run.path / "logs/csv/version_1/metrics.csv", "of the next")
        assert files(run.path) == {*RUN, "logs/csv/version_1/metrics.csv"}
        run.begin()
        assert files(run.path) == {"logs/csv/version_1/metrics.csv"}
        assert not (run.path / "model").exists()


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.json"])
def test_a_run_is_never_replaced_unasked(missing: str, finished: RunFolder, tmp_path: Path) -> None:
    (finished.path / missing).unlink()
    with pytest.raises(ValueError, match=r"holds .* run: continue it"), folder(tmp_path).opened(False, False):
        pass
    assert files(finished.path) == {*RUN} - {missing}


def test_logs_of_what_failed_before_its_first_step_are_in_nobodys_way(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with run.opened(False, False):
        write(run.path / "logs/csv/version_0/metrics.csv")
    with folder(tmp_path).opened(False, False):
        pass


def test_what_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with folder(tmp_path).opened(False, False):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("end", [Stopped(signal.SIGTERM), ValueError("no learning rate")], ids=["signal", "error"])
def test_what_ends_a_run_early_is_seen_and_empty_folders_are_in_nobodys_way(
    end: BaseException, there: bool, tmp_path: Path
) -> None:
    run = folder(tmp_path)
    if there:
        run.path.mkdir()
    with pytest.raises(type(end)) as raised, run.opened(False, False):
        run.checkpoints.mkdir()
        (run.logs / "csv/version_0").mkdir(parents=True)
        raise end
    assert raised.value is end
    assert run.path.exists() == there
    with folder(tmp_path).opened(False, False):
        pass


FOREIGN = [
    *("thesis.tex", "model/README.md", "logs/notes.txt", "checkpoints/best.ckpt", "checkpoints/step-0000010-keep.ckpt"),
    *(".notes.tmp", "results.tmp", "data/train.jsonl", "logs/csv/version_0/notes.md"),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_manifest_lists_is_never_removed(name: str, finished: RunFolder, tmp_path: Path) -> None:
    write(finished.path / name, "precious")
    run = folder(tmp_path)
    with pytest.raises(ValueError, match=rf"no pretraining run: {name}"), run.opened(False, overwrite=True):
        run.begin()
    assert files(finished.path) == {*RUN, name}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["model/weights", "logs/notes", "checkpoints/step-0000001.ckpt", "x.tmp", "config.yaml"]
)
def test_names_like_ours_make_no_run(name: str, overwrite: bool, tmp_path: Path) -> None:
    write(tmp_path / "output" / name, "precious")
    with pytest.raises(ValueError, match=r"holds "), folder(tmp_path).opened(False, overwrite):
        pass
    assert [each.read_text() for each in (tmp_path / "output").rglob("*") if each.is_file()] == ["precious"]


def test_a_link_is_never_followed(finished: RunFolder, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "step-0000020.ckpt", "precious")
    (finished.path / "checkpoints/step-0000010.ckpt").unlink()
    (finished.path / "checkpoints/step-0000010.ckpt").symlink_to(tmp_path / "elsewhere/step-0000020.ckpt")
    run = folder(tmp_path)
    with run.opened(False, overwrite=True):
        run.begin()
    assert (tmp_path / "elsewhere/step-0000020.ckpt").read_text() == "precious"
    assert not (finished.path / "checkpoints").exists()


def test_resuming_removes_what_was_half_written_and_nothing_else(finished: RunFolder, tmp_path: Path) -> None:
    own = (".config.yaml.0123456789abcdef.tmp", "checkpoints/.step-0000020.ckpt.0123456789abcdef.tmp")
    own_folder = ".model.0123456789abcdef.tmp/config.json"
    foreign = (".notes.tmp", "checkpoints/.mine.ckpt.0123456789abcdef.tmp", "thesis.tex")
    for name in (*own, own_folder, *foreign):
        write(finished.path / name)
    with folder(tmp_path).opened(resume=True, overwrite=False):
        assert files(finished.path) == {*RUN, *foreign}


def test_resuming_would_replace_a_model_with_foreign_files_and_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    write(finished.path / "model/README.md", "precious")
    with pytest.raises(ValueError, match="model/README"), folder(tmp_path).opened(resume=True, overwrite=False):
        pass


def test_a_run_from_before_there_were_manifests_is_resumed(finished: RunFolder, tmp_path: Path) -> None:
    finished.manifest.unlink()
    with folder(tmp_path).opened(resume=True, overwrite=False):
        pass
    assert "model/config.json" in json.loads(finished.manifest.read_text())["files"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', "\udcff", pytest.param("[" * 100_000, id="deep")])
def test_a_damaged_manifest_is_named(content: str, finished: RunFolder, tmp_path: Path) -> None:
    finished.manifest.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json"), folder(tmp_path).opened(False, overwrite=True):
        pass
    assert files(finished.path) == set(RUN)


# --- One at a time ----------------------------------------------------------------------------------------------------


def _hold(path: Path, connection: multiprocessing.connection.Connection) -> None:
    with folder(path).opened(resume=True, overwrite=False):
        connection.send(os.getpid())
        connection.recv()


@pytest.mark.parametrize(("resume", "overwrite"), [(True, False), (False, True), (False, False)])
def test_two_runs_in_one_folder(resume: bool, overwrite: bool, finished: RunFolder, tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    pid = ours.recv()
    run = folder(tmp_path)
    with pytest.raises(ValueError, match=rf"in use: process {pid} on \S+ writes"), run.opened(resume, overwrite):
        run.begin()
    assert files(finished.path) == set(RUN)
    process.kill()  # a dead process holds no lock
    process.join()
    with folder(tmp_path).opened(resume=True, overwrite=False):
        pass


def _hold_and_fork(path: Path, connection: multiprocessing.connection.Connection) -> None:
    with folder(path).opened(resume=True, overwrite=False):
        if not os.fork():
            time.sleep(1.0)
            os._exit(0)
        connection.send(os.getpid())
        connection.recv()


def test_what_a_killed_run_has_left_running_is_waited_for(finished: RunFolder, tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold_and_fork, args=(tmp_path, theirs))
    process.start()
    ours.recv()
    process.kill()
    process.join()
    with folder(tmp_path).opened(resume=True, overwrite=False):
        pass


# --- Replacing --------------------------------------------------------------------------------------------------------


def test_a_folder_takes_the_place_of_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/weights", "old")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "model", replace=True) as new:
        write(new / "weights", "new")
    assert (tmp_path / "model/weights").read_text() == "new"
    assert not (tmp_path / "model").is_symlink()
    assert (tmp_path / "elsewhere/weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model"]


# --- What --overwrite never removes -----------------------------------------------------------------------------------


def test_a_run_of_another_kind_is_never_replaced(finished: RunFolder) -> None:
    manifest = finished.manifest.read_bytes()
    other = RunFolder(finished.path, "fine-tuning")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match=r"--output .* another kind, pretraining"), other.opened(False, overwrite):
            pass
    assert files(finished.path) == set(RUN)
    assert finished.manifest.read_bytes() == manifest


@pytest.mark.parametrize(
    "kind", ["inside", "the folder", "link", "link to a link", "link in a folder", "linked output"]
)
@pytest.mark.parametrize("option", ["--model", "--data"])
def test_what_is_to_be_read_is_never_replaced(option: str, kind: str, finished: RunFolder, tmp_path: Path) -> None:
    given, run, link = finished.model, finished, tmp_path / "texts" / "link"
    link.parent.mkdir()
    if kind == "the folder":
        given = finished.path
    elif kind == "linked output":
        link.symlink_to(finished.path)
        run = RunFolder(link, "pretraining")
    elif kind != "inside":
        link.symlink_to(finished.path / "report.md")
        given = link.parent if kind == "link in a folder" else link
        if kind == "link to a link":
            given = tmp_path / "again"
            given.symlink_to(link)
    manifest = finished.manifest.read_bytes()
    with (
        pytest.raises(ValueError, match=rf"{option} {given} is in --output .* --overwrite would remove"),
        run.opened(False, True, {option: [given]}),
    ):
        pass
    assert files(finished.path) == set(RUN)
    assert finished.manifest.read_bytes() == manifest


def test_what_is_read_from_beside_the_run_is_in_nobodys_way(finished: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "output2").mkdir()
    with finished.opened(False, True, {"--data": [tmp_path, tmp_path / "output2"]}):
        finished.begin()
    assert files(finished.path) == set()


@pytest.mark.parametrize("content", ["", '{"kind": "pretr', "[]", "{}"])
def test_a_run_with_a_damaged_manifest_is_resumed(content: str, finished: RunFolder, tmp_path: Path) -> None:
    finished.manifest.write_text(content)
    with (
        pytest.warns(UserWarning, match=r"manifest\.json .*; it is written again"),
        folder(tmp_path).opened(resume=True, overwrite=False),
    ):
        pass
    assert files(finished.path) == set(RUN)
    assert "model/config.json" in json.loads(finished.manifest.read_text())["files"]


def test_a_run_is_known_by_a_name_of_its_own(finished: RunFolder, tmp_path: Path) -> None:
    known = finished.run
    assert known
    with pytest.raises(ValueError, match="no learning rate"), folder(tmp_path).opened(False, overwrite=True):
        raise ValueError("no learning rate")
    assert finished.run == known  # the run is not replaced
    with folder(tmp_path).opened(resume=True, overwrite=False):
        finished.claim_model(["weights"])
    assert finished.run == known
    with folder(tmp_path).opened(False, overwrite=True):
        finished.begin()
    assert finished.run not in (known, None)
