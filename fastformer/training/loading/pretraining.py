"""The Lightning data module for pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fastformer.data.packing import TokenBudgetSampler
from fastformer.data.pretraining.batches import BatchRecipe, BatchStream, PackedDataset
from fastformer.data.pretraining.bert import Examples
from fastformer.data.pretraining.corpus import default_corpus
from fastformer.data.pretraining.corruption import SpanNoise
from fastformer.data.pretraining.objectives import (
    CausalLanguage,
    Denoising,
    MaskedLanguage,
    PretrainingObjective,
    SpanCorruption,
)
from fastformer.data.pretraining.preparation import prepare_text
from fastformer.data.pretraining.sources import Source, open_sources, texts_source
from fastformer.data.pretraining.store import TokenStore
from fastformer.data.pretraining.tokenizer import Objective, text_fingerprint, tokenizer_kind
from fastformer.data.randomness import Stream, generator
from fastformer.data.shapes import FewShapes
from fastformer.files import cache_folder
from fastformer.training.loading.resuming import ResumableDataModule, check_workers
from fastformer.training.loading.steps import with_label_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A block has 16 million characters: a pass over a larger text draws batches from 256 million characters at a time.
_BLOCKS_PER_PASS = 16


class PretrainingDataModule(ResumableDataModule):
    """Packed batches for a pretraining objective, by default BERT's.

    Whole documents are held out for validation; the tokenizer is trained on the others. Every pass over the training
    text draws new segments and masks; for validation they are fixed. Batches depend only on the text and the arguments.
    A run resumed from a checkpoint, also in the middle of an epoch, gets the same batches as an uninterrupted run. (A
    checkpoint does not hold accumulated gradients: save after an optimizer step, as Lightning's `ModelCheckpoint`
    does.) The batches of all devices together form one sequence, which does not depend on the number of devices, so a
    run may be resumed on more or fewer devices.

    The text is tokenized once, into a store on the disk. From a large text, batches are drawn from 256 million
    characters at a time, in parts of 16 million in random order, so that memory does not grow with the text.

    An epoch has as many batches as the first pass over the text, plus a few if needed for whole optimizer steps. If
    pairs are drawn again in each pass, later passes have a few batches more or fewer. Passes continue into the next
    epoch, so that nothing is left out.

    Args:
        data: Text files (.txt, a blank line between documents), JSON lines (.jsonl) and parquet with a "text" field,
            folders of these, and folders of datasets.save_to_disk. Default: the English prose of Python's own
            documentation on this machine.
        objective: The model predicts, for mlm (BERT), masked tokens and whether pairs of segments belong together; for
            clm (GPT), the next token; for span-corruption (T5), spans left out of the text; for denoising (BART), a
            text from a copy with masked spans and with sentences in another order.
        vocab_size: Size of the tokenizer's vocabulary, trained on the text and kept in the cache.
        max_length: Tokens in the longest sequence, with special tokens; for span-corruption and denoising, in the
            longest source.
        tokens_per_batch: The most tokens in a batch of one device, sources and targets together; at least max_length,
            or twice that for span-corruption and denoising.
        next_sentence: For mlm: pairs of segments with a label that says whether they belong together. False: single
            segments.
        sentence_order: For mlm: the label says instead whether the two segments were swapped (ALBERT).
        whole_word: For mlm: mask whole words instead of tokens.
        mask_probability: Share of the tokens to predict (mlm), to leave out (span-corruption) or to mask (denoising).
            Default: 0.3 for denoising, else 0.15.
        permute_sentences: For denoising: put the sentences in random order.
        heldout_fraction: Share of the documents held out for validation; 0 for no validation.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the order, the segments and the masks.
        cache_dir: Folder for the default corpus, tokenizers and tokenized texts. Default: $FASTFORMER_CACHE or
            ~/.cache/fastformer.
        few_shapes: Pad training batches to few shapes (`fastformer.data.shapes`), for CUDA graphs.

    Attributes:
        tokenizer: the trained tokenizer, available after `setup`.
    """

    tokenizer: PreTrainedTokenizerFast

    def __init__(
        self,
        data: list[str] | None = None,
        objective: Objective = "mlm",
        vocab_size: int = 8192,
        max_length: int = 128,
        tokens_per_batch: int = 4096,
        next_sentence: bool = True,
        sentence_order: bool = False,
        whole_word: bool = False,
        mask_probability: float | None = None,
        permute_sentences: bool = True,
        heldout_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
        few_shapes: bool = False,
    ) -> None:
        super().__init__()
        tokenizer_kind(objective)
        if tokens_per_batch < max_length:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} must be at least max_length={max_length}")
        if objective in ("span-corruption", "denoising") and tokens_per_batch < 2 * max_length:
            raise ValueError(
                f"tokens_per_batch={tokens_per_batch} must be at least twice max_length={max_length} for {objective}: "
                "it counts sources and targets"
            )
        if sentence_order and not next_sentence:
            raise ValueError("sentence_order=True is about pairs of segments; it needs next_sentence=True")
        for name, given, objectives in (
            ("next_sentence", not next_sentence, ("mlm",)),
            ("sentence_order", sentence_order, ("mlm",)),
            ("whole_word", whole_word, ("mlm",)),
            ("mask_probability", mask_probability is not None, ("mlm", "span-corruption", "denoising")),
            ("permute_sentences", not permute_sentences, ("denoising",)),
        ):
            if given and objective not in objectives:
                raise ValueError(f"{name} is for objective {', '.join(objectives)}, not {objective}")
        if mask_probability is None:
            mask_probability = 0.3 if objective == "denoising" else 0.15
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be in (0, 1), got {mask_probability}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        check_workers(num_workers)
        self.data = data
        self.objective = objective
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.next_sentence = next_sentence
        self.sentence_order = sentence_order
        self.whole_word = whole_word
        self.mask_probability = mask_probability
        self.permute_sentences = permute_sentences
        self.heldout_fraction = heldout_fraction
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.few_shapes = few_shapes
        self._predicting: PretrainingObjective | None = None
        self._train: TokenStore | None = None
        self._heldout: TokenStore | None = None
        self._stream: BatchStream | None = None
        self._settings: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None

    # --- Preparation --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read the text, train the tokenizer and tokenize, unless the cache has the results. Runs once per node."""
        self._prepare(verify=True)

    def setup(self, stage: str | None = None) -> None:
        """Load everything from the cache. Runs in every process."""
        if self._train is None:
            self._prepare(verify=False)

    def _prepare(self, verify: bool) -> None:
        cache = cache_folder(self.cache_dir)
        text = prepare_text(
            self._sources(cache),
            cache / "corpora",
            self.objective,
            vocab_size=self.vocab_size,
            heldout_fraction=self.heldout_fraction,
        )
        self.tokenizer = text.tokenizer
        self._predicting = self._make_objective(text.tokenizer)
        train, heldout = text.stores(self._predicting.layout, verify)
        _check_part(self._predicting, train, "training part")
        if heldout is not None:
            _check_part(self._predicting, heldout, f"held-out part (heldout_fraction={self.heldout_fraction})")
        self._train, self._heldout = train, heldout

    def _sources(self, cache: Any) -> Sequence[Source]:
        if self.data is not None:
            return open_sources(self.data)
        return [texts_source(["\n".join(document) for document in default_corpus(cache)], "the default corpus")]

    def _make_objective(self, tokenizer: PreTrainedTokenizerFast) -> PretrainingObjective:
        if self.objective == "clm":
            return CausalLanguage(tokenizer, self.max_length)
        if self.objective == "span-corruption":
            return SpanCorruption(tokenizer, self.max_length, SpanNoise(self.mask_probability))
        if self.objective == "denoising":
            return Denoising(tokenizer, self.max_length, self.mask_probability, self.permute_sentences)
        return MaskedLanguage(
            tokenizer,
            self.max_length,
            self.next_sentence,
            self.sentence_order,
            self.whole_word,
            self.mask_probability,
        )

    def _examples(self, store: TokenStore, blocks: Iterable[int], number: int) -> Examples:
        """Return the examples of some blocks of a store, for the pass of this number."""
        assert self._predicting is not None
        parts = [self._predicting.examples(store, block, seed=self.seed, epoch=number) for block in blocks]
        examples = np.concatenate(parts)
        examples["index"] = np.arange(len(examples))
        return examples

    # --- Batches ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Iterable[Any]:
        """Return this process's batches of one epoch from the trainer's position on, with their `label_counts`."""
        train, predicting = _prepared(self._train, self._predicting)
        rank, world_size = self.rank()
        passes = -(-train.num_blocks // _BLOCKS_PER_PASS)

        def examples_of_pass(number: int) -> Examples:
            epoch, part = divmod(number, passes)
            order = generator(self.seed, Stream.BLOCKS, epoch, 0).permutation(train.num_blocks)
            return self._examples(train, np.array_split(order, passes)[part].tolist(), number)

        self._stream = BatchStream(
            examples_of_pass,
            self.tokens_per_batch,
            seed=self.seed,
            example_lengths=predicting.lengths,
            passes_per_epoch=passes,
            best_fit=predicting.best_fit,
            rank=rank,
            world_size=world_size,
        )
        self._settings = self._data_settings(train)
        if self._restored is not None and self._restored["settings"] == self._settings:
            self._stream.batches_per_pass = list(self._restored["batches_per_pass"])
        make_batch: Callable[..., Any] = predicting.batch
        if self.few_shapes:
            make_batch = FewShapes(make_batch, self.tokens_per_batch, self.max_length)
        dataset = PackedDataset(train.corpus, make_batch, self.seed)
        length = self.epoch(len(self._stream))
        return _ResumableLoader(self, dataset, self._rest_of_epoch, length)

    def val_dataloader(self) -> Iterable[Any]:
        """Return this process's batches of the held-out documents, the same every time; none if there are none."""
        if self._heldout is None:
            return []
        heldout, predicting = _prepared(self._heldout, self._predicting)
        rank, world_size = self.rank()
        examples = self._examples(heldout, range(heldout.num_blocks), 0)
        sampler = TokenBudgetSampler(
            predicting.lengths(examples),
            self.tokens_per_batch,
            seed=self.seed,
            shuffle=False,
            rank=rank,
            world_size=world_size,
        )
        recipes = [BatchRecipe(0, examples[batch]) for batch in sampler]
        dataset = PackedDataset(heldout.corpus, predicting.batch, self.seed)
        return _Loader(self, dataset, lambda: recipes, len(recipes))

    def _rest_of_epoch(self) -> Iterator[BatchRecipe]:
        """Return the recipes from the first batch that is not trained on yet to the end of the epoch.

        This is called when the first batch is fetched. By then Lightning's progress is correct, whenever the checkpoint
        was written (after a batch, after the last batch, after validation, after the epoch).
        """
        assert self._stream is not None
        of_this_epoch = self.batches_done()[1]
        if of_this_epoch and self._restored is not None:
            self._check_settings(self._restored["settings"])
        rest = self.epoch(len(self._stream)) - of_this_epoch
        return islice(self._stream.from_batch(self.batches_of_all_ranks()), rest)

    # --- Resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the batches, and the sizes of passes, which are slow to compute again.

        The position is in Lightning's own progress, which counts batches trained on, not batches prepared.
        """
        if self._stream is None:
            return {}
        return {
            "settings": self._settings,
            "batches_per_pass": list(self._stream.batches_per_pass),
            **super().state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        super().load_state_dict(state_dict)

    def _data_settings(self, train: TokenStore) -> dict[str, Any]:
        return {
            "text": train.fingerprint,
            "objective": self.objective,
            "tokenizer": text_fingerprint([self.tokenizer.backend_tokenizer.to_str()]),
            "max_length": self.max_length,
            "tokens_per_batch": self.tokens_per_batch,
            "next_sentence": self.next_sentence,
            "sentence_order": self.sentence_order,
            "whole_word": self.whole_word,
            "mask_probability": self.mask_probability,
            "permute_sentences": self.permute_sentences,
            "seed": self.seed,
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
                f"({'; '.join(differences)}); resume with the same settings, or start a new run from its weights"
            )


def _check_part(predicting: PretrainingObjective, store: TokenStore, part: str) -> None:
    try:
        predicting.check(store.corpus)
    except ValueError as error:
        raise ValueError(
            f"{part}: {error}; or set next_sentence=False, or another heldout_fraction for more documents here"
        ) from error


def _prepared(
    store: TokenStore | None, predicting: PretrainingObjective | None
) -> tuple[TokenStore, PretrainingObjective]:
    if store is None or predicting is None:
        raise RuntimeError("the data is not ready: call setup() first")
    return store, predicting


class _Loader:
    """Batches of a dataset. (Not a DataLoader: in distributed training Lightning would shard it a second time.)"""

    def __init__(
        self,
        data: ResumableDataModule,
        dataset: PackedDataset,
        recipes: Callable[[], Iterable[BatchRecipe]],
        length: int,
    ) -> None:
        self.data = data
        self.dataset = dataset
        self._recipes = recipes
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        yield from self.data.load(self.dataset, self._recipes(), _as_is)  # a recipe stands for the indices of a batch


class _ResumableLoader(_Loader):
    """A loader that can resume in the middle of an epoch; having a state tells this to Lightning.

    The state is empty: the position is in Lightning's progress, and the rest is in the data module.
    """

    def __iter__(self) -> Iterator[Any]:
        yield from with_label_counts(super().__iter__(), self.data.step_sizes(len(self)))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


def _as_is(batch: Any) -> Any:
    return batch
