"""Reading of text files line by line and of the JSON in them. Errors name the file, the line and the reason."""

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
    """Refuse a path that is not a file. Data is read to its end more than once, which pipes and devices do not allow.

    `/dev/stdin` and `<(...)`, which the shell has opened, are accepted: they end.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `path` is not a file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    opened = path == Path("/dev/stdin") or path.parent in _OPEN
    if not stat.S_ISREG(mode) and not opened:
        kind = _KINDS.get(stat.S_IFMT(mode), "a folder")
        raise ValueError(f"{path} is {kind}; it must be a file")


def decoded_lines(path: Path, start: int = 0) -> Iterator[tuple[str, int]]:
    """Yield each line of a UTF-8 file without its line end, and the position of the byte after it.

    Only a line feed ends a line: U+2028 and similar characters may be part of a JSON string without an escape.

    Args:
        path: the file.
        start: the byte at which reading begins.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8. The message names the byte and the line.
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
                raise ValueError(f"{path}: not UTF-8 at {place}: {error.reason}; only UTF-8 is accepted") from error
            yield text.removesuffix("\n").removesuffix("\r"), end
            begin = end


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each line of a UTF-8 file, from 1, and the line. Raises the errors of `decoded_lines`."""
    for number, (line, _) in enumerate(decoded_lines(path), start=1):
        yield number, line


def lines_before(path: Path, position: int) -> int:
    """The number of lines that end before the byte at `position`."""
    count = 0
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse a line that is a JSON object. Raises ValueError, beginning with `where`, if it is not one."""
    record = json_value(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found a {type(record).__name__}")
    return record


def json_file(path: Path) -> Any:
    """Parse a JSON file. Raises the errors of `decoded_lines` and `json_value`."""
    return json_value("\n".join(line for _, line in numbered_lines(path)), str(path), whole_file=True)


def json_value(text: str, where: str, whole_file: bool = False) -> Any:
    """Parse a JSON text.

    Args:
        text: JSON.
        where: the place of the text; errors begin with it.
        whole_file: whether `where` is a file. If so, errors name the line too.

    Raises:
        ValueError: `text` is not JSON, or contains half of a surrogate pair, a number of thousands of digits, lists
            that are nested too deeply, or the same name twice in an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text or "\\uD" in text:  # a surrogate can only come from an escape
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if whole_file else where
        raise ValueError(f"{place}: not JSON: {error.msg} at character {error.colno}") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: not valid Unicode: {half!a} is half of a surrogate pair") from error
    except RecursionError:
        raise ValueError(f"{where}: lists or objects are nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where}: not accepted: {error}") from error
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} occurs twice in an object")
    return found
