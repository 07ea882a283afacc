"""Any part of the cache may be damaged in any way: one line says it, and the rebuilt part equals the old one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from fastformer.data.pretraining import splitting
from fastformer.data.pretraining.preparation import prepare_text
from fastformer.data.pretraining.sources import texts_source
from fastformer.data.pretraining.splitting import find_split_and_sample
from fastformer.data.pretraining.store import MANIFEST, DocumentLayout, TokenStore
from fastformer.files import write_checked

TEXTS = [f"document {number} has these words\nand some more words" for number in range(60)]


def test_the_text_is_read_once_for_the_tokenizer_and_once_for_the_tokens(tmp_path: Path) -> None:
    texts, read = texts_source(TEXTS, "texts"), []

    def reading(start: int) -> Iterator[tuple[str, int]]:
        for text, position in texts.read(start):
            read.append(text)
            yield text, position

    text = prepare_text([replace(texts, read=reading)], tmp_path, "clm", vocab_size=300, heldout_fraction=0.1)
    assert read == TEXTS
    read.clear()
    train, heldout = text.stores(DocumentLayout(text.tokenizer, mark_ends=True))
    assert read == TEXTS
    assert heldout is not None
    assert train.corpus.num_documents + heldout.corpus.num_documents == len(TEXTS)


def test_a_large_text_is_sampled_by_its_highest_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} " * 40 for number in range(400)]
    monkeypatch.setattr(splitting, "_TOKENIZER_TRAINING_CHARACTERS", 9000)
    split, sample = find_split_and_sample(texts, 0.1)
    assert sample == [text for text in texts if split.is_sampled(text)]
    assert 4500 < sum(map(len, sample)) < 13_500


class Prepared(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    train: TokenStore
    heldout: TokenStore | None


def prepare(folder: Path) -> Prepared:
    text = prepare_text([texts_source(TEXTS, "texts")], folder, "clm", vocab_size=300, heldout_fraction=0.1)
    return Prepared(text.tokenizer, *text.stores(DocumentLayout(text.tokenizer, mark_ends=True), verify=True))


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
    """Write JSON that is nested too deeply to be read, with a correct checksum if the file has one."""
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
    with pytest.warns(UserWarning, match=r"damaged.*(rebuilt|again)"):
        again = prepare(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = prepare(whole)
        prepare(folder)
    assert damaged.read_bytes() == before
    assert again.tokenizer.backend_tokenizer.to_str() == expected.tokenizer.backend_tokenizer.to_str()
    assert again.train.fingerprint == expected.train.fingerprint
