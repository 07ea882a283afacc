"""Checkpoints are whole or absent, and are checked before they are used."""

import errno
import resource
import signal
from pathlib import Path
from shutil import copy
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from training.tasks import command, scratch

from fastformer import cli
from fastformer.training.checkpoints import (
    AtomicCheckpointIO,
    StepCheckpoint,
    check_checkpoint,
    latest_checkpoint,
    save_checked,
)

CONTENT = {"weight": torch.arange(1000.0), "step": 7}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "step-0000007.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


@pytest.mark.quick
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
    with pytest.raises(ValueError, match=r"the checkpoint .*cut is truncated or damaged"):
        AtomicCheckpointIO().load_checkpoint(cut)
    cut.unlink()


def test_a_changed_weight_is_detected(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    content = bytearray(checkpoint.read_bytes())
    content[content.index(CONTENT["weight"].numpy().tobytes()) + 2000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: the checksum of its part .* does not match"):
        check_checkpoint(damaged)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_changed_bit_is_detected(checkpoint: Path, place: float, bit: int) -> None:
    """Any changed bit is detected, also in the archive's directory, which has no checksum of its own."""
    content = bytearray(checkpoint.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    changed = checkpoint.parent / "changed"
    changed.write_bytes(content)
    with pytest.raises(ValueError, match=r"the checkpoint .*changed is (truncated or )?damaged"):
        AtomicCheckpointIO().load_checkpoint(changed)
    changed.unlink()


def unsigned(path: Path) -> None:
    """Save a checkpoint in the old form, without a checksum of the whole file."""
    torch.save(CONTENT, path)


def test_one_without_a_checksum_of_its_own_is_still_read(tmp_path: Path) -> None:
    unsigned(tmp_path / "old.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")["step"] == 7


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_one_without_a_checksum_fails_in_one_way_or_reads_well(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "unsigned.ckpt"
    unsigned(path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        loaded = AtomicCheckpointIO().load_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert torch.equal(loaded["weight"], CONTENT["weight"])


def test_what_holds_more_than_plain_values_is_refused(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"run": Path}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code\.ckpt cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "code.ckpt")


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


def test_what_cannot_be_saved_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    class Unwilling:
        def __reduce__(self) -> Any:
            raise RuntimeError("not to be saved")

    with pytest.raises(RuntimeError, match="not to be saved"):
        save_checked(Unwilling(), tmp_path / "step-1.ckpt")
    assert not list(tmp_path.iterdir())


def test_latest_passes_over_damaged_ones_with_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    whole = checkpoint.read_bytes()
    older, newer = tmp_path / "step-0000900.ckpt", tmp_path / "step-0001000.ckpt"
    older.write_bytes(whole)
    newer.write_bytes(whole)
    (tmp_path / ".step-0002000.ckpt.0123.tmp").write_bytes(whole[:100])
    assert latest_checkpoint(tmp_path) == newer
    newer.write_bytes(whole[:-1])
    with pytest.warns(UserWarning, match=r"step-0001000\.ckpt is truncated or damaged"):
        assert latest_checkpoint(tmp_path) == older
    older.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"step-0001000\.ckpt, step-0000900\.ckpt"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["folder", "full folder", "empty", "garbage", "half", "bit", "link to nothing"])
def test_the_one_before_is_taken_whatever_the_damage(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    (tmp_path / "step-0000007.ckpt").write_bytes(whole)
    newest = tmp_path / "step-0000009.ckpt"
    content = {"empty": b"", "garbage": b"PK" * 99, "half": whole[:999], "bit": whole[:-1] + bytes([whole[-1] ^ 1])}
    if damage in content:
        newest.write_bytes(content[damage])
    elif damage == "link to nothing":
        newest.symlink_to(tmp_path / "nothing")
    else:
        newest.mkdir()
        if damage == "full folder":
            (newest / "thesis.tex").write_text("precious")
    with pytest.warns(UserWarning, match=r"step-0000009\.ckpt.* the one before it is tried") as warned:
        assert latest_checkpoint(tmp_path) == tmp_path / "step-0000007.ckpt"
    assert len(warned) == 1
    # When training reaches that step again it saves, and removes only what it has written.
    checkpoints = StepCheckpoint(tmp_path, every=1, keep=2)
    for step in (8, 9, 10):
        checkpoints.save(saving(step))
        assert check_checkpoint(tmp_path / f"step-{step:07d}.ckpt") is None
    assert {path.name for path in tmp_path.iterdir()} - {"step-0000009.ckpt.1"} == {
        "step-0000009.ckpt",
        "step-0000010.ckpt",
    }
    assert ("thesis.tex" in {path.name for path in tmp_path.rglob("*")}) == (damage == "full folder")


def saving(step: int) -> Any:
    """Return a trainer that has reached a step."""
    return SimpleNamespace(
        global_step=step,
        is_global_zero=True,
        save_checkpoint=lambda path: AtomicCheckpointIO().save_checkpoint(CONTENT, path),
    )


def test_one_just_saved_is_never_taken_for_an_old_one(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint that was just saved is never removed as an old one. Two damaged ones of later steps do not count."""
    for step in (6, 9, 12):
        (tmp_path / f"step-{step:07d}.ckpt").write_bytes(checkpoint.read_bytes()[: 999 if step > 6 else None])
    StepCheckpoint(tmp_path, every=1, keep=2).save(saving(8))
    check_checkpoint(tmp_path / "step-0000008.ckpt")
    check_checkpoint(tmp_path / "step-0000006.ckpt")


def of_run(path: Path, step: int = 7, **changed: Any) -> Path:
    parts = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch")
    content = dict.fromkeys(parts, 0) | {"global_step": step, "state_dict": {"weight": torch.ones(3)}} | changed
    AtomicCheckpointIO().save_checkpoint({name: part for name, part in content.items() if part is not None}, path)
    return path


OTHERS = {
    "a weight is missing": {"state_dict": {}},
    "a weight too many": {"state_dict": {"weight": torch.ones(3), "bias": torch.ones(3)}},
    "another shape": {"state_dict": {"weight": torch.ones(4)}},
    "weights that are none": {"state_dict": [1]},
    "another step": {"global_step": 5},
    "no optimizer": {"optimizer_states": None},
    "no weights": {"state_dict": None},
}


@pytest.mark.parametrize("kind", ["empty", "a list", *OTHERS])
def test_one_that_is_whole_but_not_the_runs_is_passed_over(kind: str, tmp_path: Path) -> None:
    older, newest = of_run(tmp_path / "step-0000007.ckpt"), tmp_path / "step-0000009.ckpt"
    if kind in OTHERS:
        of_run(newest, **{"step": 9, **OTHERS[kind]})
    else:
        torch.save({} if kind == "empty" else [1], newest)
    expected = {"weight": torch.ones(3)}
    with pytest.warns(UserWarning, match=r"step-0000009\.ckpt is not .*; the one before it is tried") as warned:
        assert latest_checkpoint(tmp_path, lambda content: expected) == older
    assert len(warned) == 1
    older.unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"undamaged and from this run: step-0000009\.ckpt"):
        latest_checkpoint(tmp_path, lambda content: expected)


def test_one_of_another_run_is_passed_over(tmp_path: Path) -> None:
    older, newest = tmp_path / "step-0000007.ckpt", tmp_path / "step-0000009.ckpt"
    weights = {"weight": torch.ones(3)}
    of_run(older, run="this")
    for other in ("other", None):
        of_run(newest, step=9, run=other)
        with pytest.warns(
            UserWarning, match=r"step-0000009\.ckpt is not this run's: it belongs to another run"
        ) as warned:
            assert latest_checkpoint(tmp_path, lambda content: weights, "this") == older
        assert len(warned) == 1
        assert latest_checkpoint(tmp_path, lambda content: weights) == newest  # the run has no name


@pytest.mark.parametrize("name", ["pretrain", "classify"])
def test_a_command_goes_on_from_its_own(
    name: str, tiny_run: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A command continues from its own checkpoint.

    Another run, with the same options but another seed, has the newest one.
    """
    resume = ["pretrain"] if name == "pretrain" else ["finetune", name]
    begin = tiny_run if name == "pretrain" else [*command(name, data, tmp_path), *scratch("--patience", "9")]
    for output, steps, seed in (("one", 4, 0), ("other", 8, 1)):
        options = [*begin, "--output", str(tmp_path / output), "--max_steps", str(steps), "--seed", str(seed)]
        assert cli.main([*options, "--evaluate_every", "2"]) == 0
    one, other = tmp_path / "one", tmp_path / "other"
    copy(other / "checkpoints/step-0000008.ckpt", one / "checkpoints")
    if name == "classify":
        copy(other / "best.pt", one)
    with pytest.warns(UserWarning, match=r"belongs to another run") as warned:
        assert cli.main([*resume, "--resume", "--output", str(one), "--max_steps", "6"]) == 0
    assert sum("another run" in str(warning.message) for warning in warned) == (2 if name == "classify" else 1)
    assert '"steps": 6' in (one / "metrics.json").read_text()
