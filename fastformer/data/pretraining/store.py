"""A corpus tokenized once, kept on the disk and mapped into memory.

A store is a folder: ``.npy`` files, mapped when opened, and ``store.json`` with the size and the SHA-256 of each. It is
built in parts. Each part is either complete or absent, so a build that was killed at any moment continues where it
stopped. The store gets its final name only when it is complete. The parts become its blocks: random order is drawn
within a few blocks at a time, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastformer.console import Progress
from fastformer.data.pretraining.corpus import document_of
from fastformer.data.pretraining.encoding import TextEncoder
from fastformer.data.pretraining.sources import Source
from fastformer.data.pretraining.tokenized import TokenizedCorpus, encode_sentences
from fastformer.files import atomic_file, atomic_folder, remove
from fastformer.lines import json_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST = "store.json"
BLOCK_CHARACTERS = 1 << 24
_FORMAT = 2

Arrays = dict[str, NDArray[Any]]
Keep = Callable[[str], bool]
"""Whether a document belongs into a store."""


@dataclass(frozen=True)
class DocumentCorpus:
    """Tokens of D documents, one after another, not divided into sentences.

    Attributes:
        ids: (T,) integers.
        document_offsets: (D + 1,) int64: document d has ``ids[document_offsets[d] : document_offsets[d + 1]]``.
    """

    ids: NDArray[np.integer]
    document_offsets: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    def part(self, begin: int, end: int) -> DocumentCorpus:
        """Return the documents begin to end (exclusive); the offsets still refer to all of `ids`."""
        return DocumentCorpus(self.ids, self.document_offsets[begin : end + 1])


# --- Layouts ----------------------------------------------------------------------------------------------------------


class Layout:
    """A rule that says how documents become a part, and how parts become a store. Each kind of corpus has one."""

    name: str
    corpus: type[TokenizedCorpus] | type[DocumentCorpus]

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Tokenize texts into one part: flat arrays of ids, and of lengths.

        One of them is "document_lengths": the lengths of the documents that have any text.
        """
        raise NotImplementedError

    def flat(self) -> list[tuple[NDArray[np.int64], str]]:
        """Return the sections of `ids`: for each, its first ids, and the name of the array that each part adds."""
        raise NotImplementedError

    def offsets(self) -> dict[str, tuple[str, str | None]]:
        """Return for each array of offsets the name of its lengths, and of the ids it points into.

        None instead of ids means that it counts the entries of the other arrays of offsets (sentences).
        """
        raise NotImplementedError


class DocumentLayout(Layout):
    """The layout of a `DocumentCorpus`. Each document is put between the tokenizer's bos and eos token, if it has them.

    Args:
        tokenizer: turns text into tokens.
        mark_ends: False leaves the bos and eos tokens out.
    """

    name = "documents"
    corpus = DocumentCorpus

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mark_ends: bool) -> None:
        super().__init__(tokenizer)
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id) if mark_ends else (None, None)
        self._begin, self._end = ([] if mark is None else [mark] for mark in marks)

    def encode(self, texts: Sequence[str]) -> Arrays:
        ids, lengths = self.encoder.encode([text for text in texts if text.strip()])
        ends = np.cumsum(lengths)
        ids = np.insert(ids, np.repeat(ends - lengths, len(self._begin)), self._begin * len(lengths))
        ends += len(self._begin) * np.arange(1, len(ends) + 1)
        ids = np.insert(ids, np.repeat(ends, len(self._end)), self._end * len(lengths))
        return {"ids": ids, "document_lengths": lengths + len(self._begin) + len(self._end)}

    def flat(self) -> list[tuple[NDArray[np.int64], str]]:
        return [(np.zeros(0, np.int64), "ids")]

    def offsets(self) -> dict[str, tuple[str, str | None]]:
        return {"document_offsets": ("document_lengths", "ids")}


class SentenceLayout(Layout):
    """The layout of a `TokenizedCorpus`."""

    name = "sentences"
    corpus = TokenizedCorpus

    def encode(self, texts: Sequence[str]) -> Arrays:
        documents = [document for document in map(document_of, texts) if document]
        return encode_sentences(documents, self.encoder)._asdict()

    def flat(self) -> list[tuple[NDArray[np.int64], str]]:
        special = np.array([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])
        return [(special, "opening"), (np.zeros(0, np.int64), "following")]

    def offsets(self) -> dict[str, tuple[str, str | None]]:
        return {
            "opening_offsets": ("opening_lengths", "opening"),
            "following_offsets": ("following_lengths", "following"),
            "document_offsets": ("document_lengths", None),
        }


# --- Opening ----------------------------------------------------------------------------------------------------------


