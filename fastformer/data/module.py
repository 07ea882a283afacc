"""The Lightning data module for BERT's pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from fastformer.data.corpus import default_corpus, load_corpus, split_documents
from fastformer.data.files import cache_folder
from fastformer.data.objectives import (
    Examples,
    MaskedLanguageModelling,
    check_next_sentence_corpus,
    example_lengths,
    next_sentence_examples,
    single_segment_examples,
)
from fastformer.data.packing import BatchRecipe, BatchStream, PackedBatch, PackedDataset, TokenBudgetSampler
from fastformer.data.tokenized import TokenizedCorpus, load_or_tokenize
from fastformer.data.tokenizer import load_or_train_tokenizer, text_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PretrainingDataModule(LightningDataModule):
    """Packed batches for masked language modelling and next-sentence prediction, as BERT defines them.

    Whole documents are held out for validation; the tokenizer is trained on the others. Segments and masks are drawn
    anew in every pass over the training text and are fixed for validation. All is a function of the text and the
    arguments: a run resumed from a checkpoint, also in the middle of an epoch, gets the very batches that it would have
    got without the interruption. (Gradients that were accumulated but not yet applied are not in a checkpoint: save
    after an optimizer step, as Lightning's `ModelCheckpoint` does.)

    An epoch has as many batches as the first pass over the text. Where pairs are drawn anew, later passes have a few
    more or fewer, and run on into the next epoch, so that nothing is left out.

    Args:
        data: Text files (.txt, a blank line between documents), JSON lines (.jsonl) and parquet with a "text" field,
            folders of these, and folders of datasets.save_to_disk. Default: the English prose of Python's own
            documentation on this machine.
        vocab_size: Size of the tokenizer's vocabulary, trained on the text and kept in the cache.
        max_length: Tokens in the longest sequence, with special tokens.
        tokens_per_batch: The most tokens in a batch of one device; at least max_length.
        next_sentence: Pairs of segments with a label that says whether they belong together. False: single segments.
        whole_word: Mask whole words rather than tokens.
        mask_probability: Share of the tokens to predict.
        heldout_fraction: Share of the documents held out for validation; 0 for no validation.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Of the order, the segments and the masks.
        cache_dir: Folder for the default corpus, tokenizers and tokenized texts. Default: $FASTFORMER_CACHE or
            ~/.cache/fastformer.

    Attributes:
        tokenizer: the trained tokenizer, once `setup` has run.
    """

    tokenizer: PreTrainedTokenizerFast

    def __init__(
        self,
        data: list[str] | None = None,
        vocab_size: int = 8192,
        max_length: int = 128,
        tokens_per_batch: int = 4096,
        next_sentence: bool = True,
        whole_word: bool = False,
        mask_probability: float = 0.15,
        heldout_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if tokens_per_batch < max_length:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} must be at least max_length={max_length}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be in (0, 1), got {mask_probability}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.data = data
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.next_sentence = next_sentence
        self.whole_word = whole_word
        self.mask_probability = mask_probability
        self.heldout_fraction = heldout_fraction
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self._train: PackedDataset | None = None
        self._heldout: PackedDataset | None = None
        self._stream: BatchStream | None = None
        self._settings: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None

    # --- Preparation --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Reads the text, trains the tokenizer and tokenizes, unless all that is in the cache. Runs once per node."""
        self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Takes everything from the cache. Runs in every process."""
        if self._train is None:
            self._prepare()

    def _prepare(self) -> None:
        cache = cache_folder(self.cache_dir)
        documents = load_corpus(self.data) if self.data is not None else default_corpus(cache)
        train, heldout = split_documents(documents, self.heldout_fraction)
        sentences = [sentence for document in train for sentence in document]
        self.tokenizer = load_or_train_tokenizer(cache / "tokenizers", sentences, self.vocab_size)
        masking = MaskedLanguageModelling(self.tokenizer, self.mask_probability, self.whole_word)

        def dataset(documents: list[list[str]], part: str) -> PackedDataset:
            corpus = load_or_tokenize(cache / "tokens", documents, self.tokenizer)
            if self.next_sentence:
                _check_part(corpus, part)
            return PackedDataset(corpus, masking, self.seed)

        self._train = dataset(train, "training part")
        self._heldout = (
            dataset(heldout, f"held-out part (heldout_fraction={self.heldout_fraction})") if heldout else None
        )

    def _examples(self, corpus: TokenizedCorpus, number: int) -> Examples:
        """The examples of a pass over a corpus."""
        if self.next_sentence:
            return next_sentence_examples(corpus, self.max_length, seed=self.seed, epoch=number)
        return single_segment_examples(corpus, self.max_length)

    # --- Batches ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Iterable[PackedBatch]:
        """This process's batches of one epoch, beginning where the trainer stands."""
        train = _prepared(self._train)
        rank, world_size = self._rank()
        self._stream = BatchStream(
            lambda number: self._examples(train.corpus, number),
            self.tokens_per_batch,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        self._settings = self._data_settings(train)
        if self._restored is not None and self._restored["settings"] == self._settings:
            self._stream.batches_per_pass = list(self._restored["batches_per_pass"])
        return _ResumableLoader(train, self._rest_of_epoch, len(self._stream), self.num_workers)

    def val_dataloader(self) -> Iterable[PackedBatch]:
        """This process's batches of the held-out documents, the same every time; none without held-out documents."""
        if self._heldout is None:
            return []
        rank, world_size = self._rank()
        examples = self._examples(self._heldout.corpus, 0)
        sampler = TokenBudgetSampler(
            example_lengths(examples),
            self.tokens_per_batch,
            seed=self.seed,
            shuffle=False,
            rank=rank,
            world_size=world_size,
        )
        recipes = [BatchRecipe(0, examples[batch]) for batch in sampler]
        return _Loader(self._heldout, lambda: recipes, len(recipes), self.num_workers)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _rest_of_epoch(self) -> Iterator[BatchRecipe]:
        """The recipes from the first batch not trained on to the end of the epoch.

        Asked for when the first batch is fetched: by then Lightning has brought its progress into order, wherever the
        checkpoint was written (after a batch, after the last one, after validation, after the epoch).
        """
        assert self._stream is not None
        trained_on, of_this_epoch = self._progress()
        if of_this_epoch and self._restored is not None:
            self._check_settings(self._restored["settings"])
        return islice(self._stream.from_batch(trained_on), len(self._stream) - of_this_epoch)

    def _progress(self) -> tuple[int, int]:
        """The number of batches trained on, in all and in this epoch.

        Lightning's count of epochs is of no use here: resumed from a checkpoint written at the end of one, with
        `max_steps` set, it counts that one twice.
        """
        if self.trainer is None:
            return 0, 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.completed, progress.current.completed

    # --- Resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the batches are a function of, and what it would take time to find again.

        The position is in Lightning's own progress, which counts batches trained on, not batches prepared.
        """
        if self._stream is None:
            return {}
        return {"settings": self._settings, "batches_per_pass": list(self._stream.batches_per_pass)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _data_settings(self, train: PackedDataset) -> dict[str, Any]:
        return {
            "text": train.corpus.fingerprint(),
            "tokenizer": text_fingerprint([self.tokenizer.backend_tokenizer.to_str()]),
            "max_length": self.max_length,
            "tokens_per_batch": self.tokens_per_batch,
            "next_sentence": self.next_sentence,
            "whole_word": self.whole_word,
            "mask_probability": self.mask_probability,
            "seed": self.seed,
            "world_size": self._rank()[1],
        }

    def _check_settings(self, restored: dict[str, Any]) -> None:
        differences = [
            f"{name} was {restored.get(name)}, is {value}"
            for name, value in self._settings.items()
            if restored.get(name) != value
        ]
        if differences:
            raise ValueError(
                "the checkpoint is from the middle of an epoch, which cannot be continued with other data settings "
                f"({'; '.join(differences)}); resume with the same, or start anew from its weights"
            )


def _check_part(corpus: TokenizedCorpus, part: str) -> None:
    try:
        check_next_sentence_corpus(corpus)
    except ValueError as error:
        raise ValueError(
            f"{part}: {error}; or set next_sentence=False, or another heldout_fraction for more documents here"
        ) from error


def _prepared(dataset: PackedDataset | None) -> PackedDataset:
    if dataset is None:
        raise RuntimeError("the data is not ready: call setup() first")
    return dataset


class _Loader:
    """Batches of a dataset. (Not a DataLoader: in distributed training Lightning would shard it a second time.)"""

    def __init__(
        self,
        dataset: PackedDataset,
        recipes: Callable[[], Iterable[BatchRecipe]],
        length: int,
        num_workers: int,
    ) -> None:
        self.dataset = dataset
        self._recipes = recipes
        self._length = length
        self._num_workers = num_workers

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[PackedBatch]:
        yield from DataLoader(
            self.dataset,
            batch_sampler=self._recipes(),  # type: ignore[arg-type]  # a recipe stands for the indices of a batch
            collate_fn=_as_is,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the global one alone, on which a resumed run's dropout depends
        )


class _ResumableLoader(_Loader):
    """Declares to Lightning, by having a state, that the batches go on in the middle of an epoch.

    The state is empty: the position is in Lightning's progress, the rest in the data module.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


def _as_is(batch: Any) -> Any:
    return batch
