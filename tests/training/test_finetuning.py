"""The fine-tuning modules learn small tasks, packed with our models and dense with Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

from fastformer.models import (
    FastformerConfig,
    FastformerForCausalLM,
    FastformerForEmbedding,
    FastformerForQuestionAnswering,
    FastformerForSeq2SeqLM,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.training.adversarial import Adversary
from fastformer.training.finetuning import (
    Classification,
    Embedding,
    FineTuning,
    Generation,
    QuestionAnswering,
    Tagging,
    sequences,
)
from fastformer.training.loading.steps import with_label_counts
from fastformer.training.optimization import Optimization
from fastformer.training.privacy import PoissonBatches, Privacy
from fastformer.training.tasks import balanced_class_weights

WORDS, LENGTHS = 20, (5, 3, 7, 4, 6, 5, 3, 8)
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
}
DECODER = {"norm_placement": "pre", "embedding_norm": False, "type_vocab_size": 0}
OPTIMIZATION = Optimization(0.01, warmup_steps=2)


def config(**options: Any) -> FastformerConfig:
    return FastformerConfig(**{**SHAPE, **options})


def texts(seed: int) -> list[np.ndarray]:
    """Return random words from 4 on. The four numbers below have a meaning in some tasks."""
    random = np.random.default_rng(seed)
    return [random.integers(4, WORDS, length) for length in LENGTHS]


def pack(tokens: list[np.ndarray], prefix: str = "") -> dict[str, Any]:
    ends = np.cumsum([0, *map(len, tokens)])
    return {
        f"{prefix}input_ids": torch.from_numpy(np.concatenate(tokens)),
        f"{prefix}cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
        f"{prefix}max_seqlen": max(map(len, tokens)),
    }


def pad(tokens: list[np.ndarray], value: int = 0) -> torch.Tensor:
    rows = [torch.from_numpy(row) for row in tokens]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def dense(tokens: list[np.ndarray]) -> dict[str, Any]:
    return {"input_ids": pad(tokens), "attention_mask": pad([np.ones_like(row) for row in tokens])}


def classified(seed: int, form: Callable = pack) -> dict[str, Any]:
    """Return a batch in which the class says whether the first word is even."""
    tokens = texts(seed)
    return {**form(tokens), "labels": torch.tensor([int(row[0] % 2) for row in tokens])}


def tagged(seed: int, form: Callable = pack) -> dict[str, Any]:
    tokens = texts(seed)
    tags = [np.where(row == 4, -100, row % 2) for row in tokens]
    return {**form(tokens), "labels": pad(tags, -100) if form is dense else torch.from_numpy(np.concatenate(tags))}


def asked(seed: int) -> dict[str, Any]:
    """Return a batch in which the answer reaches from word 1 to word 2."""
    tokens = texts(seed)
    for row in tokens:
        row[-2:] = (1, 2)
    ends = torch.tensor([len(row) - 1 for row in tokens])
    return {**pack(tokens), "start_positions": ends - 1, "end_positions": ends}


def answered(seed: int) -> dict[str, Any]:
    """Return a batch in which each word is followed by the next one. Only the second half is in the loss."""
    tokens = [(4 + np.arange(row[0], row[0] + len(row)) % (WORDS - 4)) for row in texts(seed)]
    labels = [np.where(np.arange(len(row)) < len(row) // 2, -100, row) for row in tokens]
    return {**pack(tokens), "labels": torch.from_numpy(np.concatenate(labels))}


def translated(seed: int) -> dict[str, Any]:
    """Return a batch in which the target is the source's first word, three times."""
    tokens = texts(seed)
    targets = [np.repeat(row[:1], 3) for row in tokens]
    given = [np.concatenate([[1], target[:-1]]) for target in targets]
    return {**pack(tokens), **pack(given, "decoder_"), "labels": torch.from_numpy(np.concatenate(targets))}


def similar(seed: int, form: Callable = pack) -> dict[str, Any]:
    """Return pairs of texts that begin with the same word. No other text of the batch begins with it."""
    random = np.random.default_rng(seed)
    anchors, positives = texts(seed), texts(seed + 1000)
    for anchor, positive, word in zip(anchors, positives, random.permutation(np.arange(4, WORDS)), strict=False):
        anchor[0] = positive[0] = word
    return {"anchor": form(anchors), "positive": form(positives)}


