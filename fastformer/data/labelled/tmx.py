"""Read TMX files (translation memories): each unit has the same text in several languages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from fastformer.lines import check_is_file

_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_NATIVE = ("bpt", "ept", "it", "ph", "ut")
"""Elements that hold markup of the original document; inside them, only the content of a ``sub`` is text."""


def tmx_units(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place of each unit and its text by language, without the markup of the original document.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not TMX, or a unit has two texts in one language.
    """
    check_is_file(path)
    for number, unit in enumerate(_units(path), start=1):
        where = f"{path}, unit {number}"
        texts: dict[str, str] = {}
        for variant in unit.iter("tuv"):
            language, text = _language_and_text(variant, where)
            if language in texts:
                raise ValueError(f"{where}: two texts in {language!r}; a unit has one in each language")
            texts[language] = text
        yield where, texts
        unit.clear()


def _units(path: Path) -> Iterator[Element]:
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "tu":
                yield element
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two come from a wrong encoding
        raise ValueError(f"{path}: not TMX: {error}") from error


def _language_and_text(variant: Element, where: str) -> tuple[str, str]:
    language = variant.get(_LANGUAGE) or variant.get("lang")
    segments = variant.findall("seg")
    if not language or len(segments) != 1:
        raise ValueError(
            f"{where}: a tuv needs xml:lang and one seg; found {variant.attrib} and {len(segments)} of seg"
        )
    for element in segments[0].iter():
        if element.tag in _NATIVE:
            element.text = None
            for child in element:
                child.tail = None
    return language, "".join(segments[0].itertext())
