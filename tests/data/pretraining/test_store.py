"""Tests of the token store: its content, how a killed build continues, and how damage is detected."""

from __future__ import annotations

import json
import os
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastformer.data.pretraining.sources import Source, open_sources, texts_source
from fastformer.data.pretraining.store import (
    DocumentLayout,
    SentenceLayout,
    TokenStore,
    _chunks,
    _Place,
    load_or_build_store,
)
from fastformer.data.pretraining.tokenized import tokenize
from fastformer.data.pretraining.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    return ["\n".join(document) for document in documents]


@pytest.fixture(scope="module")
def causal(texts):
    return train_tokenizer(texts, 400, "clm")


def build(path, texts, tokenizer, layout="sentences", **arguments) -> TokenStore:
    made = SentenceLayout(tokenizer) if layout == "sentences" else DocumentLayout(tokenizer, mark_ends=True)
    return load_or_build_store(path, [texts_source(texts, "texts")], made, block_characters=2000, **arguments)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.quick
def test_sentences_are_those_of_the_corpus_in_memory(tmp_path, texts, tokenizer, corpus):
    store = build(tmp_path / "store", texts, tokenizer)
    assert store.num_blocks > 5
    assert isinstance(store.corpus.ids, np.memmap)
    assert store.corpus.ids.dtype == np.uint16
    for name in ("ids", "opening_offsets", "following_offsets", "document_offsets"):
        assert np.array_equal(getattr(store.corpus, name), getattr(corpus, name)), name
    block = store.block(2)
    first = store.block_documents[2]
    begin = corpus.document_offsets[first]
    assert np.array_equal(
        block.document_offsets, corpus.document_offsets[first : first + block.num_documents + 1] - begin
    )
    assert np.array_equal(block.segment(range(2)), corpus.segment(range(begin, begin + 2)))


def test_documents_begin_and_end_with_their_tokens(tmp_path, texts, causal):
    store = build(tmp_path / "store", [" ", *texts, ""], causal, "documents")
    offsets = store.corpus.document_offsets
    assert store.corpus.num_documents == len(texts)
    for text, begin, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        expected = [causal.bos_token_id, *causal(text, add_special_tokens=False).input_ids, causal.eos_token_id]
        assert store.corpus.ids[begin:end].tolist() == expected


def test_documents_to_keep(tmp_path, texts, tokenizer):
    kept = texts[::3]
    store = build(tmp_path / "store", texts, tokenizer, keep=set(kept).__contains__)
    expected = tokenize([text.split("\n") for text in kept], tokenizer)
    assert np.array_equal(store.corpus.ids, expected.ids)
    with pytest.raises(ValueError, match="the corpus is empty"):
        build(tmp_path / "none", texts, tokenizer, keep=lambda text: False)


# --- Killed and damaged -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_building_goes_on_wherever_it_stopped(tmp_path, texts, tokenizer, monkeypatch):
    """A build that is killed again and again at a write to the disk continues. No finished part is tokenized twice."""
    whole = build(tmp_path / "whole", texts, tokenizer)
    expected = contents(whole.path)
    replace, encoded = os.replace, []
    encode = SentenceLayout.encode
    monkeypatch.setattr(SentenceLayout, "encode", lambda layout, t: encoded.append(t) or encode(layout, t))
    path = tmp_path / "killed"
    attempts = 0
    while not path.exists():
        left = [2]

        def after_two(source, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", after_two)
        attempts += 1
        try:
            build(path, texts, tokenizer)
        except Killed:
            assert not path.exists()
    assert attempts > 3
    assert contents(path) == expected
    assert [text for chunk in encoded for text in chunk][-len(encoded[-1]) :] == texts[-len(encoded[-1]) :]
    assert len(encoded) < whole.num_blocks + attempts  # only the part that was being written is tokenized again
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("killed")) == [
        "killed",
        "killed.lock",
    ]


def test_killed_processes(tmp_path, texts, causal):
    """A build that is killed by SIGKILL several times, each time later, is completed."""
    (tmp_path / "text.txt").write_text("\n\n".join(texts * 8))
    layout, sources = DocumentLayout(causal, mark_ends=True), open_sources([tmp_path / "text.txt"])

    def build_here(name: str) -> TokenStore:
        return load_or_build_store(tmp_path / name, sources, layout, block_characters=3000)

    delay, kills = 0.02, 0
    while not (tmp_path / "killed").exists():
        if (child := os.fork()) == 0:
            build_here("killed")
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        delay *= 2
    assert kills > 1
    assert contents(tmp_path / "killed") == contents(build_here("whole").path)


