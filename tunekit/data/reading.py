"""How sources are read, and what all kinds of them say alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tunekit.data.cache import Cache
from tunekit.data.records import Finding

Progress = Callable[[str], object]
"""Is called with a few words for each picture that is taken from a table or shard."""
NOT_UTF8 = "the name is not UTF-8; rename it"
_UNUSED = "set `data.mask: {source: files}` to use them"


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    mask: whether mask files are wanted, as `data.mask` with `source: files` does. uncaptioned:
    whether a caption that is empty or missing is none yet, and no fault: for who writes them.
    progress: told each picture that is taken from a stream. cache: keeps those pictures.
    """

    mask: bool = False
    uncaptioned: bool = False
    progress: Progress | None = None
    cache: Cache = field(default_factory=Cache)


def masks_unused(names: Iterable[str]) -> Finding:
    """Return the warning for masks that are there and not asked for, the same for every source."""
    text = "masks that have no effect, since data.mask takes none from files"
    return Finding("warning", "mask-unused", text, tuple(sorted(names)), _UNUSED)


def is_utf8(name: str) -> bool:
    """Return whether a name from the disk or a shard is text, so that it can be told and kept."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    r"""Return a name as it can be told, bytes that are no UTF-8 as in ``\xff``."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # from JSON: no name that a disk could have
        return name.encode("utf-8", "backslashreplace").decode()
