"""How a signal ends a command: its exit status, and what is said."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 raise `Stopped`, as SIGINT raises KeyboardInterrupt, where they would kill.

    What is raised while an extension module is imported may come out as an error of its own, and in a destructor not at
    all: that is `Stopped` too, in the end.
    Processes that are forked within it are killed as ever.
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
    if threading.current_thread() is not threading.main_thread():  # no other may
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
