"""Files and folders that appear whole or not at all, whatever is killed while they are written."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from tunekit.errors import UserError

_LONGEST = 40  # characters of the name that are repeated: at most 160 of a name's 255 bytes
_PART = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.part")
_PARTIAL, _REPLACED, _REMOVED = ".partial", ".replaced", ".removed"


class DiskError(UserError):
    """A disk refuses. path: what it refused; needed: bytes, None where nobody knows."""

    def __init__(self, message: str, path: Path, needed: int | None) -> None:
        super().__init__(message)
        self.path, self.needed = path, needed


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; the file appears at `path` when the block ends well, else nowhere.

    Makes the folder. An older file stays until the new one is on the disk. The mode is that of any
    new file (umask). Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:_LONGEST]}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield part
        to_disk(part)
        part.replace(path)
        to_disk(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as they are) by `whole_file`.

    Raises DiskError with the path where the disk refuses.
    """
    with disk_errors(path), whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def part_of(name: str) -> str | None:
    """Return the name of the file that `name` is a part of, left by a process that was killed.

    At most its first 40 characters; None for what is no such part.
    """
    found = _PART.fullmatch(name)
    return found[1] if found else None


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill; it stands at `path` when the block ends well, else nowhere.

    What the block writes it must have on the disk itself (`to_disk`). An older folder stays until
    the new one is whole. Raises OSError.
    """
    partial, replaced = _beside(path, _PARTIAL), _beside(path, _REPLACED)
    tidy(path.parent)
    try:
        partial.mkdir(parents=True)
        yield partial
        to_disk(partial)
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        to_disk(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder; one that is killed on the way leaves nothing that looks like it."""
    removed = _beside(path, _REMOVED)
    with disk_errors(path, "removed"):
        path.rename(removed)
        shutil.rmtree(removed)


def tidy(parent: Path) -> None:
    """Take away what a killed process left of `whole_folder` and `remove_folder` in `parent`.

    An older folder that was already moved aside for a newer one comes back to its name.
    """
    if not parent.is_dir():
        return
    for left in list(parent.iterdir()):
        name, ending = left.name[1:].removesuffix(left.suffix), left.suffix
        if not left.name.startswith(".") or ending not in (_PARTIAL, _REPLACED, _REMOVED):
            continue
        if ending == _REPLACED and not (parent / name).exists():
            left.rename(parent / name)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path, verb: str = "written", needed: int | None = None) -> Iterator[None]:
    """Turn a disk's refusal into DiskError: one line with the path and, where known, the bytes."""
    try:
        yield
    except OSError as error:
        room = "" if needed is None else f" ({needed} bytes needed)"
        told = f"{path}: cannot be {verb}: {error.strerror or error}{room}"
        raise DiskError(told, path, needed) from error


def check_room(path: Path, needed: int, remedy: str) -> None:
    """Raise DiskError, with `remedy`, where the disk under `path` has less than `needed` bytes."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    if free < needed:
        told = f"{needed} bytes needed, and the disk has {free} free; {remedy}"
        raise DiskError(f"{path}: cannot be written: {told}", path, needed)


def to_disk(path: Path) -> None:
    """Have a file's bytes, or a folder's names, reach the disk; raises OSError.

    Else a power cut may leave the new name on an empty file.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")
