from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastformer.data.pretraining.preparation import prepare_text
from fastformer.data.pretraining.sources import texts_source
from fastformer.data.pretraining.tokenized import tokenize
from fastformer.data.pretraining.tokenizer import (
    SPECIAL_TOKENS,
    load_or_make_tokenizer,
    text_fingerprint,
    train_tokenizer,
)


def test_special_tokens_and_layout(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == list(SPECIAL_TOKENS)
    named = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    assert named == SPECIAL_TOKENS
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a file", "each line"))
    single, pair = tokenizer("a file"), tokenizer("a file", "each line")
    assert single.input_ids == [2, *a, 3]
    assert pair.input_ids == [2, *a, 3, *b, 3]
    assert pair.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert set(single) == {"input_ids", "token_type_ids", "attention_mask"}


def test_mask_token_stands_for_a_word_with_its_space(tokenizer):
    with_word, with_mask = (tokenizer(text).input_ids for text in ("reads a file it", "reads [MASK] file it"))
    assert len(with_word) == len(with_mask)
    assert [w == m for w, m in zip(with_word, with_mask, strict=True)].count(False) == 1


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("  leading,\ttrailing \n\r\n \u2028  ")
@example("\x00\ufeff\U0001f468\u200d\U0001f469 e\u0301 é İ ﬁ")
@example("  [MASK] [UNK] spelled out")
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer(text, add_special_tokens=False).input_ids == ids


def test_training_is_deterministic(documents, tokenizer):
    again = train_tokenizer([sentence for document in documents for sentence in document], 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(again) == 400


def test_vocabulary_must_hold_every_byte():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 261 .*got 260"):
        train_tokenizer(["a"], 260)
    assert len(train_tokenizer(["a"], 261)) == 261


# --- Saved tokenizers -------------------------------------------------------------------------------------------------

TEXTS = ["the file and the line", "the text and the bytes"]


def load_or_train(folder):
    return load_or_make_tokenizer(folder / "tokenizer", lambda: train_tokenizer(TEXTS, 270))


def test_saved_tokenizer_is_reused(tmp_path):
    first = load_or_train(tmp_path)
    second = load_or_make_tokenizer(tmp_path / "tokenizer", lambda: pytest.fail("it is made again"))
    assert second.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert second("the [MASK]", "and").data == first("the [MASK]", "and").data
    assert second.special_tokens_map == first.special_tokens_map
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(("texts", "size"), [(TEXTS, 271), (TEXTS[:1], 270), (["".join(TEXTS)], 270)])
def test_tokenizer_of_other_text_or_size_is_not_reused(tmp_path, texts, size):
    def prepared(texts, size):
        source = texts_source(texts, "texts")
        return prepare_text([source], tmp_path, "mlm", vocab_size=size, heldout_fraction=0).tokenizer

    prepared(TEXTS, 270)
    other = prepared(texts, size)
    assert other.backend_tokenizer.to_str() == train_tokenizer(texts, size).backend_tokenizer.to_str()
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_is_trained_anew(tmp_path, file):
    tokenizer = load_or_train(tmp_path)
    (folder,) = tmp_path.iterdir()
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="damaged"):
        again = load_or_train(tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (folder / file).read_bytes() == whole


def test_full_disk(tmp_path, full_disk):
    with full_disk(1000), pytest.raises(OSError, match="tokenizer"):
        load_or_train(tmp_path)
    assert os.listdir(tmp_path) == []


def test_fingerprint_knows_where_texts_end():
    assert len({text_fingerprint(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5


# --- Tokenized corpora ------------------------------------------------------------------------------------------------


def test_segments_have_the_tokens_of_their_joined_sentences(documents, tokenizer, corpus):
    assert corpus.num_documents == len(documents)
    assert np.diff(corpus.document_offsets).tolist() == [len(document) for document in documents]
    for document, begin in zip(documents, corpus.document_offsets.tolist(), strict=False):
        end = begin + len(document)
        opening = corpus.ids[corpus.opening_offsets[begin] : corpus.opening_offsets[begin + 1]]
        following = corpus.ids[corpus.following_offsets[begin + 1] : corpus.following_offsets[end]]
        expected = tokenizer(" ".join(document), add_special_tokens=False).input_ids
        assert [*opening, *following] == expected
        assert corpus.segment_lengths(np.array([begin, begin]), np.array([end, begin])).tolist() == [len(expected), 0]


def test_special_tokens_spelled_out_in_a_text_are_text(tokenizer):
    corpus = tokenize([["Replace [MASK] by [SEP]."]], tokenizer)
    assert set(corpus.ids[2:].tolist()).isdisjoint(tokenizer.all_special_ids)
    assert tokenizer.decode(corpus.ids[2 : corpus.opening_offsets[1]]) == "Replace [MASK] by [SEP]."


@pytest.mark.parametrize("empty", [[], [["a"], []], [["a", ""]]])
def test_empty_documents_are_refused(tokenizer, empty):
    with pytest.raises(ValueError, match="non-empty"):
        tokenize(empty, tokenizer)
