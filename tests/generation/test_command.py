"""Tests of the command ``fastformer generate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig

from fastformer.cli import main
from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.generation import Generator, SamplingParameters
from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForMaskedLM, FastformerForSeq2SeqLM

pytestmark = pytest.mark.cpu

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.4,
    "vocab_size": 300,
    "decoder_start_token_id": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models: a decoder, an encoder-decoder, and others that generate nothing."""
    root = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    kinds = {
        "decoder": FastformerForCausalLM,
        "encoder_decoder": FastformerForSeq2SeqLM,
        "encoder": FastformerForMaskedLM,
    }
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog ran to a cat"] * 3, 300)
    for stack, kind in kinds.items():
        kind(FastformerConfig(stack=stack, **SMALL)).save_pretrained(root / stack)
        tokenizer.save_pretrained(root / stack)
    BertConfig().save_pretrained(root / "bert")
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.quick
def test_text(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stack, kind in (("decoder", FastformerForCausalLM), ("encoder_decoder", FastformerForSeq2SeqLM)):
        model, tokenizer = kind.from_pretrained(folders / stack), AutoTokenizer.from_pretrained(folders / stack)
        expected = Generator(model, tokenizer).generate(["the cat", "a"], SamplingParameters(max_new_tokens=6))
        options = ("--max_new_tokens", 6)
        status, out, err = run(capsys, folders / stack, "--prompt", "the cat", *options)
        assert (status, out) == (0, f"{expected[0].text}\n")
        assert "1 prompt" in err and "6 new tokens" in err
        assert run(capsys, folders / stack, "--prompt", "the cat", *options, "--stream")[1] == out
        _, out, _ = run(capsys, folders / stack, "--prompt", "the cat", "--prompt", "a", *options)
        assert out == f"--- the cat\n{expected[0].text}\n--- a\n{expected[1].text}\n"


def test_json_lines(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "the cat", "temperature": 1.0, "seed": 3, "max_new_tokens": 4},
        {"prompt": "Grüße", "stop": ["zzz"]},
        {"prompt": "the cat", "temperature": 1.0, "seed": 3, "max_new_tokens": 4},
    ]
    prompts.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    options = ("--prompts", prompts, "--max_new_tokens", 9, "--json", "--logprobs", "--slots", 2)
    status, out, _ = run(capsys, folders / "decoder", *options)
    got = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [each["prompt"] for each in got] == ["the cat", "Grüße", "the cat"]
    assert [len(each["tokens"]) for each in got] == [len(each["logprobs"]) for each in got] == [4, 9, 4]
    assert got[0] == got[2] and got[0]["finish_reason"] == "length"
    _, out, _ = run(capsys, folders / "decoder", *options, "--stream")
    pieces = [json.loads(line) for line in out.splitlines()]
    for index, each in enumerate(got):
        own = [piece for piece in pieces if piece["request"] == index]
        assert "".join(piece["text"] for piece in own) == each["text"]
        assert [token for piece in own for token in piece["tokens"]] == each["tokens"]


def test_draft(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (folders / "decoder", "--prompt", "the cat", "--max_new_tokens", 12)
    _, expected, _ = run(capsys, *options)
    _, out, err = run(capsys, *options, "--draft", folders / "decoder", "--draft_tokens", 2, "--page_size", 4)
    assert out == expected and "100% of the drafted tokens were accepted" in err


@pytest.mark.parametrize(
    ("arguments", "line", "message"),
    [
        (["decoder"], None, "there is no prompt; give --prompt or --prompts"),
        (["nowhere", "--prompt", "a"], None, "there is no folder"),
        (["encoder", "--prompt", "a"], None, "holds an encoder, which cannot generate text"),
        (["bert", "--prompt", "a"], None, "holds a bert model in Hugging Face's format; convert it with"),
        (["decoder", "--prompt", "a", "--prompt", "b", "--stream"], None, "would mix their texts; add --json"),
        (["decoder", "--prompt", "a", "--logprobs"], None, "--logprobs needs --json"),
        (["decoder", "--prompt", "a", "--top_k", "3"], None, "top_k has no effect at temperature 0"),
        (["decoder", "--prompt", "a", "--max_new_tokens", "600"], None, "more together than the model's"),
        (["decoder", "--prompt", "a", "--device", "cpu", "--cuda_graphs"], None, "since the model is on cpu; got True"),
        (["decoder"], "{", "line 2: not JSON"),
        (["decoder"], '{"text": "a"}', 'line 2 must be an object with a string "prompt"'),
        (["decoder"], '{"prompt": "a", "top": 1}', "line 2 has top; accepted are prompt, max_new_tokens"),
        (["decoder"], '{"prompt": "a", "top_p": 2}', "line 2: top_p must be in (0, 1]"),
        (["decoder"], '{"prompt": "a", "temperature": "hot"}', "line 2: temperature must be a number; got 'hot'"),
        (["decoder"], '{"prompt": "a", "temperature": 1, "seed": 1.5}', "line 2: seed must be a whole number; got 1.5"),
        (["decoder"], '{"prompt": "a", "max_new_tokens": true}', "line 2: max_new_tokens must be a whole number"),
        (["decoder"], '{"prompt": "a", "temperature": 1e-40}', "line 2: temperature must be 0, or 1e-6 or more"),
        (["decoder"], '{"prompt": "a", "temperature": null}', "line 2: temperature must be a number; got None"),
        (["decoder"], '{"prompt": "a", "stop": [1]}', "line 2: stop must be a sequence of strings"),
        (["decoder"], '{"prompt": "a", "eos_token_ids": [0.5]}', "line 2: eos_token_ids must be a sequence of token"),
        (["decoder"], '{"prompt": "a", "logprobs": "no"}', "line 2: logprobs must be true or false; got 'no'"),
        (["decoder", "--prompt", "a\udcff"], None, "--prompt 1 is not UTF-8"),
        (["decoder", "--prompt", "a", "--stop", "a\udcff"], None, "--stop is not UTF-8"),
    ],
)
def test_what_is_wrong_is_said(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str | None,
    message: str,
) -> None:
    if line is not None:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + line)
        arguments = [*arguments, "--prompts", str(tmp_path / "prompts.jsonl")]
    status, out, err = run(capsys, folders / arguments[0], *arguments[1:])
    assert (status, out) == (2, "")
    assert err.startswith("fastformer generate: error: ") and message in err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    assert "examples:\n  fastformer generate gpt2" in capsys.readouterr().out