def fit(module: FineTuning, make: Callable[[int], Any], steps: int = 40, **options: Any) -> list[dict[str, float]]:
    """Train the module, and return the metrics of the held-out batches before and after."""
    held_out = DataLoader([make(seed) for seed in range(1000, 1004)], batch_size=None)
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    (before,) = trainer.validate(module, held_out, verbose=False)
    batches = with_label_counts(
        map(make, range(steps)), [1] * steps, lambda batch: torch.tensor([module.targets(batch)])
    )
    trainer.fit(module, DataLoader(list(batches), batch_size=None))
    (after,) = trainer.validate(module, held_out, verbose=False)
    return [before, after]


@pytest.mark.parametrize(
    ("kind", "model", "options", "make", "at_most"),
    [
        (Classification, FastformerForSequenceClassification, {}, classified, 0.3),
        (Tagging, FastformerForTokenClassification, {}, tagged, 0.1),
        (QuestionAnswering, FastformerForQuestionAnswering, {}, asked, 0.3),
        (Generation, FastformerForCausalLM, {**DECODER, "stack": "decoder"}, answered, 1.0),
        (
            Generation,
            FastformerForSeq2SeqLM,
            {**DECODER, "stack": "encoder_decoder", "decoder_start_token_id": 1},
            translated,
            1.5,
        ),
        (Embedding, FastformerForEmbedding, {"pooling": "mean"}, similar, 0.5),
    ],
)
def test_our_models_learn_on_packed_batches(
    kind: type[FineTuning], model: type, options: dict, make: Callable, at_most: float
) -> None:
    torch.manual_seed(0)
    before, after = fit(kind(model(config(**options)), OPTIMIZATION), make)
    assert after["val/loss"] < at_most < before["val/loss"]


@pytest.mark.parametrize(
    ("kind", "model", "make", "at_most"),
    [
        (Classification, BertForSequenceClassification, classified, 0.3),
        (Tagging, BertForTokenClassification, tagged, 0.1),
        (Embedding, BertModel, similar, 0.5),
    ],
)
def test_hugging_face_models_learn_on_dense_batches(
    kind: type[FineTuning], model: type, make: Callable, at_most: float
) -> None:
    torch.manual_seed(0)
    module = kind(model(BertConfig(**SHAPE)), OPTIMIZATION)
    before, after = fit(module, lambda seed: make(seed, dense))
    assert after["val/loss"] < at_most < before["val/loss"]


@pytest.mark.quick
def test_outputs_are_of_each_sequence_in_order_packed_or_dense() -> None:
    tokens = texts(0)
    per_token = torch.randn(sum(LENGTHS), 2)
    padded = torch.nn.utils.rnn.pad_sequence(per_token.split(LENGTHS), batch_first=True, padding_value=9.0)
    for batch, values in ((pack(tokens), per_token), (dense(tokens), padded)):
        found = sequences(batch, values.numpy())
        assert all(np.array_equal(a, b) for a, b in zip(found, per_token.split(LENGTHS), strict=True))


def test_validation_judges_all_outputs_and_weighs_targets_equally() -> None:
    module = Tagging(FastformerForTokenClassification(config()), OPTIMIZATION)
    judged: list[list[Any]] = []
    module.judge = lambda outputs: judged.append(outputs) or {"accuracy": 0.25}
    before, _ = fit(module, tagged, steps=3, limit_val_batches=2)
    assert before["val/accuracy"] == 0.25
    assert [len(outputs) for outputs in judged] == [2 * len(LENGTHS)] * 2
    assert [len(tags) for tags in judged[0]] == [*LENGTHS, *LENGTHS]
    module = Tagging(FastformerForTokenClassification(config()), OPTIMIZATION).eval()
    batches = [tagged(1000), tagged(1001)]
    batches[1]["labels"] = torch.where(torch.arange(len(batches[1]["labels"])) < 3, batches[1]["labels"], -100)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    logits = torch.cat([module.model(**{**batch, "labels": None}).logits for batch in batches])
    expected = F.cross_entropy(logits, torch.cat([batch["labels"] for batch in batches]))
    assert found["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


# --- The losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model", "make"),
    [
        (Classification, FastformerForSequenceClassification, classified),
        (Tagging, FastformerForTokenClassification, tagged),
    ],
)
def test_class_weights_by_hand(kind: type[Classification], model: type, make: Callable) -> None:
    batch = make(0)
    module = kind(model(config()), OPTIMIZATION, class_weights=[1.0, 3.0]).eval()
    logits = module.model(**{**batch, "labels": None}).logits.double()
    real = batch["labels"] != -100
    each = -logits.log_softmax(-1)[real, batch["labels"][real]]
    weights = torch.tensor([1.0, 3.0]).double()[batch["labels"][real]]
    expected = (weights * each).sum() / weights.sum()
    torch.testing.assert_close(module.run(batch)[0].double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"class_weights must be 2 numbers .* got \[1.0\]"):
        kind(model(config()), OPTIMIZATION, class_weights=[1.0])


