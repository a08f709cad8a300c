"""Who may take entries away from the cache: nobody, while another process uses it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tunekit.errors import UserError

LOCK = ".in-use"


@contextlib.contextmanager
def shared(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Use the cache at `root` beside others; waits for one that is clearing it to end.

    say: told where the disk knows no locks. Raises UserError where the folder cannot be written.
    """
    with _opened(root) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError as error:  # some network disks; a run needs the lock only to be left alone
            say(
                f"{root}: this disk knows no locks ({error.strerror}); do not prune the cache "
                "while something uses it"
            )
        yield


@contextlib.contextmanager
def alone(root: Path) -> Iterator[bool]:
    """Give whether nobody else uses the cache at `root`, and keep others waiting until the end.

    Raises UserError where the folder cannot be written or its disk knows no locks.
    """
    with _opened(root) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError as error:
            raise UserError(
                f"{root}: this disk knows no locks ({error.strerror}), so nobody can tell whether "
                "the cache is in use; remove the folder by hand when nothing runs"
            ) from error
        yield free


@contextlib.contextmanager
def _opened(root: Path) -> Iterator[int]:
    # The system lets go of the lock when the process ends, however it ends. The file stays: a lock
    # on a file that another process has removed would hold nobody back.
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{root}: the cache cannot be used: {error.strerror}; set TUNEKIT_CACHE to a folder "
            "that can be written"
        ) from error
    try:
        yield lock
    finally:
        os.close(lock)
