"""Byte-level BPE tokenizers with the special tokens that an objective needs, trained on the corpus at hand.

Byte-level byte-pair encoding: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastformer.files import atomic_folder, check_folder, remove, write_checksums

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Objective = Literal["mlm", "clm", "span-corruption", "denoising"]

SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""The tokens that stand for spans left out, in the order of the spans in a text (T5)."""

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.spm")
"""Patterns of the files that may hold a tokenizer's vocabulary."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_FORMAT = 2
_LONGEST_WORD = 1024
"""Longest word, in bytes, in which training counts merges; longer runs of letters or spaces are divided."""


class _Kind(NamedTuple):
    """The special tokens of a kind of tokenizer, and their places around texts.

    `named` maps Hugging Face's names to the tokens, in the order of their ids.
    """

    named: dict[str, str]
    extra: tuple[str, ...] = ()
    single: str = "$A:0"
    pair: str = "$A:0 $B:0"
    token_types: bool = False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return (*dict.fromkeys(self.named.values()), *self.extra)


_KINDS: dict[str, _Kind] = {
    "mlm": _Kind(
        dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True)),
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        token_types=True,
    ),
    "clm": _Kind({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}, single="<s>:0 $A:0"),
    "span-corruption": _Kind(
        {"pad_token": "<pad>", "eos_token": "</s>"},
        extra=SENTINELS,
        single="$A:0 </s>:0",
        pair="$A:0 </s>:0 $B:0 </s>:0",
    ),
    "denoising": _Kind(
        {
            "bos_token": "<s>",
            "cls_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "mask_token": "<mask>",
        },
        single="<s>:0 $A:0 </s>:0",
        pair="<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0",
    ),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, objective: Objective = "mlm") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. The same texts give the same tokenizer, and it loses no character.

    The special tokens, and their places around one text (A) or two (A, B), depend on the objective:

    - ``mlm`` (BERT): ``[CLS] A [SEP] B [SEP]``, with token types 0 and 1; ``[MASK]``, ``[PAD]``, ``[UNK]``.
    - ``clm``: ``<s> A``; ``</s>`` marks the end of a complete text; ``<pad>``.
    - ``span-corruption`` (T5): ``A </s>``; ``<extra_id_0>`` to ``<extra_id_99>``; ``<pad>``.
    - ``denoising`` (BART): ``<s> A </s>``, ``<s> A </s> </s> B </s>``; ``<mask>``, ``<pad>``.

    As always with Hugging Face, a special token spelled out in a text becomes that token (unless
    ``split_special_tokens=True``). A mask token stands for a word together with the space before it.

    Args:
        texts: at least one text.
        vocab_size: size of the vocabulary with the special tokens; at least the special tokens and one token per byte.
            The vocabulary is smaller if the texts hold no more pairs to merge.
        objective: the objective that the tokenizer is for.
    """
    kind = tokenizer_kind(objective)
    smallest = 256 + len(kind.special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (bytes and special tokens), got {vocab_size}")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=kind.named.get("unk_token")))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Training time grows with the square of the longest word: a file of DNA bases would never finish.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=_LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    mask = kind.named.get("mask_token")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[
            AddedToken(token, lstrip=True, special=True) if token == mask else token for token in kind.special_tokens
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    placed = [token for token in kind.special_tokens if f"{token}:" in kind.pair + kind.single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=kind.single, pair=kind.pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in placed]
    )
    named: dict[str, Any] = dict(kind.named)
    if mask is not None:
        named["mask_token"] = AddedToken(mask, lstrip=True, special=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        extra_special_tokens=list(kind.extra),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", *(["token_type_ids"] if kind.token_types else []), "attention_mask"],
    )


def tokenizer_kind(objective: str) -> _Kind:
    """Return the kind of tokenizer for an objective; raise ValueError if the objective is unknown."""
    if objective not in _KINDS:
        raise ValueError(f"objective must be one of {', '.join(_KINDS)}, got {objective!r}")
    return _KINDS[objective]


def load_or_make_tokenizer(path: Path, make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Load the tokenizer in the folder `path`; if there is none or it is damaged, make it and save it there."""
    from transformers import PreTrainedTokenizerFast

    if path.exists():
        try:
            check_folder(path)
            return PreTrainedTokenizerFast.from_pretrained(path)
        except Exception as error:  # a damaged file raises many kinds
            warnings.warn(f"the tokenizer in {path} is damaged ({error}) and is trained again", stacklevel=2)
            remove(path)
    tokenizer = make()
    with atomic_folder(path) as temporary:
        try:
            tokenizer.save_pretrained(temporary)
        except OSError:
            raise
        except Exception as error:  # the tokenizers library has no special error for a failed write
            raise OSError(f"cannot save the tokenizer to {path}: {error}") from error
        write_checksums(temporary)
    return tokenizer


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer in a model's folder, in Hugging Face's format. Code in the folder is never run.

    Raises:
        ValueError: there is no tokenizer, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(
            f"no tokenizer can be read from {folder}: tokenizer.json or tokenizer_config.json is missing or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error
    return tokenizer


def check_tokenizer(folder: Path) -> None:
    """Check the files of the tokenizer in a model's folder, if it has one.

    A tokenizer without a vocabulary file is checked by loading it.

    Raises:
        ValueError: one of the files is missing or damaged.
    """
    from tokenizers import Tokenizer

    tokenizer, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if config.exists():
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{config} is damaged: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{config} is damaged: it must hold a JSON object")
    if tokenizer.exists():
        try:
            Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library has no special error
            raise ValueError(f"{tokenizer} is damaged, or holds no tokenizer: {error}") from error
    elif config.exists() and not any(path.is_file() for name in VOCABULARIES for path in folder.glob(name)):
        load_tokenizer(folder)  # some byte tokenizers need no vocabulary file


def text_fingerprint(texts: Iterable[str]) -> str:
    """Return the SHA-256 of a sequence of texts and their ends, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
