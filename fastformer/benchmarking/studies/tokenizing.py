"""Tokenizing and packing on one core: speed compared with the library `tokenizers`, and memory as the text grows."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import transformers
from tokenizers import Tokenizer

from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, TIME, Goal, Measurement, Metric
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.data.packing import TokenBudgetSampler, pack
from fastformer.data.pretraining.encoding import TextEncoder
from fastformer.data.pretraining.python_documentation import python_documentation
from fastformer.data.pretraining.sources import open_sources
from fastformer.data.pretraining.store import DocumentLayout, load_or_build_store
from fastformer.data.pretraining.tokenizer import train_tokenizer

SPEED = Metric("speed", "MB/s", higher_is_better=True)
SMALL, LARGE = "a small text: stored, packed", "8 times that text: stored, packed"
THEIRS = "tokenizers"
MEGABYTE = 10**6
LENGTH, TOKENS_PER_BATCH = 512, 16384


@cache
def code(characters: int) -> list[str]:
    """Source files of an installed library with at least `characters` characters together, or all files."""
    paths = sorted(Path(transformers.__file__).parent.rglob("*.py"))
    return _first(characters, (path.read_text(encoding="utf-8") for path in paths))


@cache
def prose(characters: int) -> list[str]:
    """Texts of Python's documentation with at least `characters` characters together, or all texts."""
    return _first(characters, ("\n\n".join(paragraphs) for paragraphs in python_documentation()))


def _first(characters: int, texts: Iterator[str]) -> list[str]:
    """The first texts that together have at least `characters` characters, or all texts."""
    chosen: list[str] = []
    while characters > 0 and (text := next(texts, None)) is not None:
        chosen.append(text)
        characters -= len(text)
    return chosen


@cache
def tokenizer(texts: Callable[[int], list[str]], characters: int):
    """A tokenizer trained on the first quarter of the text."""
    return train_tokenizer(texts(characters // 4), 16384 if characters > MEGABYTE else 1000, "clm")


def cases(setting: Setting) -> list[Case]:
    size = _size(setting)
    made = []
    for name, texts in (("prose", prose), ("source code", code)):
        work = {"bytes": float(sum(len(text.encode()) for text in texts(size)))}
        for state, again in (("for the first time", False), ("again", True)):
            peers = {OURS: Peer(partial(ours, texts, size, again)), THEIRS: Peer(partial(theirs, texts, size))}
            made.append(Case(f"{name}, {state}", peers, work, equal_tokens))
    for name, times in ((SMALL, 1), (LARGE, 8)):
        work = {"bytes": float(sum(len(text.encode()) for text in code(times * size)))}
        made.append(Case(name, {OURS: Peer(partial(stored_and_packed, times, size))}, work))
    return made


def _size(setting: Setting) -> int:
    return MEGABYTE // 20 if setting.quick else 4 * MEGABYTE


def ours(texts: Callable[[int], list[str]], characters: int, again: bool) -> Run:
    trained, given = tokenizer(texts, characters), texts(characters)
    encoder = TextEncoder(trained)
    return lambda: (encoder if again else TextEncoder(trained)).encode(given)


def theirs(texts: Callable[[int], list[str]], characters: int) -> Run:
    backend, given = Tokenizer.from_str(tokenizer(texts, characters).backend_tokenizer.to_str()), texts(characters)
    backend.encode_special_tokens = True  # as plain text

    def run() -> tuple[np.ndarray, np.ndarray]:
        encodings = backend.encode_batch_fast(given, add_special_tokens=False)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return np.concatenate(ids), np.array(list(map(len, ids)))

    return run


def equal_tokens(results: dict[str, object]) -> None:
    for mine, other in zip(results[OURS], results[THEIRS], strict=True):  # type: ignore[call-overload]
        np.testing.assert_array_equal(mine, other)


def stored_and_packed(times: int, size: int) -> Run:
    """A run that builds a store on the disk from text files, and reads all its tokens once in packed batches."""
    trained = tokenizer(code, size)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "text.txt")
    with path.open("w", encoding="utf-8") as file:
        for text in code(times * size):
            file.write(re.sub(r"\n\s*\n", "\n", text.strip()) + "\n\n")  # a blank line ends a document
    code.cache_clear()

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=folder.name) as built:
            layout = DocumentLayout(trained, mark_ends=True)
            store = load_or_build_store(Path(built, "store"), open_sources([path]), layout, block_characters=size // 4)
            return sum(len(batch["input_ids"]) for batch in _batches(store.corpus.ids))

    return run


def _batches(ids: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    starts = np.arange(0, len(ids), LENGTH)
    lengths = np.minimum(LENGTH, len(ids) - starts)
    for batch in TokenBudgetSampler(lengths, TOKENS_PER_BATCH, seed=0):
        yield pack([ids[starts[place] : starts[place] + lengths[place]] for place in batch])


@dataclass(frozen=True, kw_only=True)
class TokenizingStudy(TimedStudy):
    """A study on one core that also gives times as speeds, and compares the memory of two sizes of text."""

    def measure(self, setting: Setting) -> Iterator[Measurement]:
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            for found in super().measure(setting):
                yield found
                if found.metric == TIME and found.values:
                    speeds = [found.work["bytes"] / MEGABYTE / seconds for seconds in found.values]
                    yield replace(found, metric=SPEED, values=speeds)
            yield from self._memory(setting)
        finally:
            del os.environ["TOKENIZERS_PARALLELISM"]
            if before is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = before

    def _memory(self, setting: Setting) -> Iterator[Measurement]:
        large = next(case for case in self.cases(setting) if case.name == LARGE)
        missing = None if Path("/proc/self/status").exists() else "memory can be measured only on Linux"
        for peer, times in ((OURS, 8), ("the small text", 1)):
            values = []
            if missing is None:
                command = [sys.executable, "-m", __name__, str(times), str(_size(setting))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                values = [float(done.stdout.split()[-1])]
            yield self._measurement(large, peer, PEAK_MEMORY, values, missing)


def peak_mebibytes(run: Run) -> float:
    """The most MiB of anonymous memory that a run takes, read every 0.01 seconds.

    Pages of the files that a store maps do not count: the operating system can take them back.
    """
    stored_and_packed(1, 10_000)()  # triggers lazy imports
    gc.collect()
    before = most = _anonymous_bytes()
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(run)
        while not running.done():
            most = max(most, _anonymous_bytes())
            time.sleep(0.01)
        running.result()
    return (most - before) / 2**20


def _anonymous_bytes() -> int:
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


STUDY = TokenizingStudy(
    name="tokenizing",
    title="tokenizing and packing text on one core",
    cases=cases,
    rounds=3,
    goals=(
        Goal("prose", None, SPEED, at_least=5.0),
        Goal("source code", None, SPEED, at_least=5.0),
        Goal(SMALL, None, SPEED, at_least=5.0),
        Goal(LARGE, None, SPEED, at_least=5.0),
        Goal(LARGE, "the small text", PEAK_MEMORY, at_most=1.25),
    ),
    note="The small text is 4 MB of source code. The tokenizer is trained on a quarter of it. Memory is what storing "
    "and packing add to the memory of the tokenizer.",
)


if __name__ == "__main__":
    print(peak_mebibytes(stored_and_packed(*map(int, sys.argv[1:]))))
