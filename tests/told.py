"""A reporter that remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