@pytest.mark.parametrize("form", [pack, dense])
def test_contrastive_loss_by_hand(form: Callable) -> None:
    module = Embedding(
        FastformerForEmbedding(config(pooling="mean")), OPTIMIZATION, temperature=0.5, symmetric=False
    ).eval()
    batch = {**similar(0, form), "negative": form(texts(7))}
    loss, _ = module.run(batch)
    vectors = {side: module.model(**inputs).embeddings.double() for side, inputs in batch.items()}
    losses = []
    for number, anchor in enumerate(vectors["anchor"]):
        similarities = [anchor @ other / 0.5 for side in ("positive", "negative") for other in vectors[side]]
        losses.append(-torch.stack(similarities).log_softmax(0)[number])
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_negatives_that_belong_to_no_pair_are_never_found() -> None:
    module = Embedding(FastformerForEmbedding(config(pooling="mean")), OPTIMIZATION).eval()
    batch = similar(0)
    assert module.run({**batch, "negative": pack(texts(7))})[0] > module.run(batch)[0]


# --- Options ----------------------------------------------------------------------------------------------------------


def test_adversarial_training_learns_both_losses() -> None:
    torch.manual_seed(0)
    model = FastformerForSequenceClassification(config())
    module = Classification(model, OPTIMIZATION, Adversary(epsilon=0.02))
    before, after = fit(module, classified)
    assert after["val/loss"] < 0.35 < before["val/loss"]
    logged = module.trainer.callback_metrics
    module.train()
    batch = classified(0)
    losses = module.adversary.losses(model.get_input_embeddings(), lambda: module.run(batch)[0], [batch["cu_seqlens"]])
    assert losses.adversarial > losses.clean
    assert "val/loss" in logged


def test_private_training_takes_noised_steps_within_the_budget() -> None:
    torch.manual_seed(0)
    model = FastformerForSequenceClassification(config())
    examples = [{**pack([row]), "labels": torch.tensor([int(row[0] % 2)])} for seed in range(60) for row in texts(seed)]
    privacy = Privacy(epsilon=50.0, batch_size=16)
    module = Classification(model, OPTIMIZATION, privacy=privacy, examples=len(examples))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = PoissonBatches(examples, lambda chosen: chosen[0], privacy.sample_rate(len(examples)), 0, lambda: (0, 0))
    held_out = DataLoader([classified(seed) for seed in range(1000, 1004)], batch_size=None)
    (before,) = trainer.validate(module, held_out, verbose=False)
    trainer.fit(module, loader)
    (after,) = trainer.validate(module, held_out, verbose=False)
    assert trainer.global_step == 30
    assert privacy.spent(module.noise_multiplier, len(examples), 30) <= 50.0
    assert after["val/loss"] < before["val/loss"] - 0.02


def test_what_does_not_go_together_is_refused() -> None:
    model = FastformerForEmbedding(config(pooling="mean"))
    with pytest.raises(ValueError, match="adversarial training and differential privacy cannot be combined"):
        Classification(model, OPTIMIZATION, Adversary(), Privacy(1.0), 10)
    with pytest.raises(ValueError, match="privacy needs the gradient of each example"):
        Embedding(model, OPTIMIZATION, privacy=Privacy(1.0), examples=10)
    with pytest.raises(ValueError, match="examples must be given with privacy"):
        Classification(model, OPTIMIZATION, privacy=Privacy(1.0))


def test_balanced_weights_make_classes_weigh_the_same() -> None:
    recipe = SimpleNamespace(labels=["a", "b", "c"])
    labels: list[Any] = [0, 0, 0, 1, [2, -100, 0, 1]]
    weights = balanced_class_weights(recipe, [SimpleNamespace(labels=label) for label in labels])
    assert weights == pytest.approx([7 / (3 * 4), 7 / (3 * 2), 7 / (3 * 1)])


def test_outputs_of_all_ranks_are_in_the_order_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of all ranks are in the order of the examples.

    Ranks take batches in turn: the first one of each rank, then the second one of each.
    """
    mine, other = [[0, 1], [4]], [[2, 3], [5]]

    def gather(ranks: list, outputs: list) -> None:
        assert outputs is mine
        ranks[:] = [outputs, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for world_size, expected in ((1, [0, 1, 4]), (2, [0, 1, 2, 3, 4, 5])):
        module = SimpleNamespace(_outputs=mine, trainer=SimpleNamespace(world_size=world_size))
        assert FineTuning._outputs_of_all_ranks(module) == expected
