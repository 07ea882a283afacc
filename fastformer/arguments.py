"""What commands take: whole numbers, devices, and errors of one line about anything else."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from fastformer.console import printable

if TYPE_CHECKING:
    import torch

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
"""The precisions of training, as Lightning names them."""


class CommandParser(ArgumentParser):
    """argparse's, with each error on one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        raise SystemExit(2)


def whole_number(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number within these bounds."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise ArgumentTypeError(f"must be a whole number from {least} to {most:,}; got {text!r:.60}")

    return parse


def check_text(text: str, option: str) -> None:
    """Raises ValueError, beginning with `option`, for text of the command line that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python hands on the bytes that it could not read as half surrogate pairs
        raise ValueError(f"{option} is not UTF-8: {text!a:.60}") from None


def chosen_device(given: str | None) -> torch.device:
    """The device of ``--device``, or else the GPU if there is one, or else the CPU.

    Raises:
        ValueError: it is none, or is not here.
    """
    import torch

    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device must be cpu, cuda or another that is here; got {given!r:.60}: {reason:.120}"
        ) from error
    return device
