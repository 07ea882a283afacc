"""The configuration in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig


def load_configuration(folder: str | Path, **arguments: Any) -> Any:
    """The configuration of a model in Hugging Face's format. Code that the folder brings is never run.

    Args:
        folder: of the model, or its name on the hub.
        arguments: of `AutoConfig.from_pretrained`.

    Raises:
        ValueError, OSError: there is none, or it is damaged.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)
    except RecursionError:
        raise ValueError(f"{folder}/config.json has lists or objects within each other, too deep to be read") from None
