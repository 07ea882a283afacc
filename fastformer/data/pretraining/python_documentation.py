"""The English prose that comes with Python: docstrings of the standard library and topics of `help()`.

Modules written in Python are parsed, never imported, so none of their code runs. Modules written in C must be imported
to read their docstrings: only a fixed list of modules without side effects is.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastformer.console import track

_SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}

# fmt: off
_C_MODULES = (
    "builtins", "_abc", "_ast", "_asyncio", "_bisect", "_bz2", "_codecs", "_collections", "_contextvars", "_csv",
    "_ctypes", "_datetime", "_decimal", "_elementtree", "_functools", "_hashlib", "_heapq", "_imp", "_io", "_json",
    "_locale", "_lsprof", "_lzma", "_multiprocessing", "_opcode", "_operator", "_pickle", "_queue", "_random",
    "_signal", "_socket", "_sqlite3", "_sre", "_ssl", "_stat", "_statistics", "_string", "_struct", "_thread",
    "_tracemalloc", "_warnings", "_weakref", "_zoneinfo", "array", "atexit", "binascii", "cmath", "errno",
    "faulthandler", "fcntl", "gc", "grp", "itertools", "marshal", "math", "mmap", "posix", "pwd", "pyexpat",
    "resource", "select", "sys", "syslog", "termios", "time", "unicodedata", "zlib",
)
# fmt: on


def python_fingerprint() -> str:
    """Return a short name for this Python installation, safe in file names; another installation has another corpus."""
    digest = hashlib.sha256(f"{sys.version}\n{sysconfig.get_path('stdlib')}".encode()).hexdigest()
    return f"{platform.python_implementation().lower()}-{platform.python_version()}-{digest[:8]}"


def python_documentation() -> Iterator[list[str]]:
    """Yield one list of prose paragraphs per topic and per module, in a fixed order."""
    for texts in track(_documented_parts(), "reading Python's documentation"):
        yield [paragraph for entry in texts for paragraph in prose_paragraphs(entry.text)]


class Docstring(NamedTuple):
    """The documentation of one object; `name` is its name within the module, empty for the module itself."""

    module: str
    name: str
    text: str


TOPICS = "topics"
"""The module name given to the topics of `help()`."""


def python_docstrings() -> Iterator[Docstring]:
    """Yield the topics, then the docstrings of each module in the order of its source."""
    for part in track(_documented_parts(), "reading Python's documentation"):
        yield from part


def _documented_parts() -> list[Iterator[Docstring]]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        *_topics(),
        *(_source_docstrings(path, root) for path in _source_files(root)),
        *map(_c_docstrings, _C_MODULES),
    ]


def _topics() -> list[Iterator[Docstring]]:
    from pydoc_data.topics import topics

    return [iter([Docstring(TOPICS, name, topics[name])]) for name in sorted(topics)]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _source_docstrings(path: Path, root: Path) -> Iterator[Docstring]:
    """Yield the docstrings of a module in the order of the source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # files kept as examples of bad source
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for node, name in sorted(_documented_nodes(tree, ""), key=lambda found: getattr(found[0], "lineno", 0)):
        if text := ast.get_docstring(node):
            yield Docstring(module, name, text)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented_nodes(node: ast.AST, name: str) -> Iterator[tuple[_Documented, str]]:
    """Yield a node and the nodes inside it, if they may have a docstring, with their qualified names."""
    if isinstance(node, _Documented):
        yield node, name
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", "") if isinstance(child, _Documented) else ""
        yield from _documented_nodes(child, ".".join(filter(None, (name, inner))))


def _c_docstrings(name: str) -> Iterator[Docstring]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not on this platform
        return
    yield from _object_docstrings(name, "", module)
    for member_name, member in sorted(vars(module).items()):
        if isinstance(member, ModuleType) or not hasattr(member, "__doc__"):
            continue
        if inspect.isclass(member):
            yield from _object_docstrings(name, member_name, member)
            for attribute_name, attribute in sorted(vars(member).items()):
                yield from _object_docstrings(name, f"{member_name}.{attribute_name}", attribute)
        elif inspect.isroutine(member):
            yield from _object_docstrings(name, member_name, member)


def _object_docstrings(module: str, name: str, item: object) -> Iterator[Docstring]:
    text = getattr(item, "__doc__", None)
    if isinstance(text, str):
        yield Docstring(module, name, inspect.cleandoc(text))


# --- Prose ------------------------------------------------------------------------------------------------------------

_NOT_PROSE_LINE = re.compile(
    r"""\s*(>>>|\.\.\.\s|\.\.\s|[|+][-=|+\s]|\#|\$\s|%|@|Traceback|File\s\")  # doctests, directives, tables, shells
    |.*(::=|\s=\s|\s->\s)  # grammars, assignments, signatures
    |\s*(for\s.+\sin\s.+|(if|elif|while|with|def|class|except)\s.+|else|try|finally):(\s|$)  # statements
    |\s*[\w.]+\(.*\)\s*$  # calls""",
    re.VERBOSE,
)
_UNDERLINE = re.compile(r"\s*([=*~^\"'#+.-])\1{2,}\s*$")
_ITEM = re.compile(r"\s*(?:[*•-]|\(?\d{1,2}[.)]|:(?:param|type|returns?|rtype|raises|arg)[^:]*:|@\w+(?: \w+)?:)\s+")
_WORD = re.compile(r"[\"'(*\[`]*[A-Za-z][a-z]*(?:[-'][A-Za-z]+)*[\"')*\]`.,;:!?]*$")
_BROKEN_WORD = re.compile(r"(?<=[a-z])- (?=[a-z])")  # a line ended at the hyphen
_SMALLEST_PARAGRAPH = 4
_SMALLEST_SHARE_OF_WORDS = 0.7


def prose_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of running English in a documentation text, each on one line.

    Code, doctests, tables, headings, grammars and signatures are left out. Each item of a list is a paragraph.
    """
    return [paragraph for block in re.split(r"\n\s*\n", text) for paragraph in _joined(block) if _is_prose(paragraph)]


def _joined(block: str) -> Iterator[str]:
    """Yield the paragraphs of a block without blank lines: the block or its list items; none if a line is not prose."""
    lines = block.split("\n")
    if any(_NOT_PROSE_LINE.match(line) or _UNDERLINE.match(line) for line in lines):
        return
    collected: list[str] = []
    for line in lines:
        if (item := _ITEM.match(line)) and collected:
            yield _joined_words(collected)
            collected = []
        collected += line[item.end() if item else 0 :].split()
    yield _joined_words(collected)


def _joined_words(words: list[str]) -> str:
    return _BROKEN_WORD.sub("-", " ".join(words))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if len(words) < _SMALLEST_PARAGRAPH or words[0].endswith(")"):
        return False
    return sum(_WORD.match(word) is not None for word in words) >= _SMALLEST_SHARE_OF_WORDS * len(words)
