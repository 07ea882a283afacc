"""Checkpoints: whole or absent, checked before they are used."""

import errno
import resource
import signal
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fastformer.training.checkpoints import AtomicCheckpointIO, check_checkpoint, latest_checkpoint

CONTENT = {"weight": torch.arange(1000.0), "step": 7}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "step-0000007.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def test_reads_what_it_wrote_and_leaves_nothing_else(checkpoint: Path) -> None:
    loaded = AtomicCheckpointIO().load_checkpoint(checkpoint)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weight"], CONTENT["weight"])
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@settings(max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_short_anywhere_is_detected(checkpoint: Path, share: float) -> None:
    whole = checkpoint.read_bytes()
    cut = checkpoint.parent / "cut"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"the checkpoint .*cut is cut short or damaged"):
        AtomicCheckpointIO().load_checkpoint(cut)
    cut.unlink()


def test_a_changed_weight_is_detected(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    content = bytearray(checkpoint.read_bytes())
    content[content.index(CONTENT["weight"].numpy().tobytes()) + 2000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: the checksum of its part .* does not match"):
        check_checkpoint(damaged)


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")


def test_full_disk_names_the_file_and_keeps_the_old_one(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-0000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit then fails like a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-0000001\.ckpt") as raised:
            AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_latest_passes_over_damaged_ones_with_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    whole = checkpoint.read_bytes()
    older, newer = tmp_path / "step-0000900.ckpt", tmp_path / "step-0001000.ckpt"
    older.write_bytes(whole)
    newer.write_bytes(whole)
    (tmp_path / ".step-0002000.ckpt.0123.tmp").write_bytes(whole[:100])
    assert latest_checkpoint(tmp_path) == newer
    newer.write_bytes(whole[:-1])
    with pytest.warns(UserWarning, match=r"step-0001000\.ckpt is cut short or damaged"):
        assert latest_checkpoint(tmp_path) == older
    older.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"step-0001000\.ckpt, step-0000900\.ckpt"):
        latest_checkpoint(tmp_path)
