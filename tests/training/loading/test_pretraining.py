"""Tests of the data module under Lightning's own trainer: what reaches the model, and what a resumed run gets."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from fastformer.data.packing import IGNORE_INDEX
from fastformer.data.pretraining import preparation, store
from fastformer.data.pretraining.corpus import document_of
from fastformer.data.pretraining.sources import open_sources, stream
from fastformer.data.pretraining.splitting import find_split_and_sample
from fastformer.training.loading.pretraining import PretrainingDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def text(documents, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join("\n".join(document) for document in documents[:24]))
    return str(path)


@pytest.fixture(scope="module")
def make(text, tmp_path_factory):
    """Return a function that makes a small data module. Given arguments replace the small ones."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def data_module(**arguments) -> PretrainingDataModule:
        small = {"data": [text], "vocab_size": 300, "max_length": 64, "tokens_per_batch": 1024, "heldout_fraction": 0.2}
        return PretrainingDataModule(**{**small, "cache_dir": cache, **arguments})

    return data_module


def fingerprint(batch) -> str:
    """Return a hash of a batch without its label counts.

    A batch of a run that is resumed within an optimizer step counts only the rest of the step.
    """
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        if name == "label_counts":
            continue
        digest.update(f"{name} {value.tolist() if isinstance(value, torch.Tensor) else value}".encode())
    return digest.hexdigest()


class Recorder(pl.LightningModule):
    """A model that records every batch it is trained on and validated with."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.trained: list[str] = []
        self.validated: list[str] = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.fail_at:
            raise RuntimeError("killed")
        self.trained.append(fingerprint(batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(fingerprint(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    """A callback that writes a checkpoint whenever the hook is called. The name is the number of batches seen."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        setattr(self, hook, self._save)

    def _save(self, trainer, module, *args) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{len(module.trained)}.ckpt")


def fit(data, *, checkpoint=None, module=None, callbacks=(), **arguments) -> Recorder:
    module = module or Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return module


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_an_epoch_is_the_training_text(make, text):
    data = make()
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) > 3
    assert all(len(batch["input_ids"]) <= 1024 and batch["max_seqlen"] <= 64 for batch in batches)
    assert {int(label) for batch in batches for label in batch["next_sentence_label"]} == {0, 1}
    assert data.tokenizer.mask_token == "[MASK]"
    assert len(data.tokenizer) == 300


def test_heldout_text_is_in_no_training_batch(make, text):
    data = make(next_sentence=False, tokens_per_batch=4096, max_length=4096)
    data.setup()
    written = [*stream(open_sources([text]))]
    split, _ = find_split_and_sample(written, 0.2)
    documents = {each: " ".join(document_of(each)) for each in written}
    heldout = [documents[each] for each in written if split.is_heldout(each)]
    train = [documents[each] for each in written if split.is_for_training(each)]

    def texts(loader) -> list[str]:
        found = []
        for batch in loader:
            ids = torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])
            sequences = ids.split(batch["cu_seqlens"].diff().tolist())
            found += [data.tokenizer.decode(sequence[1:-1]) for sequence in sequences]
        return found

    assert Counter(texts(data.val_dataloader())) == Counter(heldout)
    assert Counter(texts(data.train_dataloader())) == Counter(train)


def test_validation_is_always_the_same_and_training_never(make):
    module = fit(make(), max_epochs=3, num_sanity_val_steps=0)
    length = len(module.validated) // 3
    assert length > 0
    assert module.validated == module.validated[:length] * 3
    assert len(set(module.trained)) == len(module.trained)


def test_seed(make):
    first, again, other = (fit(make(seed=seed), max_epochs=1).trained for seed in (1, 1, 2))
    assert first == again
    assert set(first).isdisjoint(other)


@pytest.mark.parametrize("arguments", [{"whole_word": True}, {"mask_probability": 0.3}, {"next_sentence": False}])
def test_arguments_reach_the_batches(make, arguments):
    default, other = make(), make(**arguments)
    for data in (default, other):
        data.setup()
    assert fingerprint(next(iter(default.train_dataloader()))) != fingerprint(next(iter(other.train_dataloader())))
    if arguments == {"mask_probability": 0.3}:
        batch = next(iter(other.train_dataloader()))
        special = 3 * len(batch["next_sentence_label"])
        # Rounding changes the number of masked tokens by less than one in each sequence.
        assert abs(len(batch["masked_positions"]) - 0.3 * (len(batch["input_ids"]) - special)) < special / 3


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_no_validation_without_heldout_documents(make):
    module = fit(make(heldout_fraction=0), max_epochs=1)
    assert module.trained
    assert not module.validated


