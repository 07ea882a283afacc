"""The command ``fastformer verify``: check that a transformers model gives the same results on Fastformer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from fastformer.arguments import CommandParser, chosen_device
from fastformer.backends import BACKENDS
from fastformer.console import Table
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out
from fastformer.integrations.acceleration import Acceleration
from fastformer.integrations.verification.checks import Check, verify
from fastformer.integrations.verification.subject import Subject
from fastformer.version import __version__

_DESCRIPTION = """\
Check that a transformers model on Fastformer gives the same outputs, loss, gradients and generated text as before. The
model with attention "fastformer", and with accelerated layers, is compared with itself with eager attention. Exit
status 1 if a check fails.

MODEL is a folder, the hub name of a model in the local cache, or the name of a class of transformers. For a class, a
small model with random weights is made.

examples:
  fastformer verify BertForMaskedLM
  fastformer verify runs/pretrain/model --out report.json
  fastformer verify LlamaForCausalLM --no-accelerate
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer verify`` with the arguments that follow."""
    parser = CommandParser(
        prog="fastformer verify", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a class of transformers")
    parser.add_argument(
        "--accelerate",
        action=BooleanOptionalAction,
        default=True,
        help="accelerate the layers too, not only attention",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the operators; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights; default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the report as JSON to this file")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    options = parser.parse_args(arguments)
    if options.out is not None:
        check_out([options.out], options.overwrite, {"MODEL": [Path(options.model)]})
    device = chosen_device(options.device)
    with _quiet():
        subject = Subject.find(options.model, options.seed)
        subject.model.to(device)  # type: ignore[arg-type]
        report, checks = verify(subject, options.accelerate, options.backend)
    _show(options.model, subject, report, checks)
    passed = all(check.status != "failed" for check in checks)
    if options.out is not None:
        result = {
            "model": options.model,
            "class": type(subject.model).__name__,
            "source": subject.source,
            "device": options.device,
            "backend": options.backend,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            | {"fastformer": __version__},
            "acceleration": None if report is None else json.loads(report.to_json()),
            "passed": passed,
            "checks": [asdict(check) for check in checks],
        }
        with atomic_file(options.out) as file:
            file.write(json.dumps(result, indent=1).encode())
    if not passed:
        raise SystemExit(1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings about configurations, which are small on purpose here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _show(name: str, subject: Subject, report: Acceleration | None, checks: list[Check]) -> None:
    if report is not None:
        print(report, end="\n\n")
    class_name = type(subject.model).__name__
    shown = class_name if name == class_name else f"{name}, {class_name}"
    rows = [(check.name, *map(_number, (check.error, check.allowed)), check.status, check.detail) for check in checks]
    title = f"{shown} ({subject.source}) compared with its eager attention"
    print(Table(("check", "error", "allowed", "", ""), rows, "lrrll", title))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
