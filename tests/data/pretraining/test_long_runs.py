"""Texts without a space, and texts of spaces only, are prepared in time in proportion to their length."""

from __future__ import annotations

import random

import pytest

from fastformer.data.labelled.examples import Question
from fastformer.data.labelled.features import question_features
from fastformer.data.pretraining.corpus import split_sentences
from fastformer.data.pretraining.encoding import TextEncoder
from fastformer.data.pretraining.tokenizer import train_tokenizer

# Each test takes a second or two. When time grew with the square of the length, each took more than a minute.
pytestmark = pytest.mark.timeout(60)

CHARACTERS = 400_000
RUNS = {
    "letters": "".join(random.Random(0).choices("ACGT", k=CHARACTERS)),
    "one letter": "a" * CHARACTERS,
    "spaces": "x." + " " * CHARACTERS + "y",
    "marks": ".)" * (CHARACTERS // 2),
    "initials": "A. " * (CHARACTERS // 3),
    "ideographs": "漢" * CHARACTERS,
    "sentence marks": "。" * CHARACTERS,
}


@pytest.mark.parametrize("name", RUNS)
def test_one_long_run(name):
    run = RUNS[name]
    trained = train_tokenizer([run, "the end"], 300)
    ids, lengths = TextEncoder(trained).encode([run])
    assert trained.decode(ids) == run
    assert lengths.tolist() == [len(ids)]
    assert "".join("".join(split_sentences(run)).split()) == "".join(run.split())


@pytest.mark.parametrize("name", ["initials", "ideographs"])
def test_windows_of_a_long_context(tokenizer, name):
    context = RUNS[name][:100_000]
    features = question_features([Question("q", "A.", context, ())], tokenizer, 128, 32, mark_matches=True)
    assert {position for feature in features for offset in feature.offsets if offset for position in offset} >= {
        0,
        len(context.rstrip()),
    }


def test_ordinary_text_has_the_tokenizer_that_it_had(documents):
    """Words of 1,000 characters are not divided, so the tokenizer is that of plain BPE training."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [*(" ".join(document) for document in documents), "x" * 1000, "x" * 1000]
    plain = Tokenizer(models.BPE(unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = train_tokenizer(texts, 400)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        special_tokens=trained.convert_ids_to_tokens(range(5)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    assert plain.get_vocab() == trained.get_vocab()
    assert plain.encode(texts[0]).ids == trained(texts[0], add_special_tokens=False).input_ids
