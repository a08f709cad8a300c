"""Whose a run's folder is: a lock that ends with its process, and the word of who holds it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from tunekit.errors import UserError
from tunekit.wholefile import disk_errors

LOCK = ".lock"
_PATIENCE = 50  # tenths of a second that others may look at a lock
# Disks of this machine alone: a lock there ends with its process, whatever name the machine had, as
# a container has another one each time.
_OWN_DISKS = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs"})
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder, or held it when it was killed. since: ISO 8601, local."""

    pid: int
    host: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        """Return this process."""
        return cls(os.getpid(), socket.gethostname(), now())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def here(self) -> bool:
        """Return whether it is, or was, a process of this machine."""
        return self.host == socket.gethostname()

    def lives(self) -> bool:
        """Return whether a process of this machine has its number."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            return True
        return True


def now() -> str:
    """Return this moment in local time: ISO 8601, to the second."""
    return datetime.datetime.now().astimezone().replace(microsecond=0).isoformat()


def holder(folder: Path) -> Holder | None:
    """Return who holds the folder or was killed holding it; None where nobody is named.

    Raises UserError where the lock cannot be read.
    """
    if (lock := _opened(folder / LOCK)) is None:
        return None
    try:
        with lock:
            told = json.loads(lock.read())
        return Holder(int(told["pid"]), str(told["host"]), str(told["since"]))
    except (ValueError, TypeError, KeyError, RecursionError):  # empty: given back
        return None


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; so nobody can tell from here "
            "whether a run is writing there"
        ) from None


def taken(folder: Path) -> Holder | None:
    """Return who writes in the folder now, as far as can be told from this machine; else None.

    A lock of this machine ends with its process, so a killed one holds nothing. Whether a process
    of another machine lives cannot be seen from here: it counts as one that does, but on a disk
    that no other machine has. Raises UserError where the lock cannot be read.
    """
    if (lock := _opened(folder / LOCK)) is None:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder(folder) or Holder(0, "this machine", "unknown")
        except OSError:  # a disk that knows no locks
            left = holder(folder)
            return left if left and (not left.here() or left.lives()) else None
        left = holder(folder)
        return left if left and not left.here() and not _on_own_disk(lock.fileno()) else None


def _on_own_disk(file: int) -> bool:
    """Return whether an open file lies on a disk of this machine; False where nobody can tell."""
    number = os.fstat(file).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    kinds = {
        line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2] == device
    }
    return bool(kinds) and kinds <= _OWN_DISKS


def check(folder: Path) -> None:
    """Raise UserError, saying who and what to do, where another process may be writing here."""
    if held := taken(folder):
        raise _refusal(folder, held)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Holder | None]:
    """Hold the folder, which exists; gives who held it before and was killed, else None.

    Raises UserError as `check` does.
    """
    with disk_errors(folder):
        lock = (folder / LOCK).open("ab+", buffering=0)
    with lock:
        check(folder)
        for _ in range(_PATIENCE):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check(folder)
                time.sleep(0.1)  # somebody is only looking
            except OSError:  # a disk that knows no locks: the name in the file is all there is
                check(folder)
                break
        else:
            raise UserError(
                f"{folder}: no run is writing here, but other processes go on looking at "
                f"{folder / LOCK}; wait until they have ended, and try again"
            )
        left = holder(folder)
        with disk_errors(folder):
            lock.truncate(0)
            lock.write(f"{json.dumps(asdict(Holder.me()))}\n".encode())
        try:
            yield left
        finally:
            lock.truncate(0)  # closing the file gives the lock back


def _refusal(folder: Path, held: Holder) -> UserError:
    if held.here() or held.pid == 0:
        return UserError(
            f"{folder}: another run is writing here ({held}); wait for it, or name another folder "
            "with --out"
        )
    return UserError(
        f"{folder}: another run is writing here ({held}), as far as can be told from this machine; "
        f"if it has ended, remove {folder / LOCK}, else name another folder with --out"
    )
