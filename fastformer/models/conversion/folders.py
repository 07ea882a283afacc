"""Conversion of checkpoints in folders from one architecture to another, a tensor at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from fastformer.data.pretraining.tokenizer import VOCABULARIES, check_tokenizer
from fastformer.files import atomic_folder
from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.bert import BERT
from fastformer.models.conversion.engine import Checkpoint, check_own, read_checkpoint, write_checkpoint
from fastformer.models.conversion.files import read_json, read_tensors, write_tensors
from fastformer.models.conversion.models import ARCHITECTURES, architecture_of
from fastformer.models.conversion.tensorflow_bert import is_tensorflow, read_tensorflow, write_tensorflow
from fastformer.models.heads.embedding import FastformerForEmbedding
from fastformer.models.loading import load_configuration
from fastformer.models.modeling import FastformerPreTrainedModel

FASTFORMER, TENSORFLOW = FastformerConfig.model_type, "tensorflow-bert"
FORMATS = (FASTFORMER, *ARCHITECTURES, TENSORFLOW)
"""The formats that a checkpoint can be converted to."""

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
# Files that pipelines need in addition to the model: tokenizers, image processors, generation settings.
_COMPANIONS = (
    _GENERATION,
    _TOKENIZER,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class Conversion:
    """A summary of a conversion.

    Attributes:
        source_format, target_format: two of `FORMATS`.
        source_class, target_class: the classes of the models.
        tensors, parameters: the numbers of tensors and parameters written.
        companions: other files that were copied or written.
    """

    source_format: str
    source_class: str
    target_format: str
    target_class: str
    tensors: int
    parameters: int
    companions: list[str]


def convert(
    source: Path,
    target: Path,
    to: str | None = None,
    *,
    class_name: str | None = None,
    drop: Sequence[str] = (),
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> Conversion:
    """Convert the checkpoint in the folder `source` into the new folder `target`.

    `target` is complete, or does not exist.

    Args:
        to: the format to convert to, one of `FORMATS`; None for Fastformer's format.
        class_name: the class of the checkpoint, if its configuration does not name it or names another one.
        drop: patterns, like a shell's, of tensors to leave out.
        shard_bytes: the most bytes in one file of weights, and the most memory used.
        progress: takes the number of tensors, and returns a function that is called after each.

    Raises:
        FileNotFoundError, FileExistsError: `source` is not a checkpoint's folder, or `target` exists.
        ValueError: the checkpoint is unknown, damaged or incomplete, or cannot be expressed; the message lists why.
    """
    try:
        return _convert(source, target, to or FASTFORMER, class_name, drop, shard_bytes, progress)
    except (ValueError, StrictDataclassError) as error:  # StrictDataclassError: a configuration's field of a wrong type
        if isinstance(error, ValueError) and str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def _convert(
    source: Path,
    target: Path,
    to: str,
    class_name: str | None,
    drop: Sequence[str],
    shard_bytes: int,
    progress: Callable[[int], Callable[[], None]],
) -> Conversion:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder; give one that holds a checkpoint")
    if target.exists():
        raise FileExistsError(f"{target} already exists; give a folder that does not exist")
    if to not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}; got {to!r}")
    check_tokenizer(source)
    travelling = _companions(source)
    with tempfile.TemporaryDirectory() as scratch:
        given = _read(source, class_name, drop, Path(scratch))
        if given.format == to:
            others = ", ".join(name for name in FORMATS if name != to)
            raise ValueError(f"{source} already has the format {to}; name another with --to, one of {others}")
        converted = given.own if to == FASTFORMER else write_checkpoint(_architecture(to), given.own)
        with atomic_folder(target) as folder:
            _write(converted, to, folder, shard_bytes, progress(len(converted.tensors.shapes)), Path(scratch))
            for path in travelling:
                shutil.copyfile(path, folder / path.name)
            companions = {path.name for path in travelling}
            companions |= _make_companions(source, given, converted, to, folder, companions)
    return Conversion(
        given.format,
        given.class_name,
        to,
        converted.model_class.__name__,
        len(converted.tensors.shapes),
        sum(map(prod, converted.tensors.shapes.values())),
        sorted(companions),
    )


@dataclass(frozen=True)
class _Source:
    """A checkpoint as found, and the same as Fastformer's."""

    format: str
    class_name: str
    config: PreTrainedConfig
    own: Checkpoint


