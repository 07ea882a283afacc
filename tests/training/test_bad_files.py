"""Every command that reads data is given every kind of bad file: one line says which file, where, and what is wrong.

The tests make each bad file from a good one. They change its bytes, break the rules of its format, or spoil one field
of a record.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from lightning.pytorch import Trainer
from training.tasks import MAKERS

from fastformer import cli
from fastformer.commands import finetune, pretrain

JSON_LINES, PARQUET, TABLES = (".jsonl",), (".parquet",), (".csv", ".tsv")


class Command(NamedTuple):
    """A command that reads records.

    Attributes:
        arguments: those before the file's path, and those behind it.
        row: a record that the command accepts.
        must_be_there: fields that a record must have.
        anything: fields in which the command accepts any value.
        suffixes: the suffixes of the files with records.
    """

    arguments: tuple[list[str], list[str]]
    row: dict[str, Any]
    must_be_there: tuple[str, ...]
    anything: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (*JSON_LINES, *PARQUET)


TARGETS = {"label", "tags", "answers", "summary", "de"}
JUDGED: dict[str, dict[str, Any]] = {
    "classify": {"prediction": "a", "reference": "b"},
    "tag": {"prediction": ["O"], "reference": ["O"]},
    "qa": {"prediction": "a", "references": ["a"]},
    "summarize": {"prediction": "a", "reference": "a"},
    "translate": {"prediction": "a", "reference": "a"},
    "generate": {"log_likelihood": -1.5, "tokens": 3},
    "embed": {"embedding": [1.0], "positive": [2.0]},
}


def commands() -> dict[str, Command]:
    """Return the commands by name. ``{folder}`` stands for a folder that belongs to the test."""
    output, cached = ["--output", "{folder}/run"], ["--cache_dir", "{folder}/cache"]
    found = {
        "pretrain": Command(
            (["pretrain", "--data"], [*output, "--accelerator", "cpu", "--cache_dir", "{folder}/cache"]),
            {"text": "Some words. And more."},
            ("text",),
        ),
        "generate": Command((["generate", "{folder}/none", "--prompts"], []), {"prompt": "a"}, ("prompt",)),
    }
    found["generate"] = found["generate"]._replace(suffixes=JSON_LINES)
    for task, make in MAKERS.items():
        row = make(random.Random(0))
        row = row.get("translation", row)
        tables = TABLES if all(isinstance(value, str) for value in row.values()) and task != "generate" else ()
        suffixes = (*JSON_LINES, *PARQUET, *tables)
        found[f"finetune {task}"] = Command(
            (["finetune", task, "--data"], [*output, *cached]), row, tuple(row), ("id",), suffixes
        )
        inputs = tuple(name for name in row if name not in TARGETS)
        run, out = f"{{folder}}/{task}", "{folder}/out.jsonl"
        found[f"predict {task}"] = Command((["predict", run, "--data"], ["--out", out]), row, inputs, ("id",), suffixes)
        judged = JUDGED[task]
        found[f"evaluate {task}"] = Command((["evaluate"], ["--task", task]), judged, tuple(judged))
    return found


COMMANDS = commands()

# --- Kinds ------------------------------------------------------------------------------------------------------------

Bad = tuple[str, Callable[[Path], Any], str]
"""The kind of fault, the function that makes the file, and a pattern of the place that the error must name."""

LINE, ROW, WHOLE = r", line 2\b", r", row 2\b", ""


def of_bytes(good: bytes) -> Iterator[Bad]:
    """Yield bad files of any format."""
    yield "missing", lambda path: None, WHOLE
    yield "folder", lambda path: path.mkdir(), WHOLE
    yield "pipe", lambda path: os.mkfifo(path), WHOLE
    yield "link to itself", lambda path: path.symlink_to(path), WHOLE
    yield "empty", lambda path: path.touch(), WHOLE
    yield "blank", lambda path: path.write_bytes(b" \n\n"), WHOLE
    yield "random bytes", lambda path: path.write_bytes(random.Random(0).randbytes(999)), WHOLE
    yield "zeros", lambda path: path.write_bytes(bytes(999)), WHOLE
    yield "UTF-16", lambda path: path.write_bytes(good.decode("latin-1").encode("utf-16")), WHOLE
    yield "no suffix", lambda path: path.write_bytes(good), WHOLE


def of_json_lines(row: dict[str, Any]) -> Iterator[Bad]:
    line = json.dumps(row)
    lines = {
        "not JSON": line[:-1],
        "two on a line": line + line,
        "list": f"[{line}]",
        "number": "7",
        "deep": '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "half a surrogate pair": line.replace("{", '{"x": "\\ud800", ', 1),
        "long number": '{"x": ' + "9" * 5000 + "}",
        "twice the same name": line.replace("{", '{"x": 1, "x": 2, ', 1),
    }
    for kind, bad in lines.items():
        yield kind, lambda path, bad=bad: path.write_text(f"{line}\n{bad}\n{line}\n"), LINE
    yield "not UTF-8", lambda path: path.write_bytes(f"{line}\n".encode() + b'{"x": "\xe9"}'), LINE


def of_tables(row: dict[str, Any], between: str) -> Iterator[Bad]:
    head, line = between.join(row), between.join(row.values())
    yield "a column more", lambda path: path.write_text(f"{head}\n{line}{between}x\n"), LINE
    yield "a column less", lambda path: path.write_text(f"{head}\nx\n"), LINE
    yield "no row", lambda path: path.write_text(f"{head}\n"), WHOLE
    yield "twice the same name", lambda path: path.write_text(f"{head}{between}{head}\n"), r", line 1\b"
    yield "not UTF-8", lambda path: path.write_bytes(f"{head}\n".encode() + b"\xe9" + line.encode()), LINE
    if between == ",":
        yield "open quote", lambda path: path.write_text(f'{head}\n"{line}\n{line}\n'), LINE


def of_parquet(good: bytes) -> Iterator[Bad]:
    yield "cut short", lambda path: path.write_bytes(good[: len(good) // 2]), WHOLE
    yield "damaged", lambda path: path.write_bytes(good[:4] + b"\xff" * 40 + good[44:]), WHOLE


def of_fields(command: Command) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each kind of bad record, which lacks one field or has a wrong value in it."""
    for name in command.must_be_there:
        yield f"no {name}", {key: value for key, value in command.row.items() if key != name}
        if name in command.anything:
            continue
        for kind, value in (("null", None), ("true", True), ("object", {"x": 1}), ("list of objects", [{"x": 1}])):
            yield f"{name} {kind}", {**command.row, name: value}
        if not isinstance(command.row[name], float):
            yield f"{name} a fraction", {**command.row, name: 0.5}
        yield f"{name} NaN", {**command.row, name: float("nan")}
        if isinstance(command.row[name], list):
            yield f"{name} a text", {**command.row, name: "x"}
        elif name in ("reference", "prediction") and isinstance(command.row[name], str):
            yield f"{name} a list", {**command.row, name: ["x"]}
        else:
            yield f"{name} empty", {**command.row, name: ""}


