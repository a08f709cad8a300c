"""How a run tells what it is doing: on stderr, so that stdout keeps to results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Ticker(Protocol):
    """Advances one stage by one, with a few words on where it stands."""

    def __call__(self, told: str = "") -> None:
        """Count one more as done."""


class Reporter(Protocol):
    """What a run is told to report to."""

    def note(self, text: str) -> None:
        """Tell something the tool chose or noticed."""

    def stage(self, name: str, total: int) -> contextlib.AbstractContextManager[Ticker]:
        """Open a stage of `total` things to do."""


class Silent:
    """Reports nothing; for scripts and tests."""

    def note(self, text: str) -> None:
        """Say nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        """Count nothing."""
        yield lambda told="": None


class OnScreen:
    """A live bar for each stage on a terminal; elsewhere (a log file, CI) ten lines a stage."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True, highlight=False)
        self._live: Progress | None = None

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        from tunekit.redaction import without_secrets

        told = without_secrets(text)
        self.console.print(told, style="dim", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Ticker]:
        """Show a bar with what is done, what is told, time left and time spent."""
        if not self.console.is_terminal:
            yield self._lines(name, total)
            return
        if self._live is not None:  # a stage inside a stage: a second bar under the first
            task = self._live.add_task(name, total=total, told="")
            yield self._advance(self._live, task)
            self._live.remove_task(task)
            return
        with _bars(self.console) as self._live:
            try:
                yield self._advance(self._live, self._live.add_task(name, total=total, told=""))
            finally:
                self._live = None

    @staticmethod
    def _advance(live: Progress, task: TaskID) -> Ticker:
        def tick(told: str = "") -> None:
            live.update(task, advance=1, told=told)

        return tick

    def _lines(self, name: str, total: int) -> Ticker:
        done, began, every = 0, time.monotonic(), max(1, -(-total // 10))

        def tick(told: str = "") -> None:
            nonlocal done
            done += 1
            if done % every and done != total:
                return
            spent = time.monotonic() - began
            left = spent / done * (total - done)
            tail = f"{left:.0f} s left" if done < total else f"{spent:.0f} s"
            line = ", ".join(part for part in (f"{name} {done}/{total}", told, tail) if part)
            self.console.print(line, markup=False, soft_wrap=True)

        return tick


def _bars(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", style="dim"),
        TimeRemainingColumn(compact=True),
        TextColumn("left,", style="dim"),
        TimeElapsedColumn(),
        console=console,
    )