def test_loading_leaves_the_global_random_state_alone(make):
    data = make()
    data.setup()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches(make, world_size):
    class Rank:
        def __init__(self, global_rank):
            self.distributed_sampler_kwargs = {"rank": global_rank, "num_replicas": world_size}
            self.fit_loop = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
            self.accumulate_grad_batches, self.num_training_batches = 1, float("inf")
            self.strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def labels(data) -> Counter:
        return Counter(
            tuple(sequence.tolist())
            for batch in data
            for sequence in torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"]).split(
                batch["cu_seqlens"].diff().tolist()
            )
        )

    whole = make()
    whole.setup()
    parts = []
    for rank in range(world_size):
        part = make()
        part.setup()
        part.trainer = Rank(rank)
        parts.append(part)
    loaders = [part.train_dataloader() for part in parts]
    assert len({len(loader) for loader in loaders}) == 1
    in_turn = [fingerprint(batch) for step in zip(*loaders, strict=True) for batch in step]
    alone = [fingerprint(batch) for batch in whole.train_dataloader()]
    assert in_turn[: len(alone)] == alone  # the last step continues with the next pass
    assert len(alone) <= len(in_turn) < len(alone) + world_size
    loaders = [part.val_dataloader() for part in parts]
    assert len({len(loader) for loader in loaders}) == 1
    assert sum((labels(loader) for loader in loaders), Counter()) == labels(whole.val_dataloader())


def test_workers_prepare_the_same_batches(make):
    alone, workers = (make(num_workers=number) for number in (0, 2))
    for data in (alone, workers):
        data.setup()
    for loader in ("train_dataloader", "val_dataloader"):
        expected, got = ([fingerprint(batch) for batch in getattr(data, loader)()] for data in (alone, workers))
        assert got == expected


def test_second_start_uses_the_cache(make, monkeypatch, tmp_path):
    first = make()
    first.setup()
    steps = ("find_split_and_sample", "train_tokenizer", "_complete_parts")
    called = []
    for module in (preparation, store):
        for step in steps:
            if original := getattr(module, step, None):
                monkeypatch.setattr(module, step, lambda *a, f=original, s=step, **k: (called.append(s), f(*a, **k))[1])
    second = make()
    second.prepare_data()
    second.setup()
    assert not called
    for ours, theirs in zip(second.train_dataloader(), first.train_dataloader(), strict=True):
        assert fingerprint(ours) == fingerprint(theirs)
    make(cache_dir=str(tmp_path)).setup()
    assert set(called) == set(steps)


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 14}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 2}, {"limit_train_batches": 4}],
    ids=["plain", "accumulated", "validated often", "limited"],
)
def test_a_resumed_run_continues_as_if_never_interrupted(make, tmp_path, hook, limit, arguments):
    arguments = {**limit, **arguments}
    uninterrupted = fit(make(), callbacks=[SaveAt(tmp_path, hook)], **arguments)
    assert len(set(uninterrupted.trained)) == len(uninterrupted.trained)
    checkpoints = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        resumed = fit(make(), checkpoint=checkpoint, **arguments)
        assert resumed.trained == uninterrupted.trained[int(checkpoint.stem) :], checkpoint.stem


@pytest.mark.parametrize("fail_at", [3, 9])
def test_a_killed_run_with_workers_continues(make, tmp_path, fail_at):
    """A killed run with workers continues at its batch. Batches that the workers had prepared ahead do not count."""
    arguments = {"max_epochs": 3, "accumulate_grad_batches": 2}
    uninterrupted = fit(make(), **arguments)
    checkpoint = tmp_path / "killed.ckpt"

    class SaveOnException(pl.Callback):
        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(checkpoint)

    killed = Recorder(fail_at=fail_at)
    with pytest.raises(RuntimeError, match="killed"):
        fit(make(num_workers=1), module=killed, callbacks=[SaveOnException()], **arguments)
    resumed = fit(make(num_workers=1), checkpoint=checkpoint, **arguments)
    assert killed.trained + resumed.trained == uninterrupted.trained


