"""Files that appear whole or not at all, whatever is killed while they are written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from tunekit.errors import UserError

_LONGEST = 40  # characters of the name that are repeated: at most 160 of a name's 255 bytes


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
        _to_disk(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as they are) by `whole_file`.

    Raises UserError with the path where the disk refuses.
    """
    try:
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _to_disk(path: Path) -> None:
    # Else a power cut may leave the new name on an empty file.
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
