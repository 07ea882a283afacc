from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastformer.data.pretraining.corpus as corpus_module
from fastformer.data.pretraining.corpus import default_corpus, document_of, split_sentences
from fastformer.data.pretraining.preparation import prepare_text
from fastformer.data.pretraining.python_documentation import prose_paragraphs, python_docstrings
from fastformer.data.pretraining.sources import open_sources, stream
from fastformer.data.pretraining.splitting import find_split_and_sample

# --- Sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Use e.g. Python, i.e. this, by Dr. Smith and J. Doe. Then stop.", None),
        (
            'He said "Stop." Then (he left.) It\'s 3.5 m long.',
            ['He said "Stop."', "Then (he left.)", "It's 3.5 m long."],
        ),
        ("See file.txt for more... and so on.", ["See file.txt for more... and so on."]),
        ("第一句。第二句！第三句", ["第一句。", "第二句！", "第三句"]),  # noqa: RUF001
        ("  \t ", []),
    ],
)
def test_split_sentences(text, sentences):
    if sentences is None:
        sentences = ["Use e.g. Python, i.e. this, by Dr. Smith and J. Doe.", "Then stop."]
    assert split_sentences(text) == sentences


@given(st.text(st.sampled_from("aA.!?)]\"' \n\u3002é1")))
def test_splitting_loses_nothing_but_white_space(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


# --- Python's documentation -------------------------------------------------------------------------------------------


def test_prose_only():
    text = """
A Heading
=========

Return the number of bytes that were
written to the file, well-
known to be small.

   >>> write(b"doctest in prose shall not stay")
   33

The options are as follows:

* the first one, which does nothing
* the second one, which
  does even less

+-------+--------+
| table | cell   |
+-------+--------+

    for line in file:
        if line: print(line.upper(), end="")

statement ::= "assert" expression that is a grammar

read(size, /) -> bytes of the file

str.join(iterable, /)
"""
    assert prose_paragraphs(text) == [
        "Return the number of bytes that were written to the file, well-known to be small.",
        "The options are as follows:",
        "the first one, which does nothing",
        "the second one, which does even less",
    ]


def test_docstrings_know_their_module_and_name():
    """Docstrings of functions, classes and methods, of modules in Python and in C, have the module and the name."""
    found = {(each.module, each.name): each.text for each in python_docstrings()}
    assert found["textwrap", "TextWrapper.fill"].startswith("fill(text : string)")
    assert found["textwrap", ""].startswith("Text wrapping and filling")
    assert found["math", ""].startswith("This module provides access to the mathematical functions")
    assert found["math", "sqrt"] == "Return the square root of x."
    assert found["itertools", "count"].startswith("Return a count object")
    assert "iter" in found["itertools", "chain.from_iterable"]


@pytest.fixture(scope="module")
def python_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return default_corpus(folder), folder


def test_default_corpus_is_real_english_without_repetition(python_corpus):
    documents, _ = python_corpus
    sentences = [sentence for document in documents for sentence in document]
    words = [word for sentence in sentences for word in sentence.split()]
    assert sum(map(len, sentences)) > 1_300_000
    assert len(set(sentences)) == len(sentences)
    assert all(len(document) > 1 for document in documents)
    # "the" makes up 5 to 7 % of the words of English running text; code and tables have none.
    assert 0.04 < sum(word.lower() == "the" for word in words) / len(words) < 0.1
    assert not any(">>>" in sentence or "::=" in sentence for sentence in sentences)


def test_default_corpus_is_the_same_in_another_process_and_imports_no_module_with_effects(python_corpus, tmp_path):
    documents, folder = python_corpus
    code = (
        "import sys; from fastformer.data.pretraining.corpus import default_corpus; default_corpus(sys.argv[1]); "
        "assert not {'this', 'antigravity', 'idlelib', 'turtle', 'readline', 'torch'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path)], check=True, env=environment)
    (here,) = folder.iterdir()
    (there,) = tmp_path.iterdir()
    assert (there.name, there.read_bytes()) == (here.name, here.read_bytes())
    assert default_corpus(folder) == documents


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-100], lambda whole: whole.replace(b"first", b"worst"), lambda _: b""]
)
def test_damaged_copy_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(
        corpus_module, "python_documentation", lambda: [["The first sentence. " * 9, f"And the {n}." * 9] for n in "ab"]
    )
    documents = default_corpus(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="damaged"):
        assert default_corpus(tmp_path) == documents
    assert path.read_bytes() == whole


