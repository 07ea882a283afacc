"""Small faults, planted one at a time: the possible places in a source file, and the file with a fault."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

AREAS = ("kernels/fastformer_kernels", "fastformer/ops", "fastformer/data", "fastformer/training")

# Operators between two operands, as written, and their replacements.
COMPARISONS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "is not": "is",
    "is": "is not",
    "not in": "in",
    "in": "not in",
}
ARITHMETIC = {"+": "-", "-": "+", "*": "+", "//": "*", "/": "*", "%": "+", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
LOGIC = {"and": "or", "or": "and"}
# Functions whose first two arguments may be swapped without a change of the result.
SYMMETRIC = {"max", "min", "maximum", "minimum", "equal", "gcd", "logical_and", "logical_or"}


@dataclass(frozen=True)
class Mutant:
    """A file with one fault.

    Attributes:
        path: the path of the file in the repository.
        kind: the kind of fault.
        line: the number of the line in which the fault begins, from 1.
        start, end: the characters of the file that are replaced.
        before, after: the text replaced and what replaces it.
        text: the line as it was.
    """

    path: str
    kind: str
    line: int
    start: int
    end: int
    before: str
    after: str
    text: str

    @property
    def key(self) -> str:
        """A name of the mutant, valid as long as its line stays the same."""
        return f"{self.path} | {self.text} | {self.before} -> {self.after}"

    def apply(self, source: str) -> str:
        """Return the text of the file with the fault."""
        return source[: self.start] + self.after + source[self.end :]

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


def mutants_of(source: str, path: str) -> list[Mutant]:
    """Return every mutant of the code in a file's functions, not of tables, annotations, messages or decorators."""
    tree = ast.parse(source)
    places = _Places(source, path)
    found: dict[tuple[int, int, str], Mutant] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for statement in function.body:
            for node in _code(statement):
                for mutant in _of_node(node, places):
                    found[mutant.start, mutant.end, mutant.after] = mutant
    return [found[key] for key in sorted(found)]


def draw(root: Path, count: int, seed: int) -> list[Mutant]:
    """Draw `count` mutants in random order, the same number from each area."""
    generator = random.Random(seed)
    shares = []
    for number, area in enumerate(AREAS):
        files = sorted((root / area).rglob("*.py"))
        every = [m for file in files for m in mutants_of(file.read_text(), file.relative_to(root).as_posix())]
        share = count // len(AREAS) + (number < count % len(AREAS))
        shares += generator.sample(every, min(share, len(every)))
    generator.shuffle(shares)
    return shares


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the node and all nodes in it that can have a fault.

    Left out are annotations, messages of errors, declarations of inner functions, and the `strict` of a zip, which only
    guards against other faults.
    """
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "args", "decorator_list"} and not isinstance(node, ast.Call):
            continue
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Assert) and name == "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield from _code(child)


class _Places:
    """The places of the nodes of a file, in characters."""

    def __init__(self, source: str, path: str) -> None:
        self.source, self.path = source, path
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def of(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.of(node)
        return self.source[start:end]

    def mutant(self, kind: str, start: int, end: int, after: str) -> Mutant:
        line = self.source.count("\n", 0, start) + 1
        text = self.lines[line - 1].strip()
        return Mutant(self.path, kind, line, start, end, self.source[start:end], after, text)

    def _at(self, line: int, column: int) -> int:
        """Return the place in characters of a line and a column in bytes of UTF-8."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())


def _of_node(node: ast.AST, places: _Places) -> Iterator[Mutant]:
    match node:
        case ast.Compare():
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield from _operator("comparison", left, right, COMPARISONS, places)
        case ast.BinOp():
            yield from _operator("arithmetic", node.left, node.right, ARITHMETIC, places)
        case ast.BoolOp():
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from _operator("logic", left, right, LOGIC, places)
            yield places.mutant("dropped condition", *places.of(node), places.text(node.values[0]))
        case ast.UnaryOp(op=ast.Not()):
            yield places.mutant("dropped condition", *places.of(node), f"({places.text(node.operand)})")
        case ast.UnaryOp(op=ast.USub()):
            yield places.mutant("arithmetic", *places.of(node), places.text(node.operand))
        case ast.Constant(value=bool()):
            yield places.mutant("constant", *places.of(node), str(not node.value))
        case ast.Constant(value=int() | float()):
            yield places.mutant("off by one", *places.of(node), repr(node.value + 1))
        case ast.If() | ast.IfExp():
            for value in ("True", "False"):
                yield places.mutant("dropped condition", *places.of(node.test), value)
        case ast.Call(args=[first, second, *_]) if not any(isinstance(a, ast.Starred) for a in (first, second)):
            start, end = places.of(first)[0], places.of(second)[1]
            between = places.source[places.of(first)[1] : places.of(second)[0]]
            called = places.text(node.func).rsplit(".", 1)[-1]
            if places.text(first) != places.text(second) and called not in SYMMETRIC:
                after = places.text(second) + between + places.text(first)
                yield places.mutant("swapped arguments", start, end, after)
        case ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield places.mutant("removed line", *places.of(node), "pass")
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield places.mutant("removed line", *places.of(node), "pass")


def _operator(kind: str, left: ast.expr, right: ast.expr, others: dict[str, str], places: _Places) -> Iterator[Mutant]:
    """Yield the mutant with another operator between two operands, which may be in parentheses."""
    start, end = places.of(left)[1], places.of(right)[0]
    found = re.fullmatch(r"([\s)]*)(.*?)([\s(]*)", places.source[start:end], re.DOTALL)
    if found and (other := others.get(found[2])):
        yield places.mutant(kind, start + found.end(1), start + found.end(2), other)
