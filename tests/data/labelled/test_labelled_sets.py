"""Labelled sets, default and fetched, have sensible content, are split without leaks, and are checked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastformer import cli
from fastformer.data.labelled import defaults, fetch, readers, sets
from fastformer.data.labelled.catalogues import english_number, german_number, number_translations, read_catalogue
from fastformer.data.labelled.examples import SourceTarget
from fastformer.data.pretraining import sources
from fastformer.data.pretraining.python_documentation import Docstring


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Return a cache folder with the documentation of this Python."""
    folder = str(tmp_path_factory.mktemp("cache"))
    defaults.docstrings(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in sets.DEFAULT_SETS.values() if name != "messages"])
def test_defaults_are_split_without_a_leak(cache, name, monkeypatch):
    documents = Counter()
    split_by = defaults.split_by

    def counting(examples, document):
        examples = list(examples)
        documents.update(map(document, examples))
        return split_by(examples, document)

    splits = sets.load_set(name, cache)
    monkeypatch.setattr(defaults, "split_by", counting)
    assert sets.load_set(name, cache) == splits
    sizes = [len(part) for part in splits]
    assert sum(sizes) == documents.total() > 1500
    # Each document goes as a whole to one side; validation and test get a tenth each. Documents have other sizes in
    # other versions of Python.
    deviation = (0.1 * 0.9 * sum(size**2 for size in documents.values())) ** 0.5
    assert all(abs(size - 0.1 * sum(sizes)) < 4 * deviation for size in sizes[1:])
    texts = [{"".join(str(part) for part in example).replace(" ", "") for example in of_split} for of_split in splits]
    assert sum(map(len, texts)) == len(set.union(*texts)) == sum(sizes)


def test_what_the_defaults_hold(cache):
    for question in sets.load_set("python-questions", cache).train:
        (answer,) = question.answers
        assert question.context[answer.start :].startswith(answer.text)
        assert answer.text.strip() == answer.text
    contexts = [{question.context for question in part} for part in sets.load_set("python-questions", cache)]
    assert not contexts[0] & contexts[1] and not contexts[0] & contexts[2] and not contexts[1] & contexts[2]
    classes = Counter(example.label for example in sets.load_set("python-classes", cache).train)
    assert len(classes) == 8
    assert min(classes.values()) > 0.3 * sum(classes.values()) / 8
    for tagged in sets.load_set("python-tags", cache).train:
        assert len(tagged.words) == len(tagged.tags)
        assert "B-CODE" in tagged.tags
        assert "`" not in tagged.words
    for pair in sets.load_set("python-summaries", cache).train:
        assert "\n" not in pair.target and len(pair.source.split()) >= 8


def test_no_source_is_on_two_sides(cache):
    """No held-out text is in the training text, neither whole nor as a part of a longer one."""

    def said(question) -> set[str]:
        return {line.partition(": ")[2] for line in question.context.splitlines()}

    sources = {
        "python-questions": lambda question: said(question) | {question.question + question.answers[0].text},
        "python-summaries": lambda pair: {pair.source, pair.target},
        "python-similar": lambda pair: {pair.anchor, pair.positive},
        "python-conversations": lambda talk: {message.content for message in talk.messages},
        "python-classes": lambda classified: {classified.text},
        "python-tags": lambda tagged: {" ".join(tagged.words)},
    }
    for name, of in sources.items():
        train, validation, test = (set().union(*map(of, part)) for part in sets.load_set(name, cache))
        assert not train & test and not train & validation and not validation & test, name


def test_messages_that_differ_in_case_and_punctuation_are_on_one_side():
    pairs = [
        SourceTarget(f"{start} {n}{end}", "x") for n in range(200) for start in ("open", "Open") for end in ("", "...")
    ]
    train, validation, test = (
        {pair.source.lower().rstrip(".") for pair in part} for part in defaults.split_messages(pairs)
    )
    assert validation and test and not train & test and not train & validation and not validation & test