class TokenStore:
    """A complete store, mapped into memory.

    Args:
        path: its folder.
        verify: read all of it and compare the checksums; otherwise only the sizes are compared.

    Attributes:
        corpus: its tokens.
        block_documents: (blocks + 1,) the first document of each block, and the number of documents.
        fingerprint: SHA-256 of the tokens and their layout.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is damaged.
    """

    def __init__(self, path: Path, verify: bool = False) -> None:
        self.path = path
        self.manifest = _manifest(path)
        for name, expected in self.manifest["files"].items():
            _check_file(path / name, expected, verify)
        arrays = {Path(name).stem: np.load(path / name, mmap_mode="r") for name in self.manifest["files"]}
        corpus = {layout.name: layout.corpus for layout in (DocumentLayout, SentenceLayout)}[self.manifest["layout"]]
        self.corpus: Any = corpus(**arrays)
        self.block_documents: list[int] = self.manifest["block_documents"]
        self.fingerprint: str = self.manifest["fingerprint"]

    @property
    def num_blocks(self) -> int:
        return len(self.block_documents) - 1

    def block(self, number: int) -> Any:
        """Return one block as a separate corpus."""
        return self.corpus.part(self.block_documents[number], self.block_documents[number + 1])


def _manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"there is no token store at {path}")
    try:
        manifest = json_file(path / MANIFEST)
        body = json.dumps({key: manifest[key] for key in manifest if key != "checksum"}, sort_keys=True)
        whole = manifest["checksum"] == hashlib.sha256(body.encode()).hexdigest() and manifest["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the token store {path} is damaged: {MANIFEST}: {error}") from error
    if not whole:
        raise ValueError(f"the token store {path} is damaged: the checksum or format in {MANIFEST} does not match")
    return manifest


def _check_file(file: Path, expected: dict[str, Any], verify: bool) -> None:
    size = file.stat().st_size if file.exists() else None
    if size != expected["bytes"]:
        raise ValueError(
            f"the token store {file.parent} is damaged: {file.name} has {size} of {expected['bytes']} bytes"
        )
    if verify and _sha256(file) != expected["sha256"]:
        raise ValueError(f"the token store {file.parent} is damaged: the checksum of {file.name} does not match")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 16):
            digest.update(block)
    return digest.hexdigest()


# --- Building ---------------------------------------------------------------------------------------------------------


def load_or_build_store(
    path: Path,
    sources: Sequence[Source],
    layout: Layout,
    *,
    keep: Keep = lambda text: True,
    block_characters: int = BLOCK_CHARACTERS,
    verify: bool = False,
) -> TokenStore:
    """Open the store at `path`, or build it from the documents for which `keep` is true; see `load_or_build_stores`."""
    stores = load_or_build_stores({path: keep}, sources, layout, block_characters=block_characters, verify=verify)
    return stores[0]


def load_or_build_stores(
    keep: Mapping[Path, Keep],
    sources: Sequence[Source],
    layout: Layout,
    *,
    block_characters: int = BLOCK_CHARACTERS,
    verify: bool = False,
) -> list[TokenStore]:
    """Open stores of the same text, or build the missing ones, continuing an earlier build that was killed.

    The text is read once for all of them. If several processes need the same store at the same time, one builds it and
    the others wait.

    Args:
        keep: for the path of each store, a function that returns whether a document belongs into it. A path must be
            unique to (sources, layout, tokenizer); a mismatch is not detected.
        sources: the sources to tokenize, in this order.
        layout: how to tokenize them.
        block_characters: the least number of characters in a block; documents are not divided.
        verify: compare checksums, and rebuild a damaged store.

    Raises:
        ValueError: the sources hold no document for a store.
        OSError: a store cannot be written.
    """
    from filelock import FileLock

    with ExitStack() as locks:
        for path in keep:
            path.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(path.with_name(f"{path.name}.lock")))
        stores = {path: _whole_store(path, verify) for path in keep}
        missing = {path: keep[path] for path, store in stores.items() if store is None}
        parts_of = _complete_parts(missing, sources, layout, block_characters) if missing else {}
        for path, parts in parts_of.items():
            _assemble(path, parts, layout)
            shutil.rmtree(_building(path), ignore_errors=True)
            stores[path] = TokenStore(path)
    return [store for store in stores.values() if store is not None]


def _whole_store(path: Path, verify: bool) -> TokenStore | None:
    """Return the store at `path`, or None if there is none; a damaged store is removed, with a warning."""
    if not path.exists():
        return None
    try:
        store = TokenStore(path, verify)
    except ValueError as error:
        warnings.warn(f"{error}; it is rebuilt", stacklevel=4)
        remove(path)
        return None
    shutil.rmtree(_building(path), ignore_errors=True)
    return store


def _building(path: Path) -> Path:
    """Return the folder of the parts of a store that is being built."""
    return path.with_name(f"{path.name}.building")


class _Place(NamedTuple):
    """The place in the sources at which to continue."""

    source: int
    position: int


