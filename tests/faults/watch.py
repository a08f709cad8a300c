"""Sees what Python is asked to do while a file is read: to unpickle, start, connect, write.

Python tells its audit hooks of these before it does them, whichever library asks. A hook cannot be
taken away again, so there is one for a process, which looks only while `watched` is open.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pty.spawn",
    "socket.",
    "urllib.Request",
    "ftplib.",
    "smtplib.",
    "http.client.",
    "webbrowser.open",
)
# What changes names on a disk: which of its arguments are paths, and where each one's folder is.
_CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_allowed: tuple[Path, ...] | None = None  # where files may be written; None: nobody looks
_seen: list[str] = []
_hooked = False


@contextlib.contextmanager
def watched(*allowed: Path) -> Iterator[list[str]]:
    """Yield the list of what is asked for meanwhile and may not be; files only change in `allowed`.

    An entry is the event and its first argument, such as ``open /etc/passwd``.
    """
    global _allowed, _hooked, _seen
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    assert _allowed is None, "one at a time"
    _seen = seen = []
    _allowed = tuple(path.resolve() for path in allowed)
    try:
        yield seen
    finally:
        _allowed = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _allowed
    if _allowed is None:
        return
    allowed, _allowed = _allowed, None  # what is done in here is not looked at
    try:
        if event.startswith(FORBIDDEN):
            _seen.append(f"{event} {arguments[:1]!r}")
        elif event == "open":
            _opened(arguments, allowed)
        elif event in _CHANGES:
            for at, folder in _CHANGES[event]:
                below = arguments[folder] if folder is not None else None
                _written(event, arguments[at], below, allowed)
    finally:
        _allowed = allowed


def _opened(arguments: tuple[Any, ...], allowed: Sequence[Path]) -> None:
    path, mode, flags = arguments
    writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else flags & _WRITES
    if writes:
        _written("open", path, None, allowed)


def _written(event: str, path: Any, folder: Any, allowed: Sequence[Path]) -> None:
    if isinstance(path, int):
        return  # opened before, and seen then
    where = Path(os.fsdecode(path))
    if isinstance(folder, int) and folder >= 0:
        where = Path(f"/proc/self/fd/{folder}").resolve() / where
    # The name itself is made or goes; only the folder it lies in may be a link elsewhere.
    whole = Path(os.path.abspath(where))
    real = whole.parent.resolve() / whole.name if event != "open" else whole.resolve()
    if real != Path("/dev/null") and not any(real.is_relative_to(root) for root in allowed):
        _seen.append(f"{event} {real}")
