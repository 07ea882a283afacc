"""Tests of reading CoNLL files: which lines are words, and which are comments."""

from __future__ import annotations

import pytest

from fastformer.data.labelled.examples import TaggedWords
from fastformer.data.labelled.readers import read_tagging

EU = ["EU NNP B-NP B-ORG", "rejects VBZ B-VP O"]
SENTENCE = TaggedWords(("EU", "rejects"), ("B-ORG", "O"))


def read(tmp_path, *lines, name="a.conll"):
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return read_tagging(path)


def tabs(lines):
    return [line.replace(" ", "\t") for line in lines]


@pytest.mark.parametrize(
    "comments",
    [
        ["# id 1 domain=en"],
        ["# id 1\tdomain=en"],
        ["# id 5239d808-f300-46ea-aa3b-5093040213a3\tdomain=en"],
        ["# sent_id = 1"],
        ["# text = EU rejects"],
        ["# note = O"],
        ["# sent_id = 1", "# text = EU", "# newdoc"],
        ["# global.columns = ID FORM", "", "# sent_id = 1"],
        ["-DOCSTART- -X- -X- O", "# id 1 domain=en"],
        ["#  text of more words than columns"],
    ],
    ids=str,
)
@pytest.mark.parametrize("data", [EU, tabs(EU)], ids=["spaces", "tabs"])
def test_comments_before_a_sentence(tmp_path, comments, data):
    lines = [*comments, *data, "", *comments, *data]
    found = read(tmp_path, *lines)
    assert found == [SENTENCE] * 2
    assert [place.rsplit(" ", 1)[1] for place in found.places] == [
        str(len(comments) + 1),
        str(2 * len(comments) + len(data) + 2),
    ]


def test_a_comment_alone(tmp_path):
    assert read(tmp_path, *EU, "", "# end of the file") == [SENTENCE]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["#\tO", "1\tO"], "# 1"),
        (["#\tB-SIGN", "1\tO"], "# 1"),
        (["a O", "# O", "1 O"], "a # 1"),
        (["a O", "# B-SIGN", "# O"], "a # #"),
        (["a NN I-NP", "# # I-NP", "1.5 CD I-NP"], "a # 1.5"),
        (["# O", "# O", "1 O"], "# # 1"),
        (["# SYM _ O", "1 CD _ O"], "# 1"),
        (["#fastformer O", "is O"], "#fastformer is"),
        (["#fastformer\tO", "is\tO"], "#fastformer is"),
        (["# 1\tO", "is\tO"], "# 1 is"),
        (["## O", "is O"], "## is"),
    ],
)
def test_a_hash_that_is_a_word(tmp_path, lines, words):
    for more in ([], ["", "no O"] if lines[0].count(" ") == 1 else []):
        found = read(tmp_path, *lines, *more)
        between = "\t" if "\t" in lines[0] else " "
        assert found[0].words == tuple(line.split(between)[0] for line in lines)
        assert "_".join(found[0].words).replace("_", " ") == words
        assert found[0].tags == tuple(line.split(between)[-1] for line in lines)


def test_a_comment_or_a_word(tmp_path):
    for line in ("# note NN B-SIGN", "# id 1 en"):
        with pytest.raises(ValueError, match=r"a.conll, line 4: unclear whether .* comment or the word '#'.* tab"):
            read(tmp_path, *EU, "", line, *EU)
    with pytest.raises(ValueError, match=r"a.conll, line 1: unclear whether this is a comment or the word '#'"):
        read(tmp_path, "# O")


@pytest.mark.parametrize(
    "lines",
    [
        ["1\tEU\t_\tB-ORG", "2\trejects\t_\tO", "", "1\tPeter\t_\tB-PER"],
        ["# sent_id = 1", "1-2\tdu\t_\t_", "1\tde\t_\t_", "2\tle\t_\t_", "2.1\tx\t_\t_"],
        ["0 EU B-ORG", "1 rejects O"],
    ],
)
def test_columns_that_count_words(tmp_path, lines):
    with pytest.raises(ValueError, match=r"a.conll, line \d: the first column numbers the words; expected word"):
        read(tmp_path, *lines)


def test_words_that_are_numbers(tmp_path):
    assert len(read(tmp_path, "1 O", "2 O", "3 O", "", "go O")) == 2
    assert len(read(tmp_path, "1 CD O", "", "1 CD O")) == 2
    assert len(read(tmp_path, "1 O", "2 O")) == 1


def test_a_comment_amid_a_sentence_is_no_word(tmp_path):
    with pytest.raises(ValueError, match="line 2: found 3 columns, expected 4"):
        read(tmp_path, EU[0], "# a comment", EU[1])
