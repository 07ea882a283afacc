"""BERT in its first format: a TensorFlow checkpoint, ``bert_config.json`` and ``vocab.txt`` (Devlin et al. 2019).

TensorFlow runs in a separate process, which exchanges tensors with this one through a safetensors file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from fastformer.extras import require
from fastformer.models.conversion.files import read_json
from fastformer.models.conversion.tensors import Tensors

CONFIG_FILE, _CHECKPOINT = "bert_config.json", "bert_model.ckpt"
# Tensors that training saves in addition to the weights.
_OPTIMIZER = re.compile(r"global_step|.*/adam_[mv]")
_CONFIG_FIELDS = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)
# Names of the heads' tensors in Hugging Face's checkpoints and in TensorFlow's, where they differ.
_HEADS = {
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
    "classifier.weight": "output_weights",
    "classifier.bias": "output_bias",
}
_HUGGING_FACES = {theirs: ours for ours, theirs in _HEADS.items()}
# The classes that the format has; each is recognised by its last tensor.
_CLASSES = {
    "cls.seq_relationship.bias": BertForPreTraining,
    "cls.predictions.bias": BertForMaskedLM,
    "qa_outputs.bias": BertForQuestionAnswering,
    "classifier.bias": BertForSequenceClassification,
    "bert.embeddings.LayerNorm.bias": BertModel,
}


def is_tensorflow(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in this format."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists()


def read_tensorflow(folder: Path, scratch: Path) -> tuple[BertConfig, str, Tensors]:
    """Return the checkpoint's configuration, the name of its class and its tensors, all in Hugging Face's form.

    Args:
        scratch: an empty folder, which must stay as long as the tensors are read.

    Raises:
        ValueError: the configuration has an unknown field, or TensorFlow cannot read the checkpoint.
    """
    given = read_json(folder / CONFIG_FILE)
    if unknown := sorted(given.keys() - set(_CONFIG_FIELDS)):
        raise ValueError(f"{CONFIG_FILE} must have only {', '.join(_CONFIG_FIELDS)}; got {', '.join(unknown)}")
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        found = ", ".join(path.name for path in indices) or "none"
        raise ValueError(f"{folder} must hold one TensorFlow checkpoint (NAME.index and NAME.data-*); got {found}")
    file = scratch / "tensors.safetensors"
    _run_tensorflow("read", indices[0].with_suffix(""), file)
    tensors = {
        hugging_face_name(name): tensor.T.contiguous() if name.endswith("/kernel") else tensor
        for name, tensor in load_file(file).items()
        if not _OPTIMIZER.fullmatch(name)
    }
    class_name = next((known.__name__ for name, known in _CLASSES.items() if name in tensors), BertModel.__name__)
    return BertConfig(**given, layer_norm_eps=1e-12), class_name, Tensors.of(tensors)


def write_tensorflow(folder: Path, config: BertConfig, class_name: str, tensors: Tensors, scratch: Path) -> None:
    """Write a checkpoint of a class of Hugging Face's BERT into `folder` in this format, as float32.

    Raises:
        ValueError: the format has no place for the class, a field of the configuration or a tensor.
    """
    classes = [known.__name__ for known in _CLASSES.values()]
    if class_name not in classes:
        raise ValueError(f"the class must be one of {', '.join(classes)} in TensorFlow's BERT; got {class_name}")
    if config.layer_norm_eps != 1e-12:
        raise ValueError(f"layer_norm_eps must be 1e-12 in TensorFlow's BERT; got {config.layer_norm_eps}")
    if not config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be True in TensorFlow's BERT; got False")
    tensors = tensors.renamed(lambda name: f"bert.{name}" if class_name == BertModel.__name__ else name)
    renamed = {tensorflow_name(name): _float32(name, tensors.load(name)) for name in tensors.shapes}
    kernels = {name: tensor.T if name.endswith("/kernel") else tensor for name, tensor in renamed.items()}
    file = scratch / "tensors.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in kernels.items()}, file)
    _run_tensorflow("write", folder / _CHECKPOINT, file)
    fields = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name of TensorFlow's tensor `name`."""
    if name in _HUGGING_FACES:
        return _HUGGING_FACES[name]
    name = re.sub(r"layer_(\d+)", r"layer.\1", name).replace("/", ".")
    name = re.sub(r"\.(kernel|gamma)$", ".weight", re.sub(r"\.beta$", ".bias", name))
    return re.sub(r"(_embeddings)$", r"\1.weight", name)


def tensorflow_name(name: str) -> str:
    """Return TensorFlow's name of Hugging Face's tensor `name`."""
    if name in _HEADS:
        return _HEADS[name]
    name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name))
    name = re.sub(r"\.weight$", ".kernel", re.sub(r"(_embeddings)\.weight$", r"\1", name))
    return re.sub(r"layer\.(\d+)", r"layer_\1", name).replace(".", "/")


def _float32(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} must be float32, float16 or bfloat16; got {tensor.dtype}")
    return tensor.float()


def _run_tensorflow(action: str, prefix: Path, file: Path) -> None:
    require("tensorflow")
    program = Path(__file__).with_name("tensorflow_process.py")
    command = [sys.executable, str(program), action, str(prefix), str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"TensorFlow could not {action} {prefix}: {lines[-1]}")
