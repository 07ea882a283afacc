"""The end of a command by a signal: its exit status and its message."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}
"""Exit statuses by signal. A batch system sends SIGUSR1 to announce the SIGTERM that follows."""


class Stopped(BaseException):
    """Raised when a signal ends a command.

    Args:
        number: the signal's number.

    Attributes:
        note: text that is added to the message, for example how to resume.
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


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise `Stopped` within the block, as SIGINT raises KeyboardInterrupt, instead of killing.

    An exception raised while an extension module is imported may turn into another error, and one raised in a
    destructor is lost. The block raises `Stopped` at its end in both cases.
    Signals still kill processes that are forked within the block.
    """
    process = os.getpid()
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if os.getpid() == process:
            raise Stopped(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    known = [getattr(signal, name) for name in STATUS if hasattr(signal, name)]
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in known if (handler := signal.getsignal(number)) in usual}
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        before = {}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if came:
            raise Stopped(came[-1]) from error
        raise
    else:
        if came:
            raise Stopped(came[-1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
