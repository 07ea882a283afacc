"""Text from elsewhere is shown in reports exactly as written, and never acts as markup."""

from __future__ import annotations

import html
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fastformer import markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "[click](javascript:alert(1))",
    "![x](http://evil/pixel.png)",
    "``` \n# heading\n```",
    "`code` **bold** ~~gone~~ $x$",
    "\x1b[31mred\x1b]8;;http://evil\x07",
    "back\\slash \\| \\<b>",
    "&lt;b&gt; &#60;",
    "[bold red]rich[/]",
    "\u202ereversed",
    "line\r\nline\n\n# heading",
]


def shown(cell: str) -> str:
    """Return the text that a reader sees of a Markdown cell without active markup."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_a_cell_is_seen_and_does_nothing(text: str) -> None:
    cell = markdown.text(text)
    assert "<" not in cell
    assert "\x1b" not in cell
    assert "\n" not in cell
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]*]", cell)
    assert markdown.table(("a", "b"), "lr", [(cell, cell)]).count("\n") == 2


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("a|b", r"a\|b"),
        ("||", r"\|\|"),
        (r"a\|b", r"a\|b"),
        (r"a\\|b", r"a\\\|b"),
        ("`a|b`", r"`a\|b`"),
        (r"\\\|", r"\\\|"),
    ],
)
def test_a_bar_in_a_cell_ends_no_cell(cell: str, expected: str) -> None:
    """A table escapes the bars that are not escaped yet: those after an even number of backslashes."""
    assert markdown.table(("x",), "l", [(cell,)]).splitlines()[-1] == f"| {expected} |"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs", "Zs", "Zl", "Zp"))))
def test_all_of_it_is_seen(text: str) -> None:
    assert shown(markdown.text(text)) == text


@pytest.mark.parametrize("text", [*HOSTILE, "````", "`", "``` ``` ````` `"])
def test_code_ends_where_it_should(text: str) -> None:
    inline, block = markdown.code(text), markdown.block(text)
    fence = re.match("`+", inline).group()
    assert fence not in inline[len(fence) : -len(fence)]
    assert "\n" not in inline
    first, *lines, last = block.splitlines()
    assert first == f"{last}text"
    assert all(last not in line for line in lines)
    assert "\x1b" not in inline + block