def test_questions_name_one_of_the_neighbours():
    members = [
        Docstring("m", "first", "Return the number of bytes. It is a number."),
        Docstring("m", "second", "Return a list of all names. Raise ValueError if the file is not open at all."),
        Docstring("m", "third", "Return nothing much here. But it may return other things. Returns all of the rest."),
    ]
    found = {question.question: question.answers[0].text for question in defaults._questions(members)}
    assert found == {
        "What does first return?": "the number of bytes",
        "What does second return?": "a list of all names",
        "When does second raise ValueError?": "the file is not open at all",
    }


def test_tags_are_where_the_marks_were():
    words, tags = defaults._tagged('Call :func:`os.path.join` or ``x[1]`` with "care".', quotes_are_code=False)
    assert " ".join(words) == 'Call os.path.join or x [ 1 ] with " care " .'
    assert [word for word, tag in zip(words, tags, strict=True) if tag != "O"] == ["os.path.join", "x", "[", "1", "]"]
    assert tags.count("B-CODE") == 2
    assert defaults._tagged("Nothing is marked.", quotes_are_code=False).tags is None


def test_damaged_docstrings_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "python_docstrings", lambda: iter([Docstring("m", "f", "Text.")] * 2))
    expected = defaults.docstrings(tmp_path)
    assert len(expected) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(b"Text", b"Test"))
    with pytest.warns(UserWarning, match="damaged"):
        assert defaults.docstrings(tmp_path) == expected


# --- Catalogues -------------------------------------------------------------------------------------------------------


def catalogue(messages: dict[str, str], encoding: str = "utf-8", order: str = "<") -> bytes:
    """Return a ``.mo`` file as msgfmt writes it."""
    header = f"Content-Type: text/plain; charset={encoding}\n"
    items = sorted((k.encode(encoding), v.encode(encoding)) for k, v in {"": header, **messages}.items())
    texts, tables = b"", [b"", b""]
    start = 28 + 16 * len(items)
    for column in (0, 1):
        for item in items:
            tables[column] += struct.pack(f"{order}2I", len(item[column]), start + len(texts))
            texts += item[column] + b"\0"
    return (
        struct.pack(f"{order}7I", 0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, 0) + b"".join(tables) + texts
    )


MESSAGES = {
    "ja": {"That page number is not an integer": "このページ番号は整数ではありません。"},
    "zh_Hans": {"No match was found": "未找到匹配项"},
    "ar": {"No match was found": "لم يتم العثور على تطابق"},
    "he": {"No match was found": "לא נמצאה התאמה"},
}


@pytest.mark.parametrize("language", MESSAGES)
@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues(language, order):
    found = read_catalogue(catalogue(MESSAGES[language], order=order), "x.mo")
    assert {pair.source: pair.target for pair in found} == MESSAGES[language]


def test_only_running_text_is_kept():
    messages = {
        "Word": "Wort",
        "Open _file now": "_Datei jetzt öffnen",
        "menu\x04Save the file": "Datei sichern",
        "One file is here\0Some files are here": "Eine Datei ist hier\0Einige Dateien sind hier",
        "Two lines\nof text": "Zwei Zeilen\nText",
        "Not translated yet": "",
        "Same in both": "Same in both",
    }
    found = read_catalogue(catalogue(messages, "iso-8859-1"), "x.mo")
    assert {pair.source: pair.target for pair in found} == {
        "Open file now": "Datei jetzt öffnen",
        "Save the file": "Datei sichern",
        "One file is here": "Eine Datei ist hier",
    }


@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: b"PK" + c, lambda c: c[:10], lambda c: b""])
def test_damaged_catalogue(damage):
    with pytest.raises(ValueError, match=r"x.mo is not a whole gettext catalogue"):
        read_catalogue(damage(catalogue(MESSAGES["ja"])), "x.mo")


