"""Whatever of the cache is damaged, in whatever way: one line says so, and what is made anew is the same."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastformer.data.pretraining.preparation import PreparedCorpus, prepare_corpus
from fastformer.data.pretraining.sources import texts_source
from fastformer.data.pretraining.store import MANIFEST, DocumentLayout
from fastformer.files import write_checked

TEXTS = [f"document {number} has these words\nand some more words" for number in range(60)]


def prepare(folder: Path) -> PreparedCorpus:
    return prepare_corpus(
        [texts_source(TEXTS, "texts")],
        folder,
        "clm",
        lambda tokenizer: DocumentLayout(tokenizer, mark_ends=True),
        vocab_size=300,
        heldout_fraction=0.1,
        verify=True,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    prepare(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_digit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = max(place for place, byte in enumerate(content) if chr(byte).isdigit())
    content[place] = ord("1") if content[place] != ord("1") else ord("2")
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00" * 99)


def nest(path: Path) -> None:
    """JSON deeper than can be read, with a checksum that is right where the file has one."""
    deep = b"[" * 100_000
    path.write_bytes(deep) if path.name == MANIFEST else write_checked(path, deep)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("")


FILES = ("split.json", "tokenizer.json", "tokenizer_config.json", "checksums.json", MANIFEST, "ids.npy")


@pytest.mark.parametrize("damage", [cut, change_a_digit, empty, nest, make_garbage, make_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_made_anew(name: str, damage: Callable[[Path], None], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    damaged = sorted(folder.rglob(name))[0]
    before = damaged.read_bytes()
    damage(damaged)
    with pytest.warns(UserWarning, match=r"damaged.*anew"):
        again = prepare(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = prepare(whole)
        prepare(folder)
    assert damaged.read_bytes() == before
    assert again.tokenizer.backend_tokenizer.to_str() == expected.tokenizer.backend_tokenizer.to_str()
    assert again.train.fingerprint == expected.train.fingerprint
