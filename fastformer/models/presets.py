"""Published model shapes by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastformer.models.configuration import FastformerConfig

# Layers and hidden size; head_dim is 64 and the intermediate size four times the hidden size in all of them.
_BERT = {
    "bert-tiny": (2, 128),
    "bert-mini": (4, 256),
    "bert-small": (4, 512),
    "bert-medium": (8, 512),
    "bert-base": (12, 768),
    "bert-large": (24, 1024),
}

PRESETS = tuple(_BERT)


def preset(name: str, **overrides: Any) -> FastformerConfig:
    """The configuration of a published shape.

    Args:
        name: bert-tiny, bert-mini, bert-small, bert-medium (Turc et al. 2019, https://arxiv.org/abs/1908.08962),
            bert-base or bert-large (Devlin et al. 2018, https://arxiv.org/abs/1810.04805).
        overrides: fields of `FastformerConfig` to set differently, such as `vocab_size`.

    Raises:
        ValueError: there is no such preset, or no such field.

    >>> preset("bert-base", vocab_size=8192).hidden_size
    768
    """
    if name not in _BERT:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    known = {field.name for field in fields(FastformerConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"FastformerConfig has no field {', '.join(map(repr, unknown))}")
    layers, hidden = _BERT[name]
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    return FastformerConfig(**{**shape, **overrides})