def test_numbers_need_no_catalogue(monkeypatch):
    assert [english_number(n) for n in (0, 21, 100, 312, 1000, 2005, 9999)] == [
        *("zero", "twenty-one", "one hundred", "three hundred and twelve", "one thousand", "two thousand and five"),
        "nine thousand nine hundred and ninety-nine",
    ]
    assert [german_number(n) for n in (0, 1, 21, 101, 312, 1001, 1217)] == [
        *("null", "eins", "einundzwanzig", "einhunderteins", "dreihundertzwölf", "eintausendeins"),
        "eintausendzweihundertsiebzehn",
    ]
    assert len({pair.target for pair in number_translations()}) == 10_000
    monkeypatch.setattr(defaults, "installed_catalogues", lambda language: [])
    assert sum(map(len, defaults.default_translations())) == 10_000
    with pytest.raises(FileNotFoundError, match="no gettext catalogue of 'ja'"):
        defaults.default_translations("ja")


# --- Fetched ----------------------------------------------------------------------------------------------------------


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sentiment_package() -> bytes:
    lines = "".join(f"{n // 3}_{n % 3}\t{(n - 30) / 10}\tSentence number {n}.\r\n" for n in range(60))
    files = {f"hutto_ICWSM_2014/{file}_GroundTruth.txt": f"{file}\n".encode() for file in ("x",)} | {
        f"hutto_ICWSM_2014/{file}_GroundTruth.txt": lines.replace("Sentence", file).encode()
        for file in fetch._SENTIMENT_FILES.values()
    }
    root = "vaderSentiment-3.3.2"
    return tar({f"{root}/LICENSE.txt": b"MIT", f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz": tar(files)})


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("django-5.2.8.dist-info/licenses/LICENSE", "BSD")
        for language, messages in MESSAGES.items():
            archive.writestr(f"django/conf/locale/{language}/LC_MESSAGES/django.mo", catalogue(messages))
        archive.writestr("django/conf/locale/xx/LC_MESSAGES/django.mo", b"damaged")
    return buffer.getvalue()


@pytest.fixture
def registry(monkeypatch):
    """Replace pip by a download that is made here, with the checksum that is known for it."""
    contents = {"vader-sentiment": sentiment_package(), "django-messages": wheel()}
    known = {
        name: replace(fetch.PACKAGES[name], sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    asked = []

    def run(command, **arguments):
        asked.append(command)
        assert "--require-hashes" in command
        with open(command[-1]) as requirements:
            (line,) = requirements
        name = next(n for n in contents if line == f"{known[n].requirement} --hash=sha256:{known[n].sha256}\n")
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "file").write_bytes(contents[name])
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("fastformer.commands.data.PACKAGES", {**fetch.PACKAGES, **known})
    return contents, asked


def test_sentiment_is_fetched_shown_and_split(tmp_path, registry, capsys):
    arguments = ["--cache_dir", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="fetch it with `fastformer data fetch vader-sentiment`"):
        sets.sentiment(str(tmp_path))
    assert cli.main(["data", "fetch", "vader-sentiment", *arguments]) == 0
    output = capsys.readouterr().out
    assert "licence MIT" in output and "verified" in output
    assert cli.main(["data", "fetch", "vader-sentiment", *arguments]) == 0
    assert len(registry[1]) == 1  # the second time, the download is already here
    splits = sets.sentiment(str(tmp_path))
    everything = [example for part in splits for example in part]
    assert len(everything) == 240
    assert Counter(example.label for example in everything) == {
        "negative": 4 * 26,
        "neutral": 4 * 9,
        "positive": 4 * 25,
    }
    assert {e.label for part in sets.sentiment(str(tmp_path), ("film",), 2) for e in part} == {"negative", "positive"}

    def documents(part):
        return {(e.text.split()[0], int(e.text.split()[-1][:-1]) // 3) for e in part}

    assert not documents(splits.train) & documents(splits.test)


def test_messages_are_fetched(tmp_path, registry, capsys):
    arguments = ["--cache_dir", str(tmp_path)]
    assert cli.main(["data", "fetch", "django-messages", *arguments]) == 0
    assert "languages: ar he ja zh_Hans" in capsys.readouterr().out
    for language, expected in MESSAGES.items():
        found = [pair for part in sets.messages("django-messages", language, str(tmp_path)) for pair in part]
        assert {pair.source: pair.target for pair in found} == expected
    assert cli.main(["data", "show", "django-messages", "--language", "xx", *arguments]) == 2
    assert "has no 'xx'; it has ar, he, ja, zh_Hans" in capsys.readouterr().err


def test_what_was_changed_is_not_taken(tmp_path, registry, capsys):
    contents, _ = registry
    arguments = ["fetch", "django-messages", "--cache_dir", str(tmp_path)]
    whole, contents["django-messages"] = contents["django-messages"], b"PK other"
    assert cli.main(["data", *arguments]) == 2
    assert "is not the expected file: SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "sets").exists()
    contents["django-messages"] = whole
    assert cli.main(["data", *arguments]) == 0
    kept = fetch.set_folder("django-messages", str(tmp_path)) / "ja.jsonl"
    before = kept.read_bytes()
    kept.write_bytes(before[:-3])
    with pytest.raises(ValueError, match=r"damaged.*fetches it again"):
        sets.messages("django-messages", "ja", str(tmp_path))
    assert cli.main(["data", *arguments]) == 0
    assert kept.read_bytes() == before


def test_no_code_of_an_unknown_file_is_run(tmp_path, monkeypatch, capsys):
    """pip builds a source distribution to learn its name, which runs code.

    So an unknown file is refused before that.
    """
    ran = tmp_path / "ran"
    setup = (
        f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='vaderSentiment', version='3.3.2')"
    )
    files = {"setup.py": setup.encode(), "PKG-INFO": b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n"}
    registry = tmp_path / "registry"
    registry.mkdir()
    archive = tar({f"vaderSentiment-3.3.2/{name}": content for name, content in files.items()})
    (registry / "vaderSentiment-3.3.2.tar.gz").write_bytes(archive)
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(registry), "NO_BUILD_ISOLATION": "1", "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert cli.main(["data", "fetch", "vader-sentiment", "--cache_dir", str(tmp_path / "cache")]) == 2
    assert "vaderSentiment==3.3.2 is not the expected file" in capsys.readouterr().err
    assert not ran.exists()


def test_pip_that_fails(tmp_path, monkeypatch, capsys):
    done = type("Done", (), {"returncode": 1, "stderr": "no network"})
    monkeypatch.setattr("subprocess.run", lambda *arguments, **named: done)
    assert cli.main(["data", "fetch", "sphinx-messages", "--cache_dir", str(tmp_path)]) == 2
    assert "pip could not download Sphinx==8.1.3: no network" in capsys.readouterr().err


def test_list_and_show(cache, capsys):
    assert cli.main(["data", "list", "--json", "--cache_dir", cache]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in rows if row["default"]} == set(sets.DEFAULT_SETS)
    assert not any(row["here"] for row in rows if row["name"] in fetch.PACKAGES)
    assert cli.main(["data", "show", "python-questions", "--json", "--count", "2", "--cache_dir", cache]) == 0
    first, _ = map(json.loads, capsys.readouterr().out.splitlines())
    answer = first["answers"][0]
    assert first["context"][answer["start"] :].startswith(answer["text"])
    for arguments, message in (
        (["show", "nothing"], "there is no set 'nothing'; there are python-classes"),
        (["fetch", "python-tags"], "python-tags needs no fetching"),
        (["show", "python-tags", "--count", "0"], "--count must be at least 1"),
    ):
        assert cli.main(["data", *arguments, "--cache_dir", cache]) == 2
        assert message in capsys.readouterr().err


def test_a_split_is_written_to_train_on(cache, tmp_path, capsys):
    path = tmp_path / "new" / "test.jsonl"
    arguments = ["python-classes", "--split", "test", "--out", str(path), "--cache_dir", cache]
    assert cli.main(["data", "export", *arguments]) == 0
    expected = sets.load_set("python-classes", cache).test
    assert f"{len(expected):,} examples" in capsys.readouterr().out
    assert readers.read_classification(path) == expected
    path.write_text("precious")
    assert cli.main(["data", "export", *arguments]) == 2
    assert "already exists: replace it with --overwrite" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert cli.main(["data", "export", *arguments, "--overwrite"]) == 0
    assert readers.read_classification(path) == expected
    assert list(sources.stream(sources.open_sources([path]))) == [example.text for example in expected]
