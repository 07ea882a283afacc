"""How a signal ends a command: its exit status, and what is said."""

from __future__ import annotations

import signal

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}
"""Exit statuses by signal. SIGUSR1 is how a batch system announces the SIGTERM that follows."""


class Stopped(BaseException):
    """A command ends because a signal asked for it.

    Args:
        number: of the signal.

    Attributes:
        note: what to say besides, such as how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.note = ""

    @property
    def status(self) -> int:
        """The exit status."""
        return STATUS[self.name]

    def __str__(self) -> str:
        return f"stopped by {self.name}{self.note}"