def test_a_damaged_part_and_other_text_are_tokenized_again(tmp_path, texts, tokenizer, monkeypatch):
    expected = contents(build(tmp_path / "whole", texts, tokenizer).path)
    monkeypatch.setattr("fastformer.data.pretraining.store._assemble", lambda *arguments: (_ for _ in ()).throw(Killed))
    for source in (texts[::-1], texts):
        with pytest.raises(Killed):
            build(tmp_path / "killed", source, tokenizer)
    part = tmp_path / "killed.building" / "000003.npz"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    monkeypatch.undo()
    build(tmp_path / "killed", texts, tokenizer)
    assert contents(tmp_path / "killed") == expected


@pytest.mark.parametrize("file", ["ids.npy", "following_offsets.npy", "store.json"])
@pytest.mark.parametrize("damage", ["cut short", "changed", "absent"])
def test_damage_is_noticed_and_made_good(tmp_path, texts, tokenizer, file, damage):
    path = build(tmp_path / "store", texts, tokenizer).path
    whole = contents(path)
    content = bytearray(whole[file])
    content[len(content) // 2] ^= 1
    if damage == "absent":
        (path / file).unlink()
    else:
        (path / file).write_bytes(content if damage == "changed" else content[:-1])
    with pytest.raises(ValueError, match="damaged"):
        TokenStore(path, verify=True)
    if damage != "changed":
        with pytest.raises(ValueError, match="damaged"):
            TokenStore(path)
    with pytest.warns(UserWarning, match=r"damaged.*it is rebuilt"):
        build(path, texts, tokenizer, verify=True)
    assert contents(path) == whole


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no token store at"):
        TokenStore(tmp_path / "none")


def test_full_disk(tmp_path, texts, tokenizer, full_disk):
    with full_disk(10_000), pytest.raises(OSError, match=r"File too large|No space"):
        build(tmp_path / "store", texts, tokenizer)
    assert not (tmp_path / "store").exists()
    assert build(tmp_path / "store", texts, tokenizer).num_blocks > 5


# --- Memory and sources -----------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_text(tmp_path, texts, causal):
    layout = DocumentLayout(causal, mark_ends=True)

    def peak(copies: int) -> int:
        def read(start):
            for position in range(start, copies * len(texts)):
                yield texts[position % len(texts)], position + 1

        tracemalloc.start()
        load_or_build_store(
            tmp_path / str(copies), [Source("text", str(copies), read)], layout, block_characters=20_000
        )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(1)
    assert peak(20) < 1.2 * peak(5)


def write_sources(folder: Path, texts: list[str]) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    (folder / "a.txt").write_text("\ufeff" + "\r\n\n\n".join(texts) + "\n", encoding="utf-8")
    (folder / "b.jsonl").write_text("\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "c.parquet", row_group_size=2)
    datasets.Dataset.from_dict({"text": texts, "id": range(len(texts))}).save_to_disk(str(folder / "d"))


TEXTS = ["First.", "Sécond \u2028 one,\nof two lines.", "第三。", "Fourth.", "Fifth and last."]


def test_every_source_goes_on_from_every_position(tmp_path):
    import datasets

    write_sources(tmp_path, TEXTS)
    data = datasets.Dataset.from_dict({"text": TEXTS})
    sources = open_sources([tmp_path, data, datasets.DatasetDict(train=data)])
    assert len(sources) == 6
    for source in sources:
        whole = list(source.read(0))
        assert [text for text, _ in whole] == TEXTS
        for number, (_, position) in enumerate(whole, start=1):
            assert list(source.read(position)) == whole[number:]


def test_error_in_a_line_after_the_start_names_that_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"body": "c"}\n')
    (source,) = open_sources([tmp_path / "a.jsonl"])
    (_, position), *_ = [next(source.read(0))]
    with pytest.raises(ValueError, match="line 3: no 'text' field; found body"):
        list(source.read(position))


def test_what_is_no_source():
    with pytest.raises(TypeError, match=r"data must be paths, datasets.Dataset or DatasetDict; got int"):
        open_sources([3])


def test_many_short_documents_take_no_longer_each(tmp_path):
    """100,000 short documents take under a second.

    If each cost as much as its block is long, they would take minutes.
    """
    texts = ["a b"] * 100_000
    begin = time.process_time()
    chunks = list(_chunks([texts_source(texts, "texts")], {tmp_path: _Place(0, 0)}, {tmp_path: bool}, 1 << 24))
    assert time.process_time() - begin < 10
    assert [len(found) for _, found, _ in chunks] == [100_000]
