"""Loading of a model's folder in Hugging Face's format: its configuration, and the model with all of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from fastformer.models.finite import check_finite_weights


def load_configuration(folder: str | Path, kind: Any = AutoConfig, **arguments: Any) -> Any:
    """Load the configuration of a model in Hugging Face's format. Code in the folder is never run.

    Args:
        folder: the model's folder, or its name on the hub.
        kind: the class of the configuration; AutoConfig takes the class that the file names.
        arguments: arguments of its `from_pretrained`.

    Raises:
        ValueError, OSError: there is no configuration, or it is damaged.
    """
    try:
        config = kind.from_pretrained(folder, trust_remote_code=False, **arguments)
        _check_common_fields(config)
    except RecursionError:
        raise ValueError(f"{folder}/config.json has lists or objects nested too deep to be read") from None
    except (StrictDataclassError, ValueError, AttributeError, TypeError, KeyError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(f"{folder}/config.json is not a configuration of a model: {error}") from error
    return config


def load_whole_model(kind: Any, folder: str | Path, **arguments: Any) -> Any:
    """Load the model in a folder, which must hold every weight of it, all of them finite.

    Args:
        kind: the class of the model.
        folder: the model's folder.
        arguments: arguments of `from_pretrained`.

    Raises:
        ValueError, OSError: weights are missing or too many, or of another shape, or damaged, or not a number.
    """
    model, missing = load_model(kind, folder, **arguments)
    _refuse_missing(folder, missing)
    check_finite_weights(model)
    return model


def load_model(kind: Any, folder: str | Path, **arguments: Any) -> tuple[Any, list[str]]:
    """Load the model in a folder; also return the names of the weights that are new because the folder has none.

    Only weights of a head or of a pooler, which a task adds, may be new.

    Arguments and errors are those of `load_whole_model`.
    """
    with _without_table_of_missing_weights():
        model, info = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments)
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {name} has the shape {tuple(found)} there and "
            f"{tuple(expected)} by the configuration"
        )
    missing = sorted(info["missing_keys"])
    _refuse_missing(folder, _of_base(model, missing))
    surplus = _of_base(model, sorted(info["unexpected_keys"])) if model.config.model_type == "fastformer" else []
    if surplus:
        named = some_names(surplus)
        raise ValueError(f"the weights in {folder} include some that its config.json has no place for: {named}")
    return model, missing


def _of_base(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return [name for name in names if name.startswith(prefix) and "pooler" not in name.split(".")]


def _refuse_missing(folder: str | Path, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(f"the weights in {folder} lack what its config.json asks for: {some_names(missing)}")


def some_names(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_common_fields(config: Any) -> None:
    """Raise ValueError for invalid fields that transformers accepts unchecked."""
    dtype, architectures = config.dtype, config.architectures
    if not (dtype is None or isinstance(dtype, dict) or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise ValueError(f"dtype must be a floating-point type such as float32; got {dtype!r:.60}")
    named = architectures is None or isinstance(architectures, list)
    if not named or not all(isinstance(name, str) for name in architectures or ()):
        raise ValueError(f"architectures must be a list of names; got {architectures!r:.60}")


@contextmanager
def _without_table_of_missing_weights() -> Iterator[None]:
    """Silence transformers' table of missing weights: they belong to a new head, or an error reports them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
