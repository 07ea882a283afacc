"""Mutation plants faults of each kind, in the right place, and only in the code of functions."""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path

import pytest
from mutation.__main__ import EQUIVALENT, ROOT
from mutation.mutants import AREAS, Mutant, draw, mutants_of
from mutation.related import related_tests

pytestmark = pytest.mark.cpu


def planted(line: str) -> set[str]:
    """Return all mutants of a line, as the last of a function whose other lines have none."""
    source = f'def function(a: int = 1) -> int:\n    """1 < 2"""\n    {line}\n'
    return {mutant.apply(source).splitlines()[-1].strip() for mutant in mutants_of(source, "file.py")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("return a < b", {"return a <= b"}),
        ("return a is not None", {"return a is None"}),
        ("return (a) + (b)", {"return (a) - (b)"}),
        ("return a and b", {"return a or b", "return a"}),
        ("return not a", {"return (a)"}),
        ("return x[ü:3]", {"return x[ü:4]"}),
        ("return f(a, b)", {"return f(b, a)"}),
        ("return f(keep=True)", {"return f(keep=False)"}),
        ("return zip(a, b, strict=True)", {"return zip(b, a, strict=True)"}),
        ("return a if b else c", {"return a if True else c", "return a if False else c"}),
        ("self.a = b", {"pass"}),
        ('raise ValueError(f"{a + 1} is below 2")', {"pass"}),
    ],
)
def test_faults_of_a_line(line: str, expected: set[str]) -> None:
    assert planted(line) == expected


def test_nothing_outside_of_functions() -> None:
    source = """
        SIZE = 16 + 1

        @decorator(3)
        def function(a: int = 2 < 3) -> tuple[int, 4]:
            return a
    """
    assert mutants_of(textwrap.dedent(source), "file.py") == []


@pytest.fixture(scope="module")
def drawn() -> list[Mutant]:
    return draw(ROOT, 200, seed=0)


def test_a_draw_repeats_itself_and_is_of_every_area(drawn: list[Mutant]) -> None:
    assert drawn == draw(ROOT, 200, seed=0)
    assert drawn != draw(ROOT, 200, seed=1)
    assert [sum(mutant.path.startswith(area) for mutant in drawn) for area in AREAS] == [50] * 4


def test_every_mutant_is_a_program_with_one_change_and_has_tests(drawn: list[Mutant]) -> None:
    existing = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("*")}
    for mutant in drawn:
        source = (ROOT / mutant.path).read_text()
        changed = mutant.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant
        assert mutant.before in mutant.text or "\n" in mutant.before
        assert related_tests(mutant.path, existing), mutant.path


def test_what_is_called_equivalent_is_still_there() -> None:
    for key in json.loads(EQUIVALENT.read_text()):
        path, line, _ = key.split(" | ", 2)
        assert line in Path(ROOT / path).read_text(), key
