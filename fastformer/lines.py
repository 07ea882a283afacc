"""Text files line by line, and the JSON in them: read as they are, or refused with file, line and reason."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OPEN = (Path("/dev/fd"), Path("/proc/self/fd"))
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_is_file(path: Path) -> None:
    """Data is read more than once, and to its end: a pipe or a device has not both.

    What the shell has opened is accepted, `/dev/stdin` and `<(...)`: it ends, and its name has no suffix of data.

    Raises:
        FileNotFoundError, ValueError: `path` is not a file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    opened = path == Path("/dev/stdin") or path.parent in _OPEN
    if not stat.S_ISREG(mode) and not opened:
        kind = _KINDS.get(stat.S_IFMT(mode), "a folder")
        raise ValueError(f"{path} is {kind}; accepted is a file")


def decoded_lines(path: Path, start: int = 0) -> Iterator[tuple[str, int]]:
    """Each line of a UTF-8 file from a byte on, without its end, and the byte after it.

    Lines end at line feeds alone: U+2028 and its like may stand unescaped inside a JSON string.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not UTF-8, naming the line.
    """
    check_is_file(path)
    with open(path, "rb") as file:
        if start:
            file.seek(start)
        begin = start
        for number, line in enumerate(file, start=1):
            end = begin + len(line)
            if begin == 0 and line.startswith(_BYTE_ORDER_MARK):
                line = line[len(_BYTE_ORDER_MARK) :]
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                place = f"byte {end - len(line) + error.start}, line {lines_before(path, start) + number}"
                raise ValueError(f"{path}: not UTF-8 at {place}: {error.reason}; accepted is UTF-8 alone") from error
            yield text.removesuffix("\n").removesuffix("\r"), end
            begin = end


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line of a UTF-8 file and its number, from 1 on. Raises as `decoded_lines` does."""
    for number, (line, _) in enumerate(decoded_lines(path), start=1):
        yield number, line


def lines_before(path: Path, position: int) -> int:
    """How many lines end before a byte."""
    count = 0
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON is. Raises ValueError, beginning with `where`, if it is none."""
    record = json_value(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found a {type(record).__name__}")
    return record


def json_file(path: Path) -> Any:
    """What a file of JSON says. Raises as `decoded_lines` and `json_value` do."""
    return json_value("\n".join(line for _, line in numbered_lines(path)), str(path), whole_file=True)


def json_value(text: str, where: str, whole_file: bool = False) -> Any:
    """What a JSON text says.

    Args:
        text: JSON.
        where: it is, to begin errors with.
        whole_file: whether `where` is a file, so that the line is still to be named.

    Raises:
        ValueError: it is not JSON, or has what no text, number or object is made of: half a surrogate pair, a number of
            thousands of digits, lists within lists without end, a name twice in an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text or "\\uD" in text:  # no surrogate gets through UTF-8 but as an escape
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if whole_file else where
        raise ValueError(f"{place}: not JSON: {error.msg} at character {error.colno}") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: not valid Unicode: {half!a} is half of a surrogate pair") from error
    except RecursionError:
        raise ValueError(f"{where}: lists or objects within each other, deeper than can be read") from None
    except ValueError as error:
        raise ValueError(f"{where}: not accepted: {error}") from error
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice in an object")
    return found