def _complete_parts(
    keep: Mapping[Path, Keep], sources: Sequence[Source], layout: Layout, block_characters: int
) -> dict[Path, list[Path]]:
    """Write the missing parts of stores; return for each store all parts that have a document, in order."""
    plan = hashlib.sha256(
        json.dumps([_FORMAT, layout.name, block_characters, [source.signature for source in sources]]).encode()
    ).hexdigest()
    parts, places = {}, {}
    for path in keep:
        parts[path], places[path] = _parts_so_far(_building(path), plan)
    with Progress("tokenizing", unit="characters") as progress:
        for path, texts, place in _chunks(sources, places, keep, block_characters):
            part = _building(path) / f"{len(parts[path]):06d}.npz"
            arrays = {name: _narrow(array, layout.dtype) for name, array in layout.encode(texts).items()}
            with atomic_file(part) as file:
                np.savez(file, allow_pickle=False, place=np.array(place), **arrays)
            parts[path].append(part)
            progress.advance(sum(map(len, texts)))
    return parts


def _narrow(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return array.astype(dtype) if array.dtype == np.int32 else array


def _parts_so_far(building: Path, plan: str) -> tuple[list[Path], _Place]:
    """Return the parts before the first missing or damaged one, and the place in the sources at which they end.

    Parts of another plan are removed.
    """
    begun = building / "plan"
    if not begun.exists() or begun.read_text(errors="replace") != plan:  # it is a build of another text
        shutil.rmtree(building, ignore_errors=True)
        with atomic_file(begun) as file:
            file.write(plan.encode())
    parts: list[Path] = []
    place = _Place(0, 0)
    while (part := building / f"{len(parts):06d}.npz").exists():
        try:
            with zipfile.ZipFile(part) as archive:
                if archive.testzip() is not None:
                    break
            with np.load(part) as arrays:
                place = _Place(*arrays["place"].tolist())
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, KeyError):
            remove(part)
            break
        parts.append(part)
    return parts, place


def _chunks(
    sources: Sequence[Source], places: Mapping[Path, _Place], keep: Mapping[Path, Keep], block_characters: int
) -> Iterator[tuple[Path, list[str], _Place]]:
    """Yield for a store: its path, a list of documents to tokenize together, and the place after the last of them.

    Continuing from such a place yields the same lists as reading from the beginning. The text is read from the earliest
    place of all stores.
    """
    texts: dict[Path, list[str]] = {path: [] for path in keep}
    characters = dict.fromkeys(keep, 0)
    begin = min(places.values())
    for number in range(begin.source, len(sources)):
        for text, position in sources[number].read(begin.position if number == begin.source else 0):
            place_after = _Place(number, position)
            for path in keep if text.strip() else ():
                if place_after <= places[path] or not keep[path](text):
                    continue
                texts[path].append(text)
                characters[path] += len(text)
                if characters[path] >= block_characters:
                    yield path, texts[path], place_after
                    texts[path], characters[path] = [], 0
    for path, rest in texts.items():
        if rest:
            yield path, rest, _Place(len(sources), 0)


def _assemble(path: Path, parts: Sequence[Path], layout: Layout) -> None:
    block_documents = [0, *accumulate(_array_length(part, "document_lengths") for part in parts)]
    if block_documents[-1] == 0:
        raise ValueError("the corpus is empty: no text to tokenize")
    with atomic_folder(path) as folder:
        starts = _assemble_ids(folder / "ids.npy", parts, layout)
        for name, (lengths, ids) in layout.offsets().items():
            _assemble_offsets(folder / f"{name}.npy", parts, lengths, starts[ids] if ids is not None else 0)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
        }
        manifest = {
            "format": _FORMAT,
            "layout": layout.name,
            "block_documents": block_documents,
            "files": files,
            "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        }
        manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _assemble_ids(file: Path, parts: Sequence[Path], layout: Layout) -> dict[str, int]:
    """Write the ids of all parts into one array; return the start of each section."""
    lengths = {name: sum(_array_length(part, name) for part in parts) for _, name in layout.flat()}
    total = sum(lengths.values()) + sum(len(first) for first, _ in layout.flat())
    whole = np.lib.format.open_memmap(file, mode="w+", dtype=layout.dtype, shape=(total,))
    starts: dict[str, int] = {}
    place = 0
    for first, name in layout.flat():
        whole[place : place + len(first)] = first
        place += len(first)
        starts[name] = place
        for part in parts:
            ids = _array(part, name)
            whole[place : place + len(ids)] = ids
            place += len(ids)
    whole.flush()
    return starts


def _assemble_offsets(file: Path, parts: Sequence[Path], lengths: str, start: int) -> None:
    total = sum(_array_length(part, lengths) for part in parts)
    whole = np.lib.format.open_memmap(file, mode="w+", dtype=np.int64, shape=(total + 1,))
    whole[0] = start
    place = 0
    for part in parts:
        ends = whole[place] + np.cumsum(_array(part, lengths))
        whole[place + 1 : place + 1 + len(ends)] = ends
        place += len(ends)
    whole.flush()


def _array(part: Path, name: str) -> NDArray[Any]:
    with np.load(part) as arrays:
        return arrays[name]


def _array_length(part: Path, name: str) -> int:
    """Return the length of an array without reading it."""
    with zipfile.ZipFile(part) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return int(shape[0])