ACCEPTED = {
    ("finetune classify", "label true"),  # "true" is a class like any other
    ("pretrain", "text empty"),  # an empty document is left out
    ("generate", "prompt empty"),
    ("generate", "no suffix"),
}


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def good_bytes(folder: Path, row: dict[str, Any], suffix: str) -> bytes:
    path = folder / f"good{suffix}"
    (write_parquet if suffix in PARQUET else write_json_lines)(path, [row] * 20)
    return path.read_bytes()


def kinds(command: Command, suffix: str, folder: Path) -> Iterator[Bad]:
    """Yield all kinds of bad files for a command."""
    good = good_bytes(folder, command.row, suffix)
    yield from of_bytes(good)
    if suffix in PARQUET:
        yield from of_parquet(good)
        for kind, row in of_fields(command):
            # A column has one type, so the bad row is written without the good one.
            yield kind, lambda path, row=row: write_parquet(path, [row]), r"\brow 1\b|column"
        return
    if suffix in TABLES:
        yield from of_tables(command.row, "," if suffix == ".csv" else "\t")
        return
    yield from of_json_lines(command.row)
    for kind, row in of_fields(command):
        yield kind, lambda path, row=row: write_json_lines(path, [command.row, row]), LINE


@pytest.fixture(scope="module", autouse=True)
def parsers_are_built_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (finetune, pretrain):
            patch.setattr(module, "build_parser", functools.cache(module.build_parser))
        yield


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*arguments: Any, **named: Any) -> None:
        raise AssertionError("it was accepted: it trains")

    monkeypatch.setattr(Trainer, "_run_stage", begin)


