"""How a run stands, in state.json: written whole at each turn, so that it can be told later."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tunekit.errors import UserError
from tunekit.redaction import without_secrets
from tunekit.runlock import now
from tunekit.wholefile import write_whole

STATE = "state.json"
Outcome = Literal["running", "finished", "interrupted", "failed"]
_PATH = re.compile(r"(?<![\w:/.~])~?/(?:[^\s/:;,'\"()]+/)+")
_LONGEST = 500  # characters of an error


@dataclass(frozen=True)
class State:
    """A run at its last turn. started, updated: ISO 8601. error: one line where it failed.

    outcome "running" beside a lock that nobody holds is that of a run that was killed.
    """

    outcome: Outcome
    pid: int
    host: str
    started: str
    updated: str
    step: int
    steps: int
    error: str | None = None


def read(folder: Path) -> State | None:
    """Return how the run in `folder` stood; None for one of a version that kept no state.

    Raises UserError for a file that is none of ours.
    """
    path = folder / STATE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["outcome"] not in get_args(Outcome):
            raise ValueError(f"outcome is {told['outcome']!r}")
        state = State(**told)
        for name, value in asdict(state).items():
            kind = int if name in ("pid", "step", "steps") else str
            if type(value) is not kind and not (name == "error" and value is None):
                raise ValueError(f"{name} is {value!r}")
        return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}") from None


class Keeper:
    """Keeps the state of the run in `folder` up to date while it goes on."""

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self._path = folder / STATE
        began = now()
        self._state = State("running", os.getpid(), socket.gethostname(), began, began, step, steps)

    def at(self, step: int) -> None:
        """Write that `step` steps are done."""
        self._write(step=step)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Write that the run goes on, and at the end how it ended. Raises UserError for a disk."""
        self._write()
        try:
            yield
        except BaseException as error:
            failed = isinstance(error, Exception)
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self._write(
                    outcome="failed" if failed else "interrupted",
                    error=_line(error) if failed else None,
                )
            raise
        self._write(outcome="finished", step=self._state.steps)

    def _write(self, **changes: Any) -> None:
        self._state = replace(self._state, updated=now(), **changes)
        write_whole(self._path, json.dumps(asdict(self._state), indent=1) + "\n")


def _line(error: BaseException) -> str:
    """Return an error's first line, without secrets and without the folders before a file's name.

    A run's folder is often handed on: whose home the pictures lay in is nobody's business.
    """
    text = str(error).strip().split("\n")[0]
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}"
    return _PATH.sub("", without_secrets(text))[:_LONGEST]
