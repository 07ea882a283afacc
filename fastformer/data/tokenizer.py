"""A byte-level BPE tokenizer with BERT's special tokens, trained on the corpus at hand.

Byte-level byte-pair encoding: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastformer.data.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

_FORMAT = 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer.

    It encodes one text as ``[CLS] A [SEP]`` with token types 0 and two as ``[CLS] A [SEP] B [SEP]`` with token types 0
    and 1, and loses no character. As everywhere at Hugging Face, a special token spelled out in a text is that token
    (unless ``split_special_tokens=True``); ``[MASK]`` stands for a word together with the space before it.

    Args:
        texts: at least one text.
        vocab_size: size of the vocabulary with the five special tokens, at least 261 (a token for every byte). Fewer
            tokens result if the texts hold no more pairs to merge.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY} (bytes and special tokens), got {vocab_size}"
        )
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    mask_token = AddedToken("[MASK]", lstrip=True, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS[:-1], mask_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token=mask_token,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def load_or_train_tokenizer(
    folder: str | os.PathLike[str], texts: Sequence[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """The tokenizer trained on these texts with this vocabulary size, kept in a folder of its own below `folder`.

    The folder's name carries the vocabulary size and a fingerprint of the texts, so a tokenizer trained on anything
    else is never taken for it. A damaged one is trained anew, with a warning.

    Raises:
        OSError: the tokenizer cannot be saved; nothing half-written remains.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(folder) / f"bpe-{vocab_size}-{text_fingerprint(texts)[:16]}-v{_FORMAT}"
    if path.exists():
        try:
            return PreTrainedTokenizerFast.from_pretrained(path)
        except Exception as error:  # a damaged file raises many kinds
            warnings.warn(f"the tokenizer in {path} is damaged ({error}) and is trained anew", stacklevel=2)
            shutil.rmtree(path)
    tokenizer = train_tokenizer(texts, vocab_size)
    with atomic_folder(path) as temporary:
        try:
            tokenizer.save_pretrained(temporary)
        except OSError:
            raise
        except Exception as error:  # what the tokenizers library raises for a failing write is nothing more special
            raise OSError(f"cannot save the tokenizer to {path}: {error}") from error
    return tokenizer


def text_fingerprint(texts: Iterable[str]) -> str:
    """SHA-256 of a sequence of texts and of where each ends, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
