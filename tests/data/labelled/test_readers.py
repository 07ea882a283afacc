"""Labelled data in common layouts, and the errors for files that do not follow them."""

from __future__ import annotations

import csv
import json

import pytest
from pyarrow import Table, parquet

from fastformer.data.labelled.examples import (
    Answer,
    ClassifiedText,
    Conversation,
    Message,
    Question,
    SimilarTexts,
    SourceTarget,
    UnlearntMessage,
)
from fastformer.data.labelled.readers import (
    find_splits,
    read_classification,
    read_conversations,
    read_questions,
    read_similar,
    read_summaries,
    read_tagging,
    read_translations,
)


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_json(path, *rows):
    return write(path, *(json.dumps(row, ensure_ascii=False) for row in rows))


def write_rows(path, *rows):
    """Write records in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        return write_json(path, *rows)
    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(list(rows)), path)
        return path
    with open(path, "w", newline="") as file:
        writer = (
            csv.writer(file)
            if path.suffix == ".csv"
            else csv.writer(file, delimiter="\t", quotechar=None, quoting=csv.QUOTE_NONE)
        )
        writer.writerows([rows[0], *(row.values() for row in rows)])
    return path


# --- Classification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["gj04\t1\t\tOur \"friends won't.", "gj04\t0\t*\tThey drank."],
            [("Our \"friends won't.", None, "1"), ("They drank.", None, "0")],
        ),
        (["sentence\tlabel", "it 's \"great\t1"], [("it 's \"great", None, "1")]),
        (["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tA b.\tB a."], [("A b.", "B a.", "1")]),
        (["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tWhy?\tHow?\t0"], [("Why?", "How?", "0")]),
        (["index\tsentence1\tsentence2\tgold_label", "0\tA.\tB.\tneutral"], [("A.", "B.", "neutral")]),
        (["index\tquestion\tsentence\tlabel", "0\tWho?\tHe.\tentailment"], [("Who?", "He.", "entailment")]),
        (["index\tsentence1\tsentence2\tscore", "0\tA.\tB.\t3.8"], [("A.", "B.", 3.8)]),
        (["index\tsentence", "0\tNo label."], [("No label.", None, None)]),
    ],
    ids=["CoLA", "SST-2", "MRPC", "QQP", "MNLI", "QNLI", "STS-B", "test"],
)
def test_glue(tmp_path, lines, expected):
    assert read_classification(write(tmp_path / "train.tsv", *lines)) == [ClassifiedText(*row) for row in expected]


def test_csv_and_json_lines(tmp_path):
    expected = [ClassifiedText('Says "no", twice\nover.', None, "neg"), ClassifiedText("Ünïcode", None, "2")]
    assert (
        read_classification(write(tmp_path / "a.csv", "text,label", '"Says ""no"", twice', 'over.",neg', "Ünïcode,2"))
        == expected
    )
    rows = ({"text": expected[0].text, "label": "neg"}, {"text": "Ünïcode", "label": 2})
    assert read_classification(write_json(tmp_path / "a.jsonl", *rows)) == expected


# --- Other tasks ------------------------------------------------------------------------------------------------------


def test_conll(tmp_path):
    lines = ["-DOCSTART- -X- -X- O", "", "EU NNP B-NP B-ORG", "rejects VBZ B-VP O", "", "", "Peter NNP B-NP B-PER"]
    found = read_tagging(write(tmp_path / "eng.train", *lines))
    assert [tuple(sentence) for sentence in found] == [(("EU", "rejects"), ("B-ORG", "O")), (("Peter",), ("B-PER",))]
    rows = ({"tokens": ["EU", "rejects"], "ner_tags": ["B-ORG", "O"]}, {"words": ["Peter"], "tags": ["B-PER"]})
    assert read_tagging(write_json(tmp_path / "a.jsonl", *rows)) == found


CONTEXT = "Ünïcode was made in 1991."


def test_squad(tmp_path):
    asked = [
        {"id": "1", "question": "When?", "answers": [{"text": "1991", "answer_start": 20}]},
        {"id": "2", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": []},
    ]
    squad = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]}
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps(squad, indent=1))
    expected = [Question("1", "When?", CONTEXT, (Answer("1991", 20),)), Question("2", "Who?", CONTEXT, ())]
    assert read_questions(path) == expected
    flat = [
        {"id": "1", "question": "When?", "context": CONTEXT, "answers": {"text": ["1991"], "answer_start": [20]}},
        {"id": "2", "question": "Who?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
        {"id": "3", "question": "To predict?", "context": CONTEXT},
    ]
    assert read_questions(write_json(tmp_path / "a.jsonl", *flat)) == [
        *expected,
        Question("3", "To predict?", CONTEXT, None),
    ]


def test_summaries(tmp_path):
    expected = [SourceTarget("A document.", "Short."), SourceTarget("Another \u2028 one.", "Shorter.")]
    rows = [
        {"document": expected[0].source, "summary": "Short."},
        {"article": expected[1].source, "highlights": "Shorter."},
    ]
    assert read_summaries(write_json(tmp_path / "a.jsonl", *rows)) == expected
    write(tmp_path / "train.target", *(pair.target for pair in expected))
    assert read_summaries(write(tmp_path / "train.source", *(pair.source for pair in expected))) == expected


def test_translations_right_to_left_and_cjk(tmp_path):
    pairs = [SourceTarget("Not an integer.", "整数ではありません。"), SourceTarget("No match.", "לא תואם.")]
    write(tmp_path / "train.xx", *(pair.target for pair in pairs))
    parallel = write(tmp_path / "train.en", *(pair.source for pair in pairs))
    rows = [{"translation": {"en": pair.source, "xx": pair.target}} for pair in pairs]
    units = "".join(
        f'<tu><tuv xml:lang="en"><seg>{s}</seg></tuv><tuv xml:lang="xx"><seg>{t}</seg></tuv></tu>' for s, t in pairs
    )
    paths = [
        parallel,
        write_json(tmp_path / "a.jsonl", *rows),
        write(tmp_path / "a.tsv", "en\txx", *(f"{s}\t{t}" for s, t in pairs)),
        write(tmp_path / "a.tmx", f'<tmx version="1.4"><body>{units}</body></tmx>'),
    ]
    for path in paths:
        assert read_translations(path, "en", "xx") == pairs, path
        backwards = path.with_suffix(".xx") if path == parallel else path
        assert read_translations(backwards, "xx", "en") == [SourceTarget(t, s) for s, t in pairs]


def tmx(path, *segments):
    """Write a unit for each tuple of texts in English, German and English again."""
    units = (
        "".join(
            f'<tuv xml:lang="{language}"><seg>{text}</seg></tuv>'
            for language, text in zip(("en", "de", "en"), unit, strict=False)
        )
        for unit in segments
    )
    body = "".join(f"<tu>{unit}</tu>" for unit in units)
    return write(path, f'<tmx version="1.4"><body>{body}</body></tmx>')


@pytest.mark.parametrize(
    ("segment", "text"),
    [
        ('<bpt i="1">&lt;b&gt;</bpt>bold<ept i="1">&lt;/b&gt;</ept> text', "bold text"),
        ('A<ph x="1">&lt;br/&gt;</ph> line<it pos="begin">{\\i</it>.', "A line."),
        ("before<ut>{1}</ut> after", "before after"),
        ('a <hi type="b">word <hi>within</hi></hi> stays', "a word within stays"),
        ('see<ph>&lt;img alt="<sub>My dog</sub>" src="x"&gt;</ph>.', "seeMy dog."),
        ("x<ph>1<sub>in <bpt>2</bpt>it<ph>3<sub>deep</sub>4</ph> here</sub>5<sub>!</sub>6</ph>y", "xin itdeep here!y"),
        ("<ph>only</ph>text<ph/>", "text"),
        ("<hi>" * 5000 + "deep" + "</hi>" * 5000, "deep"),
    ],
    ids=lambda text: text[:30],
)
def test_native_code_is_no_text(tmp_path, segment, text):
    path = tmx(tmp_path / "a.tmx", (segment, "Text."), ("Next.", segment))
    assert translations(path) == [SourceTarget(text, "Text."), SourceTarget("Next.", text)]


def test_two_texts_of_a_language(tmp_path):
    path = tmx(tmp_path / "a.tmx", ("One.", "Eins."), ("Two.", "Zwei.", "Another two."))
    with pytest.raises(ValueError, match=r"a.tmx, unit 2: two texts in 'en'"):
        translations(path)
    with pytest.raises(ValueError, match=r"a.tmx, unit 2: two texts in 'en'"):  # whatever languages are wanted
        read_translations(path, "de", "fr")


@pytest.mark.parametrize(
    "variant", ["<tuv><seg>a</seg></tuv>", '<tuv xml:lang="en"/>', "<tuv lang='en'><seg/><seg/></tuv>"]
)
def test_texts_without_a_language_and_languages_without_a_text(tmp_path, variant):
    path = write(tmp_path / "a.tmx", f"<tmx><body><tu>{variant}</tu></body></tmx>")
    with pytest.raises(ValueError, match=r"a.tmx, unit 1: a tuv needs xml:lang and one seg"):
        translations(path)


def test_parquet_with_a_column_twice(tmp_path):
    parquet.write_table(Table.from_arrays([["a"], ["b"], ["c"]], names=["en", "de", "en"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: 'en' names two columns"):
        translations(tmp_path / "a.parquet")


def test_conversations(tmp_path):
    messages = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"))]
    rows = [
        {"messages": messages},
        {"prompt": "Hi", "completion": "Yo"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
    ]
    assert read_conversations(write_json(tmp_path / "a.jsonl", *rows)) == [
        Conversation((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yo"))),
        Conversation((Message("user", "Hi"), Message("assistant", "Yo"))),
        Conversation((Message("user", "Add\n\n1 2"), Message("assistant", "3"))),
    ]


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
HI, YO = Message("user", "Hi"), Message("assistant", "Yo")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Hi", "input": "", "output": "Yo", "system": "", "history": []}, (HI, YO)),
        ({"instruction": "Hi", "output": "Yo", "system": "Be brief."}, (Message("system", "Be brief."), HI, YO)),
        ({"prompt": "Hi", "completion": "Yo", "system_prompt": "Be."}, (Message("system", "Be."), HI, YO)),
        (
            {"instruction": "Hi", "output": "Yo", "system": "Be.", "history": [["a", "b"], ["c", "d"]]},
            (
                *(Message("system", "Be."), Message("user", "a"), Message("assistant", "b")),
                *(Message("user", "c"), Message("assistant", "d"), HI, YO),
            ),
        ),
        ({"instruction": "Hi", "context": "1", "response": "Yo"}, (Message("user", "Hi\n\n1"), YO)),
        ({"messages": [USER, ANSWER], "system": "Be."}, (Message("system", "Be."), HI, YO)),
        ({"messages": [USER, {**ANSWER, "weight": 1, "tool_calls": None, "name": ""}], "tools": []}, (HI, YO)),
        ({"messages": [{**USER, "weight": 0}, ANSWER], "source": "x", "prompt": "Hi"}, (HI, YO)),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_all_of_a_conversation(tmp_path, row, expected, suffix):
    assert read_conversations(write_rows(tmp_path / f"a.{suffix}", row)) == [Conversation(expected)]


def test_answers_of_no_weight(tmp_path):
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    for suffix in ("jsonl", "parquet"):
        (found,) = read_conversations(write_rows(tmp_path / f"a.{suffix}", row))
        assert [type(message) for message in found.messages] == [Message, UnlearntMessage, Message, Message]
        assert found.messages == (HI, YO, HI, YO)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(
            ({"messages": [USER, {**ANSWER, field: value}]}, rf", messages\[1\]: {field} would be ignored")
            for field, value in {
                "tool_calls": [{"id": "1", "type": "function"}],
                "function_call": {"name": "f"},
                "name": "Bob",
                "reasoning_content": "Hm.",
                "refusal": "No.",
                "audio": {"id": "a"},
                "train": False,
            }.items()
        ),
        *(
            ({"messages": [USER, {**ANSWER, "weight": weight}]}, r"messages\[1\]: weight .* accepted are 0 and 1")
            for weight in (0.5, 2, -1, "0", [])
        ),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\]: weight 1 of a message of the user"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing to learn"),
        ({"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 0}]}, r"messages\[3\]: weight 0, and no learnt"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "two system messages"),
        *(
            ({"messages": [USER, ANSWER], field: "x"}, f"{field} would be ignored")
            for field in ("tools", "functions", "images", "history", "input", "context")
        ),
        ({"messages": [USER, ANSWER], "label": False}, "label says whether the answer is good"),
        ({"prompt": "a", "completion": "b", "label": True}, "label says whether the answer is good"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "tools would be ignored"),
        ({"prompt": "a", "completion": "b", "system": ["c"]}, "system must be a string, found list"),
        ({"prompt": "a", "completion": "b", "input": 3}, "input must be a string, found int"),
        (
            {"prompt": "a", "completion": "b", "input": "c", "context": "d"},
            "found input and context, but only one may be the input",
        ),
        *(
            ({"prompt": "a", "completion": "b", "history": history}, r"history must be \[\[question, answer\], ...\]")
            for history in ("c", [["c"]], ["c", "d"], [{"role": "user", "content": "c"}], {"c": "d"})
        ),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"], ["e", ""]]}, r"history\[1\]: answer is empty"),
        ({"prompt": "a", "completion": "b", "history": [["c", 1]]}, r"history\[0\]: answer must be a string"),
    ],
    ids=str,
)
def test_nothing_of_a_conversation_is_lost(tmp_path, row, message):
    path = write_json(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(ValueError, match=rf"a.jsonl, line 2.*{message}"):
        read_conversations(path)


def test_similar(tmp_path):
    rows = [{"anchor": "a", "positive": "b"}, {"query": "c", "pos": "d", "neg": "e"}]
    assert read_similar(write_json(tmp_path / "a.jsonl", *rows)) == [
        SimilarTexts("a", "b", None),
        SimilarTexts("c", "d", "e"),
    ]


def test_splits_of_a_folder(tmp_path):
    for name in ("train-v2.0.json", "dev_matched.tsv", "dev_mismatched.tsv", "test.tsv", "trains.txt", "README.md"):
        (tmp_path / name).write_text("x")
    found = {split: [path.name for path in paths] for split, paths in find_splits(tmp_path).items()}
    assert found == {
        "train": ["train-v2.0.json"],
        "validation": ["dev_matched.tsv", "dev_mismatched.tsv"],
        "test": ["test.tsv"],
    }
    (tmp_path / "train-v2.0.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no training file.*found README.md, dev_matched.tsv"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    ("read", "row", "names", "what"),
    [
        (read_summaries, {"text": "a", "source": "BBC", "summary": "b"}, "source and text", "document"),
        (read_summaries, {"text": "a", "summary": "b", "highlights": "c"}, "summary and highlights", "summary"),
        (read_conversations, {"prompt": "a", "instruction": "b", "output": "c"}, "prompt and instruction", "prompt"),
        (read_conversations, {"prompt": "a", "completion": "b", "output": "c"}, "completion and output", "completion"),
        (
            read_conversations,
            {"prompt": "a", "output": "b", "system": "c", "system_prompt": "d"},
            "system and system_prompt",
            "system message",
        ),
        (read_similar, {"query": "a", "text": "b", "positive": "c"}, "query and text", "anchor"),
        (read_similar, {"text": "a", "positive": "b", "sentence2": "c"}, "positive and sentence2", "positive"),
        (read_tagging, {"tokens": ["a"], "tags": ["NN"], "ner_tags": ["O"]}, "tags and ner_tags", "tags"),
        (read_tagging, {"tokens": ["a"], "words": ["b"], "tags": ["O"]}, "tokens and words", "words"),
    ],
)
def test_columns_of_which_each_may_be_meant(tmp_path, read, row, names, what):
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1: found {names}, but only one may be the .*{what}; give"):
        read(write_json(tmp_path / "a.jsonl", row))
    first, second = names.split(" and ")
    read(write_json(tmp_path / "a.jsonl", {**row, second: row[first]}))
    read(write_json(tmp_path / "a.jsonl", {**row, second: None}))


# --- Bad files --------------------------------------------------------------------------------------------------------


def translations(path):
    return read_translations(path, "en", "de")


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (
            read_classification,
            "a.tsv",
            "sentence\tlabel\na\t1\nb",
            "line 3: found 1 columns, expected 2: sentence, label",
        ),
        (
            read_classification,
            "a.tsv",
            "body\tlabel\na\t1",
            "line 2: no text column; found body, label; accepted are text",
        ),
        (read_classification, "a.tsv", "text\tscore\na\tgood", "line 2: score must be a finite number, found 'good'"),
        (read_classification, "a.tsv", "text\tlabel\n \t1", "line 2: text column is empty"),
        (read_classification, "a.tsv", "", "is empty; its first line must name the columns"),
        (read_classification, "a.tsv", "text\tlabel\n", "holds no examples"),
        (read_classification, "a.csv", 'text,label\n"a,1', "line 2: not CSV"),
        (read_classification, "a.xml", "", r"unknown suffix '.xml'; accepted are .jsonl"),
        (
            read_classification,
            "a.jsonl",
            '{"text": "a", "label": 0.5}',
            "line 1: label must be a string or a whole number",
        ),
        *(
            (read_classification, "a.csv", f"text,score\na,1\nb,{score}\n", "line 3: score must be a finite number")
            for score in ("nan", "-inf", "1e999", "", "True", "1_0", "٣", "0x1")
        ),
        *(
            (read_classification, "a.jsonl", f'{{"text": "a", "score": {score}}}', "line 1: score must be a finite")
            for score in ("NaN", "Infinity", "true", "1" + "0" * 400, "[1]", '"1_0"', '"٣"')
        ),
        *(
            (
                read_classification,
                "a.csv",
                f"text,score\na,1e15\nb,{score}\n",
                "line 3: score must be from -1e.15 to 1e.15",
            )
            for score in ("1e38", "-1e38", "1.1e15", "1e300")
        ),
        (read_classification, "a.csv", "text,label,text\na,b,c", "line 1: 'text' names two columns"),
        (read_classification, "a.csv", 'text,label\na,b\n"c,d\ne,f\n', "line 3: not CSV"),
        (read_classification, "a.jsonl", '{"text": "a", "text": "b"}', "line 1: .*'text' occurs twice"),
        (read_tagging, "a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', "words must be a list of non-empty"),
        (read_tagging, "a.conll", "EU\tB-ORG\t\nrejects\t\n", "line 2: found 1 columns, expected 2"),
        *(
            (read_questions, "a.jsonl", json.dumps({"id": 1, "question": "q", "context": "abcd", **fields}), message)
            for fields, message in (
                (
                    {"answers": {"text": ["bc"], "answer_start": [-3]}},
                    "line 1: answer_start must be 0 or more, found -3",
                ),
                ({"answers": {"text": [" "], "answer_start": [0]}}, "needs a non-empty text"),
                ({"answers": {"text": ["b"], "answer_start": ["1_0"]}}, "answer_start must be a whole number; .*'1_0'"),
                ({"answers": {"text": ["b"], "answer_start": [True]}}, "answer_start must be a whole number; .*True"),
                ({"answers": {"text": ["b", "c"], "answer_start": [1]}}, "two lists of equal length"),
                ({"answers": "b"}, "line 1: answers must be"),
                ({"answers": ["b"]}, "line 1: answers must be"),
                ({"is_impossible": "false"}, "is_impossible must be true or false, found 'false'"),
                (
                    {"is_impossible": True, "answers": [{"text": "b", "answer_start": 1}]},
                    "is_impossible is true, but there is the answer 'b'",
                ),
            )
        ),
        (read_tagging, "a.txt", "EU B-ORG\nrejects", "line 2: found 1 columns, expected 2: word ... tag"),
        (read_tagging, "a.jsonl", '{"tokens": ["a"], "tags": []}', "line 1: tags must be a list of non-empty strings"),
        (read_tagging, "a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "found 2 words and 1 tags"),
        (read_questions, "a.json", '{"data": [}', "line 1: not JSON"),
        (read_questions, "a.json", '{"data": [{}]}', r"data\[0\]: not SQuAD's layout, data\[\]..*no list 'paragraphs'"),
        (
            read_questions,
            "a.jsonl",
            '{"id": 1, "question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [0]}}',
            "line 1: the answer 'b' is not at character 0 of the context, but 'a'",
        ),
        (
            read_summaries,
            "a.jsonl",
            '{"summary": "a"}',
            "line 1: no document; found summary; accepted are document, article",
        ),
        (translations, "a.jsonl", '{"translation": {"en": "a", "fr": "b"}}', None),
        (translations, "a.jsonl", '{"translation": ["a"]}', "translation must be an object, found list"),
        (translations, "a.tmx", "<tmx><tu>", "not TMX"),
        (translations, "a.en", "a\n", r"needs a.de in the same folder"),
        (
            read_conversations,
            "a.jsonl",
            '{"messages": [{"role": "human", "content": "a"}]}',
            r"messages\[0\]: role 'human'; accepted are system",
        ),
        (
            read_conversations,
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "no message of the assistant",
        ),
        (read_conversations, "a.jsonl", '{"messages": []}', "messages must be a list of at least one"),
        (read_similar, "a.jsonl", '{"anchor": "a"}', "line 1: no positive; found anchor"),
        (read_similar, "a.jsonl", "[1]", "line 1: expected a JSON object, found a list"),
    ],
)
def test_bad_files(tmp_path, read, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    if message is None:  # the translation is still to be made
        assert read(path)[0].target is None
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (
            read_classification,
            {"text": "a", "sentiment": "b"},
            "no label or score; found text, sentiment; accepted are",
        ),
        (read_classification, {"text": "a", "label": None}, "no label or score that is not null; found text, label"),
        (read_tagging, {"tokens": ["a"], "pos": ["b"]}, "no tags; found tokens, pos; accepted are tags, ner_tags"),
        (read_questions, {"id": "1", "question": "q", "context": "c", "answer": "c"}, "no answers; found .*answer"),
        (
            read_summaries,
            {"document": "a", "abstract": "b"},
            "no summary; found document, abstract; accepted are summary",
        ),
        (translations, {"en": "a", "fr": "b"}, "no text in 'de'; found en, fr"),
    ],
)
def test_what_is_to_be_learnt_must_be_there(tmp_path, read, row, message):
    path = write_json(tmp_path / "a.jsonl", row)
    read(path)  # an example to be predicted
    more = ("en", "de") if read is translations else ()
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1: {message}"):
        (read_translations if more else read)(path, *more, targets=True)


@pytest.mark.parametrize("score", ["1", "-1.5", "+.5", "2.", "1e-3", " 1 "])
def test_numbers_in_decimal_notation(tmp_path, score):
    (tmp_path / "a.tsv").write_text(f"text\tscore\na\t{score}\n")
    assert read_classification(tmp_path / "a.tsv")[0].label == float(score)


def test_labels_under_hugging_faces_name_and_after_a_space(tmp_path):
    expected = [ClassifiedText("x, y", None, "a"), ClassifiedText("z", None, "b")]
    rows = [{"text": "x, y", "labels": "a"}, {"text": "z", "labels": "b"}]
    assert read_classification(write_json(tmp_path / "a.jsonl", *rows)) == expected
    assert read_classification(write(tmp_path / "a.csv", "text, label", '"x, y", a', "z, b")) == expected
    assert read_classification(write(tmp_path / "b.csv", "text,label ", '"x, y",a ', "z,b")) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("missing", ["nan", "NaN", "NAN", "null", "NULL", "<NA>", "#N/A", "\\N", "", " "])
def test_a_missing_label_is_no_class(tmp_path, suffix, missing):
    path = write_rows(tmp_path / f"a.{suffix}", {"text": "a", "label": "good"}, {"text": "b", "label": missing})
    with pytest.raises(ValueError, match=r"a\.\w+, (line|row) [23]: label .* missing"):
        read_classification(path)


@pytest.mark.parametrize("word", ["None", "none", "NA", "missing", "nano"])
def test_a_word_is_a_class(tmp_path, word):
    path = write_rows(tmp_path / "a.csv", {"text": "a", "label": "favour"}, {"text": "b", "label": word})
    assert [example.label for example in read_classification(path)] == ["favour", word]


def test_missing_tags(tmp_path):
    with pytest.raises(ValueError, match=r"a.conll, line 2: tag 'nan' .* missing"):
        read_tagging(write(tmp_path / "a.conll", "EU B-ORG", "is nan"))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: tag 'null' .* missing"):
        read_tagging(write_json(tmp_path / "a.jsonl", {"tokens": ["EU"], "tags": ["null"]}))
    assert read_tagging(write(tmp_path / "b.conll", "nan O"))[0].words == ("nan",)


def test_truth_is_one_class_however_it_is_written(tmp_path):
    rows = [{"text": "a", "label": label} for label in (True, "true", False, "false")]
    assert [example.label for example in read_classification(write_json(tmp_path / "a.jsonl", *rows))] == [
        *("true", "true", "false", "false")
    ]
    pairs = [{"question1": "a", "question2": "b", "is_duplicate": truth} for truth in (True, False)]
    for suffix in ("jsonl", "parquet"):
        found = read_classification(write_rows(tmp_path / f"b.{suffix}", *pairs))
        assert [example.label for example in found] == ["true", "false"]


@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "parquet"])
def test_without_agreement_there_is_no_class(tmp_path, suffix):
    rows = [{"sentence1": "a", "sentence2": "b", "gold_label": label} for label in ("neutral", "-", "entailment", "-")]
    path = write_rows(tmp_path / f"a.{suffix}", *rows)
    with pytest.warns(UserWarning, match=rf"a.{suffix}: 2 of 4 examples are left out: .*gold_label.* '-'"):
        found = read_classification(path, targets=True)
    assert [example.label for example in found] == ["neutral", "entailment"]
    assert [place[-1] for place in found.places] == (["1", "3"] if suffix != "tsv" else ["2", "4"])
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(ValueError, match="holds no examples"):
        read_classification(write_rows(tmp_path / f"b.{suffix}", rows[1]))


def test_a_minus_elsewhere_is_a_class(tmp_path):
    path = write_rows(tmp_path / "a.csv", {"text": "a", "label": "-"}, {"text": "b", "label": "+"})
    assert [example.label for example in read_classification(path)] == ["-", "+"]


@pytest.mark.parametrize("name", ["sentence", "passage", "paragraph", "context", "answer", "text_pair", "second"])
def test_what_is_asked_about_is_read_with_the_question(tmp_path, name):
    path = write_json(tmp_path / "a.jsonl", {"question": "Is it?", name: "It is.", "label": True})
    assert read_classification(path) == [ClassifiedText("Is it?", "It is.", "true")]


@pytest.mark.parametrize(
    "texts",
    [
        ("premise", "question"),
        ("text", "sentence"),
        ("question", "paragraph", "answer"),
        ("sentence1", "sentence2", "hypothesis"),
        ("text", "question", "text_pair"),
    ],
)
def test_no_text_to_classify_is_lost(tmp_path, texts):
    path = write_json(tmp_path / "a.jsonl", {**dict.fromkeys(texts, "a"), "label": "x"})
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1: found the texts {', '.join(sorted(texts))}; accepted are"):
        read_classification(path)


@pytest.mark.parametrize("name", ["question", "passage", "answer"])
def test_what_is_asked_about_is_a_text(tmp_path, name):
    about = {"answer": "It is."} if name == "question" else {}
    path = write_json(tmp_path / "a.jsonl", {"question": "Is it?", **about, "label": "x", name: 3})
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: .* must be a string, found int 3"):
        read_classification(path)


def test_what_is_no_text_beside_a_text(tmp_path):
    row = {"text": "a", "context": "of 1999", "answer": "b", "question": None, "sentence": "", "label": "x"}
    assert read_classification(write_json(tmp_path / "a.jsonl", row)) == [ClassifiedText("a", None, "x")]


# --- Similar texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    "column",
    [
        *("label", "labels", "Label", "gold_label", "is_duplicate", "Quality", "score", "scores", "similarity"),
        *("similarity_score", "relatedness_score", "is_paraphrase", "label_text"),
    ],
)
def test_pairs_that_are_judged_are_not_all_alike(tmp_path, suffix, column):
    rows = [{"sentence1": "a", "sentence2": "b", column: judged} for judged in ("1", "0")]
    with pytest.raises(ValueError, match=rf"a.{suffix}, (line|row) [12]: column '{column}' says .* leave"):
        read_similar(write_rows(tmp_path / f"a.{suffix}", *rows))


@pytest.mark.parametrize("column", ["negative_1", "negatives", "hard_negative", "neg2", "positive_2", "positives"])
def test_no_further_text_is_lost(tmp_path, column):
    row = {"anchor": "a", "positive": "b", "negative": "c", column: "d"}
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1: column '{column}' .* accepted"):
        read_similar(write_json(tmp_path / "a.jsonl", row))
    row = {"anchor": "a", "positive": "b", "negative": None, "pos_tags": "d", "label": None, "source": "e"}
    assert read_similar(write_json(tmp_path / "a.jsonl", row)) == [SimilarTexts("a", "b", None)]


# --- Fields -----------------------------------------------------------------------------------------------------------


def test_long_fields(tmp_path):
    long = "word, " * 50_000
    assert read_classification(write(tmp_path / "a.csv", "text,label", f'"{long}",a'))[0].text == long
    assert read_classification(write(tmp_path / "a.tsv", "text\tlabel", f"{long}\ta"))[0].text == long


def test_white_space_in_words(tmp_path):
    words = ("10\u00a0000", "a\u3000b", "\u2028")
    for between, end in (("\t", ""), ("\t", "\t"), (" ", ""), ("  ", " ")):
        path = write(tmp_path / "a.conll", *(f"{word}{between}O{end}" for word in words))
        assert read_tagging(path) == [(words, ("O", "O", "O"))]


def test_where_each_example_is(tmp_path):
    tagged = read_tagging(write(tmp_path / "a.conll", "", "EU O", "is O", "", "-DOCSTART- O", "", "Peter B-PER"))
    assert tagged.places == [f"{tmp_path}/a.conll, line 2", f"{tmp_path}/a.conll, line 7"]
    table = read_classification(write(tmp_path / "a.csv", "text,label", '"a', 'b",x', "", "c,y"))
    assert table.places == [f"{tmp_path}/a.csv, line 2", f"{tmp_path}/a.csv, line 5"]
    assert table.part([1]).places == table.places[1:] and table.part([1]) == table[1:]


def test_parallel_files_of_unlike_length(tmp_path):
    write(tmp_path / "a.de", "eins")
    with pytest.raises(ValueError, match=r"a.en has 2 lines, but .*a.de has 1"):
        translations(write(tmp_path / "a.en", "one", "two"))
    write(tmp_path / "b.de", "eins", "")
    with pytest.raises(ValueError, match=r"b.de, line 2: empty, but the same line of the other file is not"):
        translations(write(tmp_path / "b.en", "one", "two"))
