"""Files of checkpoints: JSON, and safetensors in one file or in shards with an index, as Hugging Face saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastformer.models.conversion.tensors import Problems, Tensors
from fastformer.models.finite import finite

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ValueError: the file has none; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} has lists or objects nested too deep to be read") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def read_tensors(folder: Path) -> Tensors:
    """Open the tensors of the model in `folder`; each is read when it is needed.

    Raises:
        FileNotFoundError: there are no weights, or only pickled ones.
        ValueError: a file is damaged, cut short or missing, or does not match the index.
    """
    if (folder / _FILE).exists():
        return _read_files(folder, {_FILE: None})
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder / _INDEX} must hold a weight_map; got {index!r}")
        files = sorted(set(index.values()))
        return _read_files(folder, {file: {name for name in index if index[name] == file} for file in files})
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise FileNotFoundError(
            f"the weights in {folder} are pickled ({', '.join(pickles)}), and unpickling a file runs any code in "
            "it; if you trust it, load the model with transformers and save it again: that writes safetensors"
        )
    raise FileNotFoundError(f"{folder} has neither {_FILE} nor {_INDEX}")


def _read_files(folder: Path, files: dict[str, set[str] | None]) -> Tensors:
    """Open the tensors of files; each file must hold exactly the given names, or any names for None."""
    problems = Problems()
    shapes: dict[str, tuple[int, ...]] = {}
    holders = {}
    for file, expected in files.items():
        try:
            opened = safe_open(folder / file, framework="pt")
        except FileNotFoundError:
            problems.add("missing", [file])
            continue
        except (SafetensorError, OSError) as error:  # OSError: the path is a folder
            problems.add("damaged or cut short:", [f"{file} ({error})"])
            continue
        names = set(opened.keys())
        problems.add(f"{file} lacks", (expected or set()) - names)
        problems.add(f"the index does not list, of {file},", set() if expected is None else names - expected)
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            shapes[name] = tuple(opened.get_slice(name).get_shape())
            holders[name] = opened
    problems.check(f"{folder} does not hold a complete checkpoint")
    return Tensors(shapes, lambda name: finite(name, holders[name].get_tensor(name)))


def write_tensors(folder: Path, tensors: Tensors, shard_bytes: int, advance: Callable[[], None]) -> None:
    """Write `tensors` into `folder` in files of at most `shard_bytes`; only one file's tensors are in memory at a time.

    Args:
        advance: called after each tensor.
    """
    shard: dict[str, Tensor] = {}
    written: list[list[str]] = []
    size = total = 0

    def finish() -> None:
        try:
            save_file(shard, folder / _temporary(len(written)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"the weights cannot be written into {folder}: {error}") from error
        written.append(list(shard))
        shard.clear()

    for name in tensors.shapes:
        tensor = tensors.load(name).contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            finish()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        advance()
    finish()
    if len(written) == 1:
        (folder / _temporary(0)).rename(folder / _FILE)
        return
    files = [f"model-{number + 1:05d}-of-{len(written):05d}.safetensors" for number in range(len(written))]
    for number, file in enumerate(files):
        (folder / _temporary(number)).rename(folder / file)
    weight_map = {name: file for file, names in zip(files, written, strict=True) for name in names}
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _temporary(number: int) -> str:
    return f"shard-{number}.safetensors"