def test_full_disk(tmp_path, monkeypatch, full_disk):
    monkeypatch.setattr(
        corpus_module, "python_documentation", lambda: [[f"Sentence number {n}. Yes." for n in range(10_000)]]
    )
    with full_disk(100_000), pytest.raises(OSError, match="python-documentation"):
        default_corpus(tmp_path)
    assert os.listdir(tmp_path) == []


# --- Files ------------------------------------------------------------------------------------------------------------

DOCUMENTS = [["One sentence.", "A second of it.", "And a third."], ["Ünïcode, \u2028 too."]]
TEXTS = ["One sentence. A second of it.\nAnd a third.", "Ünïcode, \u2028 too."]


def write_text(path):
    path.write_text("\n\n  \nOne sentence. A second of it.\r\nAnd a third.\n \n\nÜnïcode, too.\n", encoding="utf-8-sig")


def write_json_lines(path):
    path.write_text("\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in TEXTS) + "\n\n")


def write_parquet(path, column="text", texts=TEXTS):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), path)


def write_saved_dataset(path, column="text"):
    import datasets

    dataset = datasets.Dataset.from_dict({column: TEXTS})
    datasets.DatasetDict(train=dataset.select([0]), test=dataset.select([1])).save_to_disk(str(path))


def read(paths):
    """Return the documents of files and folders, each as its sentences."""
    return [document_of(text) for text in stream(open_sources(paths))]


EXPECTED = [DOCUMENTS[0], ["Ünïcode,", "too."]]


def test_text(tmp_path):
    write_text(tmp_path / "a.txt")
    assert read([tmp_path / "a.txt"]) == [DOCUMENTS[0], ["Ünïcode, too."]]


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", write_json_lines), ("a.parquet", write_parquet), ("a", write_saved_dataset)]
)
def test_records(tmp_path, name, write):
    write(tmp_path / name)
    # U+2028 separates lines, and so sentences; it does not separate JSON records.
    assert read([str(tmp_path / name)]) == EXPECTED


def test_folder_is_walked_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/z.txt", "b/a.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert read([tmp_path]) == [["a.txt"], ["b/a.txt"], ["b/z.txt"], ["c.txt"]]
    assert read([tmp_path / "c.txt", tmp_path / "a.txt"]) == [["c.txt"], ["a.txt"]]


def write_bytes(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        ("a.txt", None, FileNotFoundError, "no such file or folder: .*a.txt"),
        ("a.txt", write_bytes(b"abc\xff"), ValueError, "a.txt: not UTF-8 at byte 3"),
        ("a.docx", write_bytes(b"x"), ValueError, "a.docx: unknown suffix '.docx'; accepted are .txt"),
        ("folder", lambda path: path.mkdir(), ValueError, "folder is an empty folder"),
        ("a.jsonl", write_bytes(b'{"text": "a"}\n{"text": "b'), ValueError, "a.jsonl, line 2: not JSON"),
        ("a.jsonl", write_bytes(b'{"body": "a", "id": 1}'), ValueError, "line 1: no 'text' field; found body, id"),
        ("a.jsonl", write_bytes(b'["text"]'), ValueError, "line 1: expected a JSON object, found a list"),
        ("a.jsonl", write_bytes(b'{"text": 3}'), ValueError, "line 1: 'text' must be a string, got int"),
        ("a.jsonl", write_bytes(b'{"text": "\\ud800"}'), ValueError, "line 1: not valid Unicode"),
        ("a.parquet", write_bytes(b"PAR1 no more"), ValueError, "a.parquet is damaged or not parquet"),
        ("a.parquet", lambda p: write_parquet(p, "body"), ValueError, "a.parquet: no 'text' column; found id, body"),
        (
            "a.parquet",
            lambda p: write_parquet(p, texts=["a", None]),
            ValueError,
            "row 2: 'text' must be a string, got NoneType",
        ),
        ("a", lambda p: write_saved_dataset(p, "body"), ValueError, "a: no 'text' column; found body"),
    ],
)
def test_bad_files(tmp_path, name, write, error, message):
    if write is not None:
        write(tmp_path / name)
    with pytest.raises(error, match=message):
        read([tmp_path / name])


