"""From text to a tokenizer and two token stores, to train on and held out: made once, then found in the cache."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastformer.data.pretraining.sources import Source, stream
from fastformer.data.pretraining.splitting import Split, find_split
from fastformer.data.pretraining.store import BLOCK_CHARACTERS, Layout, TokenStore, load_or_build_store
from fastformer.data.pretraining.tokenizer import Objective, load_or_make_tokenizer, train_tokenizer
from fastformer.files import read_checked, remove, write_checked
from fastformer.lines import json_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 1


class PreparedCorpus(NamedTuple):
    """What training needs of a text.

    Attributes:
        tokenizer: trained on the part to train on.
        train: that part.
        heldout: the other part; None where nothing is held out.
    """

    tokenizer: PreTrainedTokenizerFast
    train: TokenStore
    heldout: TokenStore | None


def prepare_corpus(
    sources: Sequence[Source],
    folder: Path,
    objective: Objective,
    make_layout: Callable[[PreTrainedTokenizerFast], Layout],
    *,
    vocab_size: int,
    heldout_fraction: float,
    block_characters: int = BLOCK_CHARACTERS,
    verify: bool = False,
) -> PreparedCorpus:
    """Splits the documents, trains the tokenizer and tokenizes, unless that is kept below `folder`.

    Each step is kept when it is done, and tokenizing in parts, so that one that was killed goes on where it stopped.

    Args:
        sources: of the text.
        folder: what is kept has a folder of its own here, named after all that it depends on.
        objective: what the tokenizer is for.
        make_layout: how to tokenize with it.
        vocab_size, heldout_fraction: see `train_tokenizer` and `find_split`.
        block_characters, verify: see `load_or_build_store`.

    Raises:
        ValueError: an argument is out of range, or the text is empty, damaged, or too little to split.
    """
    settings = [_FORMAT, objective, vocab_size, heldout_fraction, block_characters, *(s.signature for s in sources)]
    path = folder / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    split = _load_or_find_split(path / "split.json", sources, heldout_fraction)

    def train() -> PreTrainedTokenizerFast:
        return train_tokenizer(filter(split.is_sampled, stream(sources)), vocab_size, objective)

    tokenizer = load_or_make_tokenizer(path / "tokenizer", train)
    layout = make_layout(tokenizer)

    def store(part: str, keep: Callable[[str], bool]) -> TokenStore:
        return load_or_build_store(
            path / f"{part}-{layout.name}",
            sources,
            layout,
            keep=keep,
            block_characters=block_characters,
            verify=verify,
        )

    return PreparedCorpus(
        tokenizer,
        store("train", split.is_for_training),
        store("heldout", split.is_heldout) if heldout_fraction else None,
    )


def _load_or_find_split(path: Path, sources: Sequence[Source], heldout_fraction: float) -> Split:
    if path.exists():
        try:
            return Split(**json_value(read_checked(path).decode(), path.name))
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is made anew", stacklevel=2)
            remove(path)
    if not any(True for _ in stream(sources)):
        raise ValueError(f"the corpus is empty: no text in {', '.join(source.name for source in sources)}")
    split = find_split(stream(sources), heldout_fraction)
    write_checked(path, json.dumps(split._asdict()).encode())
    return split
