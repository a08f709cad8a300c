"""What is told: to reporters that remember, or end the run, and by a command that was typed."""

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


class Killed(BaseException):
    """What no code of ours catches: the run ends where it stands."""


class KillAt(Silent):
    """Ends the run at a tick of a stage."""

    def __init__(self, tick: int, stage: str = "training") -> None:
        self.left, self.where = tick, stage

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        def tick(told: str = "") -> None:
            if name == self.where:
                self.left -= 1
                if self.left == 0:
                    raise Killed

        yield tick


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
