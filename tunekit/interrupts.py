"""SIGINT and SIGTERM as a wish: the step in hand is finished and saved before the process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A process that was asked to stop and did; `exit_code` is 128 + the signal's, as shells do."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Wish:
    """Whether somebody asked the process to stop; `number` is the signal's, None while nobody did.

    While `patient`, a signal is only noted, for a loop that looks at `number` after each step, and
    a second Ctrl-C ends the process at once. Otherwise it raises Interrupted where it arrives.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.number: int | None = None
        self.patient = False
        self._say = say

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        name = signal.Signals(number).name
        if not self.patient:
            raise Interrupted(f"stopped by {name}", number)
        if self.number is not None and number == signal.SIGINT:
            raise Interrupted("stopped at once: what was saved before is intact", number)
        if self.number is None:
            self.number = number
            again = "; Ctrl-C once more leaves at once" if number == signal.SIGINT else ""
            self._say(f"{name}: this step is finished and saved first{again}")

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Note signals while this is open."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


@contextmanager
def heard(say: Callable[[str], None]) -> Iterator[Wish]:
    """Listen to SIGINT and SIGTERM; the handlers from before are back afterwards.

    say: told what a noted signal leads to. In a thread other than the main one, where Python hears
    no signals, nothing is changed.
    """
    wish = Wish(say)
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish.hear) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