def test_files_without_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" \n\n ")
    sources = open_sources([tmp_path / "a.txt"])
    with pytest.raises(ValueError, match=r"corpus is empty: no text in .*a\.txt"):
        prepare_text(sources, tmp_path / "cache", "mlm", vocab_size=300, heldout_fraction=0.1)


@pytest.mark.parametrize("writer", [write_parquet, write_saved_dataset])
def test_files_cut_short(tmp_path, writer):
    path = tmp_path / ("data.parquet" if writer is write_parquet else "data")
    writer(path)
    file = path if path.is_file() else next(path.glob("train/*.arrow"))
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])
    with pytest.raises(ValueError, match=str(path)):
        read([path])


def test_bad_paths():
    with pytest.raises(ValueError, match="paths is empty"):
        read([])
    with pytest.raises(TypeError, match=r"must be a list of paths, got the single path 'a.txt'"):
        read("a.txt")


# --- Splitting --------------------------------------------------------------------------------------------------------


def split(documents, fraction):
    """Return the training and the held-out documents."""
    rule, _ = find_split_and_sample(("\n".join(document) for document in documents), fraction)
    heldout = [rule.is_heldout("\n".join(document)) for document in documents]
    return [[each for each, out in zip(documents, heldout, strict=True) if out == side] for side in (False, True)]


document_lists = st.lists(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3), min_size=2, max_size=40)


@given(document_lists, st.floats(0.01, 0.99), st.randoms())
def test_split(documents, fraction, random):
    def key(document):  # white space does not count
        return "".join("".join(document).split())

    distinct = set(map(key, documents))
    if len(distinct) < 2:
        with pytest.raises(ValueError, match="leaves nothing to train on"):
            split(documents, fraction)
        return
    train, heldout = split(documents, fraction)
    train_set, heldout_set = (set(map(key, part)) for part in (train, heldout))
    assert train_set and heldout_set
    assert not train_set & heldout_set
    assert sorted(train + heldout) == sorted(documents)
    assert len(heldout_set) == min(max(1, int(fraction * len(distinct) + 0.5)), len(distinct) - 1)
    assert [document for document in documents if key(document) in train_set] == train

    shuffled = random.sample(documents, len(documents))
    assert set(map(key, split(shuffled, fraction)[1])) == heldout_set


def test_split_takes_documents_at_random():
    documents = [[hashlib.md5(bytes([n])).hexdigest() * (n + 1)] for n in range(200)]
    _, heldout = split(documents, 0.5)
    lengths = sorted(len(document[0]) for document in heldout)
    # The mean rank of 100 of 200 drawn without replacement has the standard deviation sqrt(100 * 201 / 12) / 10 = 4.1.
    assert abs(sum(lengths) / 100 / 32 - 100.5) < 5 * 4.1


def test_split_bounds():
    assert split([["a"]], 0) == [[["a"]], []]
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"heldout_fraction must be in \[0, 1\)"):
            split([["a"], ["b"]], fraction)
