"""The launch configuration of an operation: a forced one, else one measured on this GPU, else the shipped default.

A configuration is a frozen dataclass of whole numbers and switches. `fastformer tune` measures configurations for each
class of shapes, and stores them for an architecture and a version of triton.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
import triton

from fastformer_kernels.kept_launches import forget_launches
from fastformer_kernels.launch import architecture_of

FORMAT = 2

T = TypeVar("T")
Stored = dict[str, int]
"""A configuration's fields as they are stored."""

# The configurations that each `with` block forces, the newest block last. Threads leave their blocks in any order.
_blocks: tuple[Mapping[str, Any], ...] = ()
_changing_blocks = Lock()
# All blocks together. Replaced, never changed in place: autograd's threads read it too.
_forced: Mapping[str, Any] = {}
# Measured configurations by architecture, as `read_plans` returns them; None until they are first needed.
_measurements: dict[str, dict] | None = None
# The defaults that launches asked for, recorded within `shipped_defaults`.
_asked: dict[str, Any] | None = None


def chosen(operation: str, tensor: torch.Tensor, default: T, shape: Callable[[], tuple[str, ...]]) -> T:
    """The configuration of `operation` for a class of shapes.

    Args:
        tensor: any tensor on the device that will run the operation.
        default: the result where none is forced and none was measured.
        shape: returns the class of shapes; called only where something was measured.
    """
    if operation in _forced:
        return _forced[operation]
    if _asked is not None:
        _asked[class_key(operation, shape())] = default
        return default
    if not _stored():
        return default
    kind: Any = type(default)
    return _measured(architecture_of(tensor).name, operation, shape(), kind) or default


def class_key(operation: str, shape: tuple[str, ...]) -> str:
    """The key under which a configuration is stored."""
    return " ".join((operation, *shape))


def size_class(size: int, ends: tuple[int, ...]) -> str:
    """The class of a size. `ends` are the largest sizes of all classes except the last."""
    # torch.compile cannot trace `bisect`.
    for end in ends:
        if size <= end:
            return f"<={end}"
    return f">{ends[-1]}"


def others_than(default: T, found: Iterable[T]) -> list[T]:
    """Each of `found` once, without `default`."""
    return [configuration for configuration in dict.fromkeys(found) if configuration != default]


@contextmanager
def forced(configurations: Mapping[str, Any]) -> Iterator[None]:
    """Launch these operations with these configurations within the `with` block, for all shapes and in every thread."""
    block = dict(configurations)
    _change_blocks(lambda blocks: (*blocks, block))
    try:
        yield
    finally:
        _change_blocks(lambda blocks: tuple(each for each in blocks if each is not block))


def _change_blocks(change: Callable[[tuple[Mapping[str, Any], ...]], tuple[Mapping[str, Any], ...]]) -> None:
    global _blocks, _forced
    with _changing_blocks:
        _blocks = change(_blocks)
        _forced = {operation: forced for block in _blocks for operation, forced in block.items()}
        forget_launches()


@contextmanager
def shipped_defaults() -> Iterator[dict[str, Any]]:
    """Launch with the shipped defaults within the `with` block, even where something was measured.

    Returns:
        The default configurations that the launches asked for, by the keys of their classes. Each launch adds its own.
    """
    global _asked
    previous, _asked = _asked, {}
    forget_launches()
    try:
        yield _asked
    finally:
        _asked = previous
        forget_launches()


def plans_path() -> Path:
    """The file of measured configurations: plans.json in FASTFORMER_CACHE, by default ~/.cache/fastformer."""
    return Path(os.environ.get("FASTFORMER_CACHE") or "~/.cache/fastformer").expanduser() / "plans.json"


@lru_cache
def measured_configurations(architecture: str) -> Mapping[str, Stored]:
    """The configurations measured on `architecture` with this version of triton, by class; empty where there are none.

    Configurations measured with another version of triton are not used, and a warning says so.
    """
    measured = _stored().get(architecture)
    if measured is None:
        return {}
    if measured["triton"] != triton.__version__:
        warnings.warn(
            f"plans for {architecture} in {plans_path()} were measured with triton {measured['triton']}, not "
            f"{triton.__version__}, and are not used; `fastformer tune` measures again",
            stacklevel=2,
        )
        return {}
    return measured["configurations"]


@lru_cache
def _measured(architecture: str, operation: str, shape: tuple[str, ...], kind: Any) -> Any:
    """The measured configuration of a class, as an instance of `kind`; None where there is none."""
    key = class_key(operation, shape)
    stored = measured_configurations(architecture).get(key)
    if stored is None:
        return None
    try:
        return kind(**stored)
    except TypeError as error:
        warnings.warn(
            f"the plan for {key} in {plans_path()} is not used: {error}; `fastformer tune` measures again", stacklevel=2
        )
        return None


def _stored() -> dict[str, dict]:
    global _measurements
    if _measurements is None:
        try:
            _measurements = read_plans(plans_path())
        except (ValueError, OSError) as error:
            warnings.warn(f"measured plans are not used: {error}; `fastformer tune` measures again", stacklevel=2)
            _measurements = {}
    return _measurements


def use_measured(architecture: str, configurations: Mapping[str, Stored]) -> None:
    """Use these as the measured configurations in this process from now on, instead of those of the file."""
    global _measurements
    forget_plans_read()
    _measurements = {architecture: {"triton": triton.__version__, "configurations": configurations}}
    forget_launches()


def read_plans(path: Path) -> dict[str, dict]:
    """Read a file of plans; empty where there is no file.

    Returns:
        By architecture: {"triton": its version, "configurations": {class of shapes: fields of a configuration}}.

    Raises:
        ValueError: the file is not a valid file of plans.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    architectures = content.get("architectures")
    if not isinstance(architectures, dict) or not all(map(_is_measurement, architectures.values())):
        raise ValueError(f"{path} is damaged: no table of configurations by architecture")
    return architectures


def _is_measurement(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("triton"), str)
        and isinstance(entry.get("configurations"), dict)
        and all(map(_is_configuration, entry["configurations"].values()))
    )


def _is_configuration(fields: object) -> bool:
    return isinstance(fields, dict) and all(isinstance(value, int) for value in fields.values())


def forget_plans_read() -> None:
    """Read the file again when a plan is next needed. Call this after the file has changed."""
    global _measurements
    _measurements = None
    measured_configurations.cache_clear()
    _measured.cache_clear()
    forget_launches()