@pytest.mark.parametrize("objective", ["mlm", "clm", "span-corruption", "denoising"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 2), (2, 4)])
def test_another_number_of_ranks_goes_on_where_the_others_stopped(make, objective, before, after):
    """Another number of ranks continues where the earlier ranks stopped.

    The ranks are simulated: each asks for its batches after a number of steps of all ranks.
    """

    def run(world_size, steps, state, done) -> tuple[list[str], dict]:
        ranks = []
        for rank in range(world_size):
            data = make(objective=objective, tokens_per_batch=128, max_length=32, vocab_size=400)
            data.setup()
            if state:
                data.load_state_dict(state)
            data.rank = lambda rank=rank: (rank, world_size)
            data.batches_done = lambda: (done, done)
            iterator = iter(data.train_dataloader())
            ranks.append(([fingerprint(next(iterator)) for _ in range(steps)], data.state_dict()))
        batches, states = zip(*ranks, strict=True)
        return [batch for step in zip(*batches, strict=True) for batch in step], states[0]

    first, state = run(before, 2, {}, 0)
    second, state = run(after, 1, state, 2)
    third, _ = run(1, 1, state, 3)
    alone, _ = run(1, len(first + second + third), {}, 0)
    assert first + second + third == alone


def test_mid_epoch_resume_with_other_data_settings_is_refused(make, tmp_path):
    fit(make(), callbacks=[SaveAt(tmp_path, "on_train_batch_end")], max_steps=2, max_epochs=-1)
    with pytest.raises(ValueError, match=r"middle of an epoch.*tokens_per_batch was 1024, is 512; seed was 0, is 4"):
        fit(make(tokens_per_batch=512, seed=4), checkpoint=tmp_path / "2.ckpt", max_steps=4, max_epochs=-1)


def test_other_data_settings_are_fine_after_an_epoch(make, tmp_path):
    fit(make(), callbacks=[SaveAt(tmp_path, "on_train_epoch_end")], max_epochs=1)
    (checkpoint,) = tmp_path.iterdir()
    assert fit(make(tokens_per_batch=512), checkpoint=checkpoint, max_epochs=2).trained


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "plm"}, "objective must be one of mlm, clm, span-corruption, denoising, got 'plm'"),
        ({"objective": "denoising", "tokens_per_batch": 127}, "must be at least twice max_length=64 for denoising"),
        ({"objective": "clm", "whole_word": True}, "whole_word is for objective mlm, not clm"),
        ({"objective": "clm", "mask_probability": 0.3}, "mask_probability is for objective mlm, .*, not clm"),
        ({"objective": "denoising", "next_sentence": False}, "next_sentence is for objective mlm, not denoising"),
        ({"permute_sentences": False}, "permute_sentences is for objective denoising, not mlm"),
        ({"sentence_order": True, "next_sentence": False}, "it needs next_sentence=True"),
        ({"tokens_per_batch": 63}, "tokens_per_batch=63 must be at least max_length=64"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"num_workers": -1}, "num_workers must be from 0 to [0-9]+ on this machine .*; got -1"),
        ({"max_length": 4}, "max_length must be at least 5 for pairs, got 4"),
        ({"max_length": 2, "next_sentence": False}, "max_length must be at least 3, got 2"),
        ({"vocab_size": 100}, "vocab_size must be at least 261"),
        ({"mask_probability": 0.0}, "mask_probability must be in"),
        ({"heldout_fraction": 1.0}, "heldout_fraction must be in"),
        ({"data": []}, "paths is empty"),
    ],
)
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        data = make(**arguments)
        data.setup()
        data.train_dataloader()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("One. Two.", {"heldout_fraction": 0.0}, "training part: .*at least two documents, got 1"),
        (
            "One. Two.\n\nThree. Four.\n\nFive. Six.",
            {},
            "held-out part .*at least two documents, got 1.*next_sentence=False",
        ),
        ("One.\n\nTwo.\n\nThree.", {"heldout_fraction": 0.0}, "training part: .*each of the 3 documents has only one"),
        ("One. Two.", {}, "leaves nothing to train on"),
    ],
)
def test_corpora_without_pairs(make, tmp_path, content, arguments, message):
    path = tmp_path / "few.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        make(data=[str(path)], **arguments).setup()


def test_loader_before_setup(make):
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        make().train_dataloader()


def test_importing_data_imports_neither_transformers_nor_lightning():
    code = (
        "import sys, fastformer.data.pretraining.corpus, fastformer.data.pretraining.tokenizer\n"
        "import fastformer.data.pretraining.batches\n"
        "assert not {'transformers', 'lightning', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