def _read(source: Path, class_name: str | None, drop: Sequence[str], scratch: Path) -> _Source:
    config: PreTrainedConfig
    if is_tensorflow(source):
        config, found, tensors = read_tensorflow(source, scratch)
        head = BERT.head_of(class_name or found)
        return _Source(TENSORFLOW, head.theirs.__name__, config, read_checkpoint(BERT, head, config, tensors, drop))
    if not (source / _CONFIG).is_file():
        raise FileNotFoundError(f"{source} has no {_CONFIG}: it is not a checkpoint of Hugging Face's or Fastformer's")
    fields = read_json(source / _CONFIG)
    if "quantization_config" in fields:
        raise ValueError("quantization_config must be absent: quantised weights are not converted")
    if fields.get("model_type") == FASTFORMER:
        if drop:
            raise ValueError("only tensors of other architectures can be dropped; this checkpoint is Fastformer's")
        own = _read_own(source, class_name or _named_class(source, fields))
        return _Source(FASTFORMER, own.model_class.__name__, own.config, own)
    architecture, head = _find_head(source, fields, class_name)
    config = load_configuration(source, architecture.config_class)
    own = read_checkpoint(architecture, head, config, read_tensors(source), drop)
    return _Source(architecture.name, head.theirs.__name__, config, own)


def _find_head(source: Path, fields: dict[str, Any], class_name: str | None) -> tuple[Architecture, Head]:
    if "model_type" in fields:
        architecture = architecture_of(fields["model_type"])
        return architecture, architecture.head_of(class_name or _named_class(source, fields))
    heads = {head.theirs.__name__: (known, head) for known in ARCHITECTURES.values() for head in known.heads}
    class_name = class_name or _named_class(source, fields)
    if class_name not in heads:
        raise ValueError(f"the class must be one of {', '.join(heads)}; got {class_name!r}")
    return heads[class_name]


def _named_class(source: Path, fields: dict[str, Any]) -> str:
    named = fields.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise ValueError(
            f"architectures in {source / _CONFIG} must name one class; got {named}; name the class yourself"
        )
    return named[0]


def _read_own(source: Path, class_name: str) -> Checkpoint:
    heads = [head.ours for architecture in ARCHITECTURES.values() for head in architecture.heads]
    classes: dict[str, type[FastformerPreTrainedModel]] = {
        known.__name__: known for known in [*heads, FastformerForEmbedding]
    }
    if class_name not in classes:
        raise ValueError(f"the class must be one of {', '.join(classes)}; got {class_name!r}")
    own = Checkpoint(classes[class_name], load_configuration(source, FastformerConfig), read_tensors(source))
    check_own(own)
    return own


def _architecture(to: str) -> Architecture:
    return BERT if to == TENSORFLOW else architecture_of(to)


def _write(
    converted: Checkpoint, to: str, folder: Path, shard_bytes: int, advance: Callable[[], None], scratch: Path
) -> None:
    if to == TENSORFLOW:
        write_tensorflow(folder, converted.config, converted.model_class.__name__, converted.tensors, scratch)
        return
    write_tensors(folder, converted.tensors, shard_bytes, advance)
    config: PreTrainedConfig = deepcopy(converted.config)
    config.architectures = [converted.model_class.__name__]
    config.save_pretrained(folder)


def _companions(source: Path) -> set[Path]:
    """Return the other files to copy; raise ValueError if one is damaged JSON."""
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    for path in found:
        if path.suffix == ".json":
            read_json(path)
    return found


def _make_companions(
    source: Path, given: _Source, converted: Checkpoint, to: str, folder: Path, copied: Set[str]
) -> set[str]:
    """Write files whose content the old configuration implied or that are missing; return their names."""
    made = set()
    if to == TENSORFLOW:
        if "vocab.txt" not in copied and _write_vocabulary(source / "tokenizer.json", folder / "vocab.txt"):
            made.add("vocab.txt")
        return made
    if any(fnmatchcase(name, pattern) for name in copied for pattern in VOCABULARIES):
        made |= _name_tokenizer(source, given, folder)
    if _GENERATION not in copied and given.format != TENSORFLOW and converted.model_class.can_generate():
        GenerationConfig.from_pretrained(source, config_file_name=_CONFIG).save_pretrained(folder)
        made.add(_GENERATION)
    return made


def _name_tokenizer(source: Path, given: _Source, folder: Path) -> set[str]:
    """Write the tokenizer's class if only the old configuration's type implied it."""
    file = folder / _TOKENIZER
    fields = read_json(file) if file.exists() else {}
    model_type = BERT.name if given.format == TENSORFLOW else given.format
    implied = getattr(given.config, "tokenizer_class", None) or TOKENIZER_MAPPING_NAMES.get(model_type)
    if "tokenizer_class" in fields or implied is None:
        return set()
    fields["tokenizer_class"] = implied
    if given.format == TENSORFLOW and "do_lower_case" not in fields:
        words = (source / "vocab.txt").read_text(encoding="utf-8").split()
        # The format does not record it; a vocabulary without a capital letter is for lower-cased text.
        fields["do_lower_case"] = all(word == word.lower() or word.startswith("[") for word in words)
    file.write_text(json.dumps(fields, indent=2) + "\n")
    return {_TOKENIZER}


def _write_vocabulary(tokenizer: Path, file: Path) -> bool:
    """Write a WordPiece tokenizer's vocabulary, one word a line; return whether it is a WordPiece tokenizer."""
    model = read_json(tokenizer).get("model", {}) if tokenizer.exists() else {}
    if model.get("type") != "WordPiece":
        return False
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    file.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return True
