"""Tables, progress and warnings are readable text, and text from elsewhere cannot control the terminal."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import warnings

import pytest

from fastformer.console import (
    Progress,
    StatusLine,
    Table,
    clock,
    json_text,
    plain_warnings,
    printable,
    printable_line,
    say,
    show_any_character,
    track,
)

pytestmark = pytest.mark.quick

TABLE = Table(
    ("kernel", "spills", "because"),
    [("softmax", "0", ""), ("attention", "1,024", "too many registers for one thread")],
    "lrl",
    title="compiled",
    note="modelled",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table() -> None:
    assert TABLE.text().splitlines() == [
        "compiled",
        "kernel     spills  because",
        "---------  ------  ---------------------------------",
        "softmax         0",
        "attention   1,024  too many registers for one thread",
        "modelled",
    ]


def test_table_on_a_narrow_terminal_breaks_the_widest_cells() -> None:
    assert TABLE.text(36).splitlines()[3:6] == [
        "softmax         0",
        "attention   1,024  too many",
        "                   registers for one",
    ]
    assert max(map(len, TABLE.text(36).splitlines())) <= 36


@pytest.mark.parametrize("limit", [0, 5, 20])
def test_no_cell_is_lost_where_the_table_does_not_fit(limit: int) -> None:
    assert set("".join(TABLE.text(limit).split())) >= set("1,024toomanyregistersforonethread")
    assert "1,024" in TABLE.text(limit)


def test_table_without_headings_and_rows() -> None:
    assert (
        Table(("", ""), [("  part", "1.5 GiB"), ("all", "12 GiB")], "lr").text() == "  part  1.5 GiB\nall      12 GiB"
    )
    assert Table(("a", "b"), [], "ll").text() == "a  b\n-  -"


def test_rows_have_as_many_cells_as_headings() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Table(("a", "b"), [("only one",)], "ll").text()


def test_progress_is_shown_on_a_terminal_and_then_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track("abc", "compiling")) == ["a", "b", "c"]
    assert terminal.getvalue().startswith("\rcompiling 0/3  0:00\x1b[K")
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_progress_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, now = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("fastformer.console.time.monotonic", lambda: now[0])
    with Progress("tokenizing", total=4000, unit="characters") as progress:
        now[0] += 30
        progress.advance(1000)
        now[0] += 0.01
        progress.advance(1000)  # too soon to be read
    shown = terminal.getvalue().split("\r")
    assert shown[1:] == [
        "tokenizing 0/4,000 characters  0:00\x1b[K",
        "tokenizing 1,000/4,000 characters  0:30, 1:30 left\x1b[K",
        "\x1b[K",
    ]


def test_nothing_of_progress_gets_into_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter(range(3)), "compiling", total=3)) == [0, 1, 2]
    with StatusLine() as line:
        line.show("there")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# --- Foreign text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\r\x08over", r"\r\x08over"),
        ("\x9b2J \u202egnp.exe \udc80", r"\x9b2J \u202egnp.exe \udc80"),
        ("Zwölf\tÄpfel\n日本 नमस्ते\u200d 👩\u200d🚀 [bold]<b>", "Zwölf\tÄpfel\n日本 नमस्ते\u200d 👩\u200d🚀 [bold]<b>"),
    ],
)
def test_what_would_act_on_a_terminal_is_shown_escaped(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printable(text) == shown
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with StatusLine() as line:
        line.show(text)
    assert shown in terminal.getvalue()
    assert "\x1b" not in str(Table((text, "b"), [(text, text)], "ll", text, text))


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "+/- 1... \\xe4 \\u65e5 \\udc80"),
        ("utf-8", "± 1… ä 日 \\udc80"),
        ("latin-1", "± 1... ä \\u65e5 \\udc80"),
    ],
)
def test_every_text_is_shown_whatever_the_terminal_knows(
    encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    show_any_character()
    print("± 1… ä 日 \udc80", end="", flush=True)
    assert written.getvalue().decode(encoding) == shown


def test_nobody_has_to_read_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        say("once")
        say("again")
        print("at the end", flush=True)


def test_json_has_null_for_what_is_no_number() -> None:
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "ä", 3)}]}
    assert json.loads(json_text(value)) == {"a": None, "b": [1.5, None, {"c": [None, "ä", 3]}]}


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = warnings.formatwarning
    with plain_warnings():
        shown = warnings.formatwarning("two\nlines \x1b[2J", UserWarning, "a.py", 3)
        other = warnings.formatwarning("old", FutureWarning, "a.py", 3, "code")
    assert (shown, other) == ("warning: two lines \\x1b[2J\n", "warning (FutureWarning): old\n")
    assert warnings.formatwarning is before


def test_a_path_is_one_line() -> None:
    assert printable_line("runs/a\nb\x1b") == "runs/a\\nb\\x1b"