def finished_run(folder: Path, task: str) -> None:
    """Write the part of a finished run that `predict` looks at before it reads the data."""
    (folder / task / "model").mkdir(parents=True)
    (folder / task / "config.yaml").write_text(
        yaml.safe_dump({"task": task, "max_length": 128, "text": {}, "trainer": {}})
    )


def refusal(command: Command, path: Path, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """Return the error line with which a command refuses a file."""
    before, behind = ([part.format(folder=folder) for part in side] for side in command.arguments)
    capsys.readouterr()
    status = cli.main([*before, str(path), *behind])
    error = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert status == 2, error
    assert len(error) == 1 and error[0].startswith(f"fastformer {before[0]}: error: "), error
    return error[0]


def check(name: str, suffix: str, of_this: Iterator[Bad], folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Check that each bad file is refused in one line that names the file and the place in it."""
    for task in MAKERS:
        finished_run(folder, task)
    wrong = []
    for number, (kind, make, place) in enumerate(of_this):
        if (name, kind) in ACCEPTED:
            continue
        path = folder / str(number) / ("bad" if kind == "no suffix" else f"bad{suffix}")
        path.parent.mkdir()
        try:
            make(path)
            said = refusal(COMMANDS[name], path, folder, capsys)
            if not re.search(re.escape(str(path.with_suffix(""))) + (f".*({place})" if place else ""), said):
                wrong.append(f"{kind}: {said}")
        except BaseException as error:
            wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "suffix"), [(name, suffix) for name, command in COMMANDS.items() for suffix in command.suffixes]
)
def test_records(name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    check(name, suffix, kinds(COMMANDS[name], suffix, tmp_path), tmp_path, capsys)


# --- Layouts of their own ---------------------------------------------------------------------------------------------


def of_text() -> Iterator[Bad]:
    yield "not UTF-8", lambda path: path.write_bytes(b"Some words.\n\xe9\n"), LINE


def of_conll() -> Iterator[Bad]:
    lines = {
        "a column less": "b",
        "a column more": "b x O",
        "no tag": "b\t",
        "JSON": '{"tokens": ["b"]}',
    }
    for kind, line in lines.items():
        yield kind, lambda path, line=line: path.write_text(f"a O\n{line}\n"), LINE
    yield "not UTF-8", lambda path: path.write_bytes(b"a O\n\xe9 O\n"), LINE


def of_squad() -> Iterator[Bad]:
    question = {"id": "1", "question": "q", "answers": [{"text": "c", "answer_start": 0}]}
    good = {"data": [{"paragraphs": [{"context": "c", "qas": [question, question]}]}]}
    yield "not JSON", lambda path: path.write_text(json.dumps(good, indent=1).replace(":", "", 1)), LINE
    yield "two", lambda path: path.write_text(json.dumps(good) * 2), r", line 1\b"
    yield "deep", lambda path: path.write_text("[" * 100_000), WHOLE
    yield "half a surrogate pair", lambda path: path.write_text('{"data": "\\udfff"}'), WHOLE
    yield "a list", lambda path: path.write_text(json.dumps([good])), WHOLE
    for place, key in (
        ([], "data"),
        (["data", 0], "paragraphs"),
        (["data", 0, "paragraphs", 0], "context"),
        (["data", 0, "paragraphs", 0], "qas"),
        (["data", 0, "paragraphs", 0, "qas", 1], "question"),
        (["data", 0, "paragraphs", 0, "qas", 1], "id"),
    ):
        for kind, value in (("null", None), ("a list of numbers", [7]), ("a number", 7), ("an object", {"x": 1})):
            bad = json.loads(json.dumps(good))
            parent = functools.reduce(lambda node, step: node[step], place, bad)
            parent[key] = value
            if key != "id" or value is None:
                yield f"{key} {kind}", lambda path, bad=bad: path.write_text(json.dumps(bad)), WHOLE


def of_tmx() -> Iterator[Bad]:
    unit = '<tu><tuv xml:lang="en"><seg>one</seg></tuv><tuv xml:lang="fr"><seg>un</seg></tuv></tu>'
    yield "cut short", lambda path: path.write_text(f"<tmx>{unit}"), WHOLE
    yield "another language", lambda path: path.write_text(f"<tmx>{unit.replace('en', 'xx')}</tmx>"), r"unit 1\b"
    yield "no segment", lambda path: path.write_text(f"<tmx>{unit.replace('seg', 's')}</tmx>"), r"unit 1\b"
    yield "unknown encoding", lambda path: path.write_text('<?xml version="1.0" encoding="x-no"?><tmx/>'), WHOLE
    yield "not UTF-8", lambda path: path.write_bytes(b"<tmx>\xe9</tmx>"), WHOLE


def of_parallel(target: str) -> Iterator[Bad]:
    def write(source: bytes, other: bytes | None) -> Callable[[Path], Any]:
        def make(path: Path) -> None:
            path.write_bytes(source)
            if other is not None:
                path.with_suffix(target).write_bytes(other)

        return make

    yield "alone", write(b"a\nb\n", None), WHOLE
    yield "a line less", write(b"a\nb\n", b"a\n"), WHOLE
    yield "empty line", write(b"a\n\n", b"a\nb\n"), LINE
    yield "empty line of the other", write(b"a\nb\n", b"a\n \n"), LINE
    yield "not UTF-8", write(b"a\n\xe9\n", b"a\nb\n"), LINE
    yield "the other not UTF-8", write(b"a\nb\n", b"a\n\xe9\n"), LINE


LAYOUTS: list[tuple[str, str, Callable[[], Iterator[Bad]]]] = [
    ("pretrain", ".txt", of_text),
    ("pretrain", ".md", of_text),
    *(
        (f"{command} {task}", suffix, layout)
        for command in ("finetune", "predict")
        for task, suffix, layout in (
            ("tag", ".conll", of_conll),
            ("qa", ".json", of_squad),
            ("translate", ".tmx", of_tmx),
            ("translate", ".en", lambda: of_parallel(".de")),
            ("summarize", ".source", lambda: of_parallel(".target")),
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "suffix", "layout"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_layouts(
    name: str,
    suffix: str,
    layout: Callable[[], Iterator[Bad]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    no_training: None,
) -> None:
    of_any = (bad for bad in of_bytes(b"a b") if bad[0] not in NOT_OF_LAYOUTS.get(suffix, ()))
    check(name, suffix, chain(of_any, layout()), tmp_path, capsys)


NOT_OF_LAYOUTS = {".txt": ("zeros",), ".md": ("zeros",), ".conll": ("no suffix",)}
"""The faults that a layout accepts: any characters are a text, and CoNLL files may have any name."""


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture, no_training: None) -> None:
    """Each file in a folder is read or refused, never passed over."""
    for kind, make in {
        "pipe": lambda path: os.mkfifo(path),
        "dangling link": lambda path: path.symlink_to("nowhere"),
        "link to itself": lambda path: path.symlink_to(path.name),
    }.items():
        folder = tmp_path / kind
        folder.mkdir()
        write_json_lines(folder / "train.jsonl", [COMMANDS["finetune classify"].row] * 9)
        make(folder / "test.jsonl")
        assert "test.jsonl" in refusal(COMMANDS["pretrain"], folder, tmp_path, capsys)
        assert "test.jsonl" in refusal(COMMANDS["finetune classify"], folder, tmp_path, capsys)
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "again").symlink_to(loop)
    assert "again is a link to a folder that contains it" in refusal(COMMANDS["pretrain"], loop, tmp_path, capsys)
    for command in ("pretrain", "finetune classify"):
        empty = tmp_path / f"empty {command}"
        empty.mkdir()
        assert str(empty) in refusal(COMMANDS[command], empty, tmp_path, capsys)
