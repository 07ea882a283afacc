from __future__ import annotations

import errno
import os

import pytest

from fastformer.files import atomic_file, atomic_folder, cache_folder

pytestmark = pytest.mark.cpu


def test_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"text")
        assert not path.exists()
    assert path.read_bytes() == b"text"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failing_write_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(OSError, match="No space left on device") as raised, atomic_file(path) as file:
        file.write(b"new")
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk(tmp_path, full_disk):
    path = tmp_path / "file"
    with full_disk(10_000), pytest.raises(OSError, match=str(path)), atomic_file(path) as file:
        file.write(bytes(10_001))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_interrupted_writing_leaves_nothing(tmp_path, writer):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "name"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_folder_appears_whole(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("text")
        assert not path.exists()
    assert (path / "file").read_text() == "text"
    assert os.listdir(tmp_path) == ["folder"]


def test_folder_completed_by_another_process_first_stays(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("mine")
        path.mkdir()
        (path / "file").write_text("theirs")
    assert (path / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["folder"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFORMER_CACHE", str(tmp_path / "variable"))
    assert cache_folder() == tmp_path / "variable"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    monkeypatch.delenv("FASTFORMER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastformer"
