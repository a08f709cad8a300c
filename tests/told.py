"""What is told: to a reporter that remembers, and by a command that was typed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunekit.progress import Silent, Ticker


class Told(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ticks: dict[str, list[str]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        told = self.ticks.setdefault(name, [])
        before = len(told)  # a stage may come twice: for the subject's pictures and the class's
        yield lambda words="": told.append(words)
        assert len(told) - before == total, name


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def refusal(self, *names: str) -> list[str]:
        """Return the lines of a refusal, one of which names each of `names`."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = self.err.strip().splitlines()
        for name in names:
            assert any(name in line for line in lines), (name, self.err)
        return lines


Typed = Callable[..., Said]
"""Types `tunekit` with words, in this process (the fixture of that name)."""
