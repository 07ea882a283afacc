"""Make a tokenizer and two token stores (training and held out) from text, once; later runs find them in the cache."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fastformer.data.pretraining.sources import Source, stream
from fastformer.data.pretraining.splitting import Split, find_split_and_sample
from fastformer.data.pretraining.store import BLOCK_CHARACTERS, Layout, TokenStore, load_or_build_stores
from fastformer.data.pretraining.tokenizer import Objective, load_or_make_tokenizer, train_tokenizer
from fastformer.files import read_checked, remove, write_checked
from fastformer.lines import json_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 1


@dataclass(frozen=True)
class PreparedText:
    """A text divided into a training part and a held-out part, with its tokenizer.

    Attributes:
        tokenizer: trained on the training part.
        folder: the cache for everything made from this text.
        sources: the sources of the text.
        split: the rule that decides which documents are held out.
        heldout: whether any document is held out.
        block_characters: see `load_or_build_stores`.
    """

    tokenizer: PreTrainedTokenizerFast
    folder: Path
    sources: Sequence[Source]
    split: Split
    heldout: bool
    block_characters: int

    def stores(self, layout: Layout, verify: bool = False) -> tuple[TokenStore, TokenStore | None]:
        """Return the stores of the training part and the held-out part (None if there is none).

        The text is read once for both.

        Args:
            layout: how to tokenize the text; it has this text's tokenizer.
            verify: see `load_or_build_stores`.

        Raises:
            ValueError: a part has no document.
        """
        keep = {"train": self.split.is_for_training}
        if self.heldout:
            keep["heldout"] = self.split.is_heldout
        train, *heldout = load_or_build_stores(
            {self.folder / f"{part}-{layout.name}": keep[part] for part in keep},
            self.sources,
            layout,
            block_characters=self.block_characters,
            verify=verify,
        )
        return train, heldout[0] if heldout else None


def prepare_text(
    sources: Sequence[Source],
    folder: Path,
    objective: Objective,
    *,
    vocab_size: int,
    heldout_fraction: float,
    block_characters: int = BLOCK_CHARACTERS,
) -> PreparedText:
    """Split the documents and train the tokenizer, or find both below `folder`.

    The text is read once for both. The result of each step is kept.

    Args:
        sources: sources of the text.
        folder: the cache; results are kept in a subfolder, named after everything they depend on.
        objective: the objective that the tokenizer is for.
        vocab_size, heldout_fraction: see `train_tokenizer` and `find_split_and_sample`.
        block_characters: see `load_or_build_stores`.

    Raises:
        ValueError: an argument is out of range, or the text is empty, damaged, or too short to split.
    """
    settings = [_FORMAT, objective, vocab_size, heldout_fraction, block_characters, *(s.signature for s in sources)]
    path = folder / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    split, sample = _load_or_find_split(path / "split.json", sources, heldout_fraction)
    tokenizer = load_or_make_tokenizer(path / "tokenizer", lambda: train_tokenizer(sample, vocab_size, objective))
    return PreparedText(tokenizer, path, sources, split, bool(heldout_fraction), block_characters)


def _load_or_find_split(path: Path, sources: Sequence[Source], heldout_fraction: float) -> tuple[Split, Iterable[str]]:
    """Return the split, and the documents to train a tokenizer on; iterating over them reads the text."""
    if path.exists():
        try:
            split = Split(**json_value(read_checked(path).decode(), path.name))
            return split, filter(split.is_sampled, stream(sources))
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is rebuilt", stacklevel=2)
            remove(path)
    texts = stream(sources)
    first = next(texts, None)
    if first is None:
        raise ValueError(f"the corpus is empty: no text in {', '.join(source.name for source in sources)}")
    split, sample = find_split_and_sample(chain([first], texts), heldout_fraction)
    write_checked(path, json.dumps(split._asdict()).encode())
    return split, sample
