"""Translations of messages from compiled gettext catalogues, and of numbers if there are no catalogues."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastformer.data.labelled.examples import SourceTarget

_FOLDERS = ("/usr/share/locale", "/usr/local/share/locale", os.path.join(sys.prefix, "share", "locale"))
_MAGIC = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
_ACCELERATOR = re.compile(r"[_&](?=\w)")
_LONGEST = 300


def read_catalogue(content: bytes, name: str) -> list[SourceTarget]:
    """Return the messages of a ``.mo`` file that are running text in both languages; of plurals, the singular only.

    Format: GNU gettext manual, section 10.3. Left out are the header, untranslated messages, and messages of several
    lines, of more than 300 characters or without two words.

    Raises:
        ValueError: the file is damaged or not a ``.mo`` file.
    """
    order = _MAGIC.get(content[:4])
    try:
        if order is None:
            raise ValueError("it does not begin like a gettext catalogue")
        _, count, originals, translations = struct.unpack_from(f"{order}4I", content, 4)

        def strings(table: int) -> Iterator[bytes]:
            for length, start in struct.iter_unpack(f"{order}2I", content[table : table + 8 * count]):
                if start + length > len(content):
                    raise ValueError("it is cut short")
                yield content[start : start + length]

        messages = list(zip(strings(originals), strings(translations), strict=True))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{name} is not a whole gettext catalogue: {error}") from error
    encoding = _encoding(messages)
    pairs = []
    for original, translated in messages:
        try:
            source, target = (_plain(text, encoding) for text in (original, translated))
        except (UnicodeDecodeError, LookupError):  # the message is not in the catalogue's encoding
            continue
        if _is_running_text(source) and target and "\n" not in target and target != source:
            pairs.append(SourceTarget(source, target))
    return pairs


def _encoding(messages: list[tuple[bytes, bytes]]) -> str:
    header = dict(messages).get(b"", b"").decode("ascii", "replace")
    match = re.search(r"charset=([\w.-]+)", header)
    return match[1] if match else "utf-8"


def _plain(text: bytes, encoding: str) -> str:
    without_context = text.rpartition(b"\x04")[2].partition(b"\0")[0]
    return _ACCELERATOR.sub("", without_context.decode(encoding)).strip()


def _is_running_text(text: str) -> bool:
    return len(text) <= _LONGEST and "\n" not in text and len(re.findall(r"[A-Za-z]{2,}", text)) >= 2


def installed_catalogues(language: str) -> list[Path]:
    """Return the catalogues of a language (``de``, ``pt_BR``) that this machine's programs installed, sorted."""
    return sorted(path for folder in _FOLDERS for path in Path(folder, language, "LC_MESSAGES").glob("*.mo"))


def read_catalogues(contents: Iterable[tuple[str, bytes]]) -> list[SourceTarget]:
    """Return the messages of several catalogues, each source once; damaged catalogues are left out."""
    pairs: dict[str, SourceTarget] = {}
    for name, content in contents:
        try:
            found = read_catalogue(content, name)
        except ValueError:
            continue
        for pair in found:
            pairs.setdefault(pair.source, pair)
    return list(pairs.values())


# --- Numbers ----------------------------------------------------------------------------------------------------------

_ENGLISH = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_ENGLISH_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_GERMAN = (
    *("null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"),
    *("dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn"),
)
_GERMAN_TENS = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")


def number_translations() -> list[SourceTarget]:
    """Return the numbers from 0 to 9999 in English and German words: a translation that needs no catalogue."""
    return [SourceTarget(english_number(number), german_number(number)) for number in range(10_000)]


def english_number(number: int) -> str:
    """Write a number from 0 to 9999 in English words."""
    if number < 20:
        return _ENGLISH[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_ENGLISH[hundreds]} hundred" + (f" and {english_number(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if rest < 100 else " "
    return f"{_ENGLISH[thousands]} thousand" + (joint + english_number(rest) if rest else "")


def german_number(number: int) -> str:
    """Write a number from 0 to 9999 in German words."""
    words = _german(number)
    return f"{words}s" if number % 100 == 1 else words


def _german(number: int) -> str:
    if number < 20:
        return _GERMAN[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{_GERMAN[ones]}und" if ones else "") + _GERMAN_TENS[tens - 2]
    size, word = (100, "hundert") if number < 1000 else (1000, "tausend")
    count, rest = divmod(number, size)
    return f"{_GERMAN[count]}{word}" + (_german(rest) if rest else "")
