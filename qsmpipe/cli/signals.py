"""What asks a run to end: Ctrl-C, and what schedulers and containers send first."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAME = 1.0
"""Signals within this time (s) of the first are the same wish: a scheduler sends its own to every
process of a job, and each wrapper passes it on."""


class Stopped(BaseException):
    """The run was asked to end."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.code = 128 + number
        """Exit code, as a shell has it."""
        super().__init__(f"stopped by {self.name}")


class Watch:
    """Raises :class:`Stopped` at the first signal; ends the process at once at a later one."""

    def __init__(self) -> None:
        self._first = 0.0
        self._held = False
        self._waiting: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._first:
            if time.monotonic() - self._first > SAME:
                os._exit(128 + number)  # the nodes end with it (qsmpipe.cli.plugin)
            return
        self._first = time.monotonic()
        if self._held:
            self._waiting = number
            return
        raise Stopped(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let what must not be left half done come to its end first."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting is not None:
            raise Stopped(self._waiting)


@contextmanager
def stoppable() -> Iterator[Watch]:
    """Listen to what asks a run to end.

    Signals that are ignored already (``nohup``) stay so. Outside the main thread, which alone may
    listen, nothing changes: whoever embeds the app there has handlers.
    """
    watch = Watch()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {
            each: signal.signal(each, watch)
            for each in SIGNALS
            if signal.getsignal(each) is not signal.SIG_IGN
        }
    try:
        yield watch
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
