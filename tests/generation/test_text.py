"""Tests of text that grows token by token, with tokenizers of several kinds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.generation.text import TextStream

pytestmark = pytest.mark.quick

TEXT = "Grüße, 世界! 👩‍🚀 says: don't stop , at\n\n  naïve  borders… END"


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat and the cat ran", "don't stop"], 280)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama's.

    A space is part of the word behind it, and the first space of a text disappears.
    """
    characters = sorted(set(TEXT.replace(" ", "▁")) - {"世", "👩"})
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁don", "▁at", *characters]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(known))}
    merges = [("▁", "d"), ("▁d", "o"), ("▁do", "n"), ("▁", "a"), ("▁a", "t")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "don", "'", "t", "stop", ",", "at", "##s", "bor", "##der"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {"bytes": bytes_tokenizer, "sentencepiece": sentencepiece_tokenizer, "wordpiece": wordpiece_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    got = []
    for token in tokens:
        got.append(stream.push(token))
        if stream.stopped is not None:
            break
    return [*got, stream.finish()]


def test_pieces_make_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (TEXT, " don't stop", "borders, at"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        got = pieces(TextStream(tokenizer), tokens)
        assert "".join(got) == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert not any("\ufffd" in piece for piece in got)


def test_the_text_continues_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer("stop, at don't stop", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    for cut in range(1, len(tokens)):
        prompt = tokenizer.decode(tokens[:cut], clean_up_tokenization_spaces=False)
        assert prompt + "".join(pieces(TextStream(tokenizer, prompt=tokens[:cut]), tokens[cut:])) == whole


def test_a_character_comes_once_it_is_whole() -> None:
    tokenizer = bytes_tokenizer()
    tokens = tokenizer("a👩b", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 6
    assert pieces(TextStream(tokenizer), tokens) == ["a", "", "", "", "👩", "b", ""]
    assert pieces(TextStream(tokenizer), tokens[:3]) == ["a", "", "", "\ufffd"]


def test_special_tokens_have_no_text() -> None:
    tokenizer = bytes_tokenizer()
    tokens = tokenizer("the cat")["input_ids"]
    assert tokens[0] == tokenizer.cls_token_id and "".join(pieces(TextStream(tokenizer), tokens)) == "the cat"


@given(
    st.text("ab ", max_size=30),
    st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3),
)
@settings(max_examples=200)
def test_stop_strings_end_the_text_wherever_tokens_do(text: str, stop: list[str]) -> None:
    tokenizer = STOP_TOKENIZER
    stream = TextStream(tokenizer, stop)
    got = pieces(stream, tokenizer(text, add_special_tokens=False)["input_ids"])
    ends = [text.find(each) for each in stop if each in text]
    # The stop text that is complete first ends the text. If several are complete at once, it is the one that begins
    # first.
    whole = min((text.find(each) + len(each) for each in stop if each in text), default=None)
    if whole is None:
        assert stream.stopped is None and "".join(got) == text
    else:
        assert stream.stopped in stop
        assert len("".join(got)) in ends and text.startswith("".join(got))
    for each in stop:
        assert each not in "".join(got)


STOP_TOKENIZER = train_tokenizer(["aab ba bab b a aa bb ab ab aab"] * 5, 275)
