"""Fastformer inside Hugging Face models: attention, acceleration of whole models, verification, export of kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastformer.integrations.trainer import AccelerateCallback

__all__ = ["AccelerateCallback"]


def __getattr__(name: str) -> Any:
    """Import transformers only when a name that needs it is used."""
    if name not in __all__:
        raise AttributeError(f"module 'fastformer.integrations' has no attribute {name!r}")
    module = importlib.import_module("fastformer.integrations.trainer")
    return globals().setdefault(name, getattr(module, name))
