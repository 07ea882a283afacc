"""Prompts from a file of JSON lines, each with its own sampling parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastformer.generation.parameters import SamplingParameters
from fastformer.lines import json_object, numbered_lines

SAMPLING_OPTIONS = tuple(field.name for field in fields(SamplingParameters))


def read_prompts(path: Path, common: SamplingParameters) -> Iterator[tuple[str, SamplingParameters]]:
    """Yield the prompt of each line that is not blank, and the sampling parameters for it.

    Args:
        path: JSON lines: objects with "prompt" and, optionally, fields of `SamplingParameters`.
        common: the parameters wherever a line gives no others.

    Raises:
        ValueError, OSError: the file cannot be read, or a line is wrong; the message names it.
    """
    for number, line in numbered_lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            prompt, own = _parsed(place, line)
            yield prompt, _parameters(place, common, own)


def _parsed(place: str, line: str) -> tuple[str, dict[str, Any]]:
    content = json_object(line, place)
    if not isinstance(content.get("prompt"), str):
        raise ValueError(f'{place} must be an object with a string "prompt"; found {", ".join(content) or "nothing"}')
    unknown = sorted(content.keys() - {"prompt", *SAMPLING_OPTIONS})
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}; accepted are prompt, {', '.join(SAMPLING_OPTIONS)}")
    return content.pop("prompt"), content


def _parameters(place: str, common: SamplingParameters, own: dict[str, Any]) -> SamplingParameters:
    try:
        return replace(common, **own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
