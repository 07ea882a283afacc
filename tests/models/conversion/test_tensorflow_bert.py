"""Tests of BERT in TensorFlow's format, which TensorFlow itself writes and reads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convertible_models import random_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastformer.models.conversion.folders import convert

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow: pip install fastformer[tensorflow]"
    ),
]
# Names and shapes of the published checkpoints, for a hidden size of 32 and an intermediate size of 40.
_BLOCK = {
    **{f"attention/self/{part}/kernel": [32, 32] for part in ("query", "key", "value")},
    **{f"attention/self/{part}/bias": [32] for part in ("query", "key", "value")},
    "attention/output/dense/kernel": [32, 32],
    "attention/output/dense/bias": [32],
    "attention/output/LayerNorm/gamma": [32],
    "attention/output/LayerNorm/beta": [32],
    "intermediate/dense/kernel": [32, 40],
    "intermediate/dense/bias": [40],
    "output/dense/kernel": [40, 32],
    "output/dense/bias": [32],
    "output/LayerNorm/gamma": [32],
    "output/LayerNorm/beta": [32],
}
PUBLISHED = {
    "bert/embeddings/word_embeddings": [61, 32],
    "bert/embeddings/position_embeddings": [24, 32],
    "bert/embeddings/token_type_embeddings": [3, 32],
    "bert/embeddings/LayerNorm/gamma": [32],
    "bert/embeddings/LayerNorm/beta": [32],
    **{f"bert/encoder/layer_{layer}/{name}": shape for layer in range(2) for name, shape in _BLOCK.items()},
    "bert/pooler/dense/kernel": [32, 32],
    "bert/pooler/dense/bias": [32],
    "cls/predictions/transform/dense/kernel": [32, 32],
    "cls/predictions/transform/dense/bias": [32],
    "cls/predictions/transform/LayerNorm/gamma": [32],
    "cls/predictions/transform/LayerNorm/beta": [32],
    "cls/predictions/output_bias": [61],
    "cls/seq_relationship/output_weights": [2, 32],
    "cls/seq_relationship/output_bias": [2],
}
# Read a checkpoint as graphs do, with variables of these names, and save it again behind an optimizer's tensors.
_SAVER = """
import json, sys
import tensorflow.compat.v1 as tf
source, target = sys.argv[1:]
tf.disable_eager_execution()
shapes = dict(tf.train.list_variables(source))
for name, shape in shapes.items():
    tf.get_variable(name, shape)
with tf.Session() as session:
    tf.train.Saver().restore(session, source)
    tf.get_variable("global_step", [], initializer=tf.zeros_initializer())
    for name, shape in shapes.items():
        tf.get_variable(name + "/adam_m", shape)
        tf.get_variable(name + "/adam_v", shape)
    fresh = [variable for variable in tf.global_variables() if variable.op.name not in shapes]
    session.run(tf.variables_initializer(fresh))
    tf.train.Saver().save(session, target)
print(json.dumps({name: list(shape) for name, shape in shapes.items()}))
"""


def test_tensorflow_reads_what_was_written_and_what_it_writes_is_read(tmp_path: Path) -> None:
    random_model("BertForPreTraining").save_pretrained(tmp_path / "source")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(words))
    convert(tmp_path / "source", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "tensorflow", "tensorflow-bert")
    config = json.loads((tmp_path / "tensorflow" / "bert_config.json").read_text())
    assert (config["hidden_size"], config["type_vocab_size"]) == (32, 3)

    again = tmp_path / "again"
    again.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", _SAVER, tmp_path / "tensorflow" / "bert_model.ckpt", again / "model.ckpt-7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == PUBLISHED

    for name in ("bert_config.json", "vocab.txt"):
        (again / name).write_bytes((tmp_path / "tensorflow" / name).read_bytes())
    done = convert(again, tmp_path / "ours-again")
    assert (done.source_format, done.source_class) == ("tensorflow-bert", "BertForPreTraining")
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "ours-again"))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)
    # No capital letter in the vocabulary: the text was lower-cased.
    assert AutoTokenizer.from_pretrained(tmp_path / "ours-again")("The CAT")["input_ids"] == [2, 5, 6, 3]

    data = next(again.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"TensorFlow could not read .*model\.ckpt-7: "):
        convert(again, tmp_path / "damaged")


def test_from_hugging_faces_format_in_one_step(tmp_path: Path) -> None:
    random_model("BertModel").save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "tensorflow", "tensorflow-bert")
    convert(tmp_path / "tensorflow", tmp_path / "back", "bert")
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    random_model("BertModel", layer_norm_eps=1e-5).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="layer_norm_eps must be 1e-12 in TensorFlow's BERT; got 1e-05"):
        convert(tmp_path / "source", tmp_path / "tensorflow", "tensorflow-bert")
    random_model("BertForTokenClassification").save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"the class must be one of .*; got BertForTokenClassification"):
        convert(tmp_path / "tokens", tmp_path / "tensorflow", "tensorflow-bert")
    assert not (tmp_path / "tensorflow").exists()
