"""Arguments of the commands: whole numbers, text and devices, with an error of one line for anything invalid."""

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
    """argparse's parser, with each error on one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        raise SystemExit(2)


def whole_number(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """The argparse type of a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise ArgumentTypeError(f"must be a whole number from {least} to {most:,}; got {text!r:.60}")

    return parse


def check_text(text: str, option: str) -> None:
    """Raise ValueError if `text`, from the command line, is not UTF-8. The message begins with `option`."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python passes on bytes that it could not decode as lone surrogates
        raise ValueError(f"{option} is not UTF-8: {text!a:.60}") from None


def chosen_device(given: str | None) -> torch.device:
    """The device that ``--device`` names. By default the GPU, or the CPU if there is no GPU.

    Raises:
        ValueError: `given` is not a device, or this machine does not have it.
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
            f"--device must be cpu, cuda or another device of this machine; got {given!r:.60}: {reason:.120}"
        ) from error
    return device
