"""What the cache holds, and how it is kept from growing without end.

Only files that the cache itself named are counted or removed, whatever folder it is set to:

    KIND/shard-*.safetensors            entries, many together
    KIND/ab/abcd... (64 digits).EXT     files named by their content: pictures
    KIND/ab/abcd....safetensors         entries of earlier versions, of no use any more
    .*.part                             left by a process that was killed while it wrote
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunekit.data.locks import alone
from tunekit.data.shards import DamagedError, read_spans
from tunekit.data.shelf import is_shard, unusable
from tunekit.errors import UserError

LIMIT = "20GB"
VARIABLE = "TUNEKIT_CACHE_MAX"
_UNFINISHED = 3600.0  # seconds after which nobody is writing a .part file any more
_CONTENT = re.compile(r"([0-9a-f]{2})[0-9a-f]{62}\.[A-Za-z0-9]{1,12}")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_OLD, _PARTS = " (old format)", "unfinished"


@dataclass(frozen=True)
class Usage:
    """What the cache holds of a kind. bytes: on the disk. last_used: seconds since 1970.

    files: shards, or files named by their content. entries: what is in them.
    """

    kind: str
    files: int
    entries: int
    bytes: int
    last_used: float

    def __str__(self) -> str:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_used))
        what = f"{_count(self.entries, 'entry', 'entries')} in {_count(self.files, 'file')}"
        return f"{self.kind}: {what}, {size_text(self.bytes)}, last used {used}"


@dataclass(frozen=True)
class Pruned:
    """What was removed, files by kind, and what is left. bytes, left_bytes: on the disk."""

    root: Path
    files: dict[str, int]
    bytes: int
    left_files: int
    left_bytes: int

    def __str__(self) -> str:
        left = f"{_count(self.left_files, 'file')} of {size_text(self.left_bytes)} left"
        if not self.files:
            return f"{self.root}: nothing to remove, {left}"
        kinds = ", ".join(f"{kind} ({_count(n, 'file')})" for kind, n in self.files.items())
        return f"{self.root}: removed {size_text(self.bytes)} of {kinds}; {left}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**vars(self), "root": str(self.root)}


@dataclass(frozen=True)
class _File:
    path: Path
    kind: str
    bytes: int
    used: float

    @property
    def useless(self) -> bool:
        if self.kind == _PARTS:
            return time.time() - self.used > _UNFINISHED
        return self.kind.endswith(_OLD)


def usage(root: Path) -> list[Usage]:
    """Return what the cache at `root` holds, in the order of the kinds' names.

    Raises UserError where it cannot be read.
    """
    kinds: dict[str, list[_File]] = {}
    for file in _files(root):
        kinds.setdefault(file.kind, []).append(file)
    return [
        Usage(
            kind,
            len(files),
            sum(_entries(file.path) for file in files),
            sum(file.bytes for file in files),
            max(file.used for file in files),
        )
        for kind, files in sorted(kinds.items())
    ]


def prune(
    root: Path, max_bytes: int | None = None, older_than_seconds: float | None = None
) -> Pruned:
    """Remove what is of no use any more, what is too old, and then the least recently used.

    max_bytes: how much may stay; 0: nothing. older_than_seconds: since its last use.
    Raises UserError while a process uses the cache, and where files cannot be removed.
    """
    if not root.is_dir():
        return Pruned(root, {}, 0, 0, 0)
    with alone(root) as free:
        if not free:
            raise UserError(
                f"{root}: the cache is in use by a run; nothing was removed: wait until it has "
                "ended"
            )
        return _prune(root, max_bytes, older_than_seconds)


def bound(root: Path, say: Callable[[str], None]) -> None:
    """Prune the cache to $TUNEKIT_CACHE_MAX; says so where it acts or cannot.

    Raises UserError for a wrong $TUNEKIT_CACHE_MAX.
    """
    limit = limit_bytes()
    if sum(file.bytes for file in _files(root)) <= limit:
        return
    told = f"the cache may hold {size_text(limit)} (set {VARIABLE} for another size)"
    with alone(root) as free:
        if free:
            say(f"{told}; {_prune(root, limit, None)}")
        else:
            say(f"{told}; {root} holds more, and is left so while another run uses it")


def limit_bytes() -> int:
    """Return $TUNEKIT_CACHE_MAX in bytes, 20 GB where it is not set. Raises UserError."""
    named = os.environ.get(VARIABLE)
    try:
        return parse_size(named or LIMIT)
    except UserError as error:
        raise UserError(f"{VARIABLE}: {error}") from None


def parse_size(text: str) -> int:
    """Return a size such as "10GB", "512 MiB" or "0" in bytes. Raises UserError for another."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f'"{text}" is no size: write a number and kB, MB, GB or TB, such as 10GB')
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_age(text: str) -> float:
    """Return an age such as "30d" or "12h" in seconds. Raises UserError for another text."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f'"{text}" is no age: write a number and s, m, h, d or w (seconds to weeks), such as '
            "30d"
        )
    return float(match[1]) * _SECONDS[match[2].lower()]


def lines(root: Path, held: Sequence[Usage]) -> list[str]:
    """Return what the cache holds as lines of text."""
    whole, limit = sum(usage.bytes for usage in held), limit_bytes()
    return [
        *(str(usage) for usage in held),
        f"{root}: {size_text(whole)} of {size_text(limit)} ({VARIABLE})",
    ]


def as_dict(root: Path, held: Sequence[Usage]) -> dict[str, Any]:
    """Return what the cache holds as JSON values."""
    return {
        "root": str(root),
        "bytes": sum(usage.bytes for usage in held),
        "max_bytes": limit_bytes(),
        "kinds": [vars(usage) for usage in held],
    }


def wanted(
    max_size: str | None, older_than: str | None, everything: bool
) -> tuple[int | None, float | None]:
    """Return what `prune` is to be given for the options of `tunekit cache prune`.

    With none of them, it is the size that runs keep to. Raises UserError for wrong options.
    """
    if everything and (max_size or older_than):
        raise UserError("--all removes everything: leave out --max-size and --older-than")
    if everything:
        return 0, None
    if not (max_size or older_than):
        return limit_bytes(), None
    try:
        size = parse_size(max_size) if max_size else None
    except UserError as error:
        raise UserError(f"--max-size: {error}") from None
    try:
        return size, parse_age(older_than) if older_than else None
    except UserError as error:
        raise UserError(f"--older-than: {error}") from None


def size_text(size: int) -> str:
    """Return a number of bytes for people, such as "1.2 GB"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}".replace(".0 ", " ")
    return _count(size, "byte")


def _prune(root: Path, max_bytes: int | None, older_than_seconds: float | None) -> Pruned:
    now = time.time()
    files = sorted(_files(root), key=lambda file: (not file.useless, file.used))
    left_files, left_bytes = len(files), sum(file.bytes for file in files)
    removed: Counter[str] = Counter()
    for file in files:
        too_old = older_than_seconds is not None and now - file.used > older_than_seconds
        too_much = max_bytes is not None and (left_bytes > max_bytes or max_bytes == 0)
        being_written = file.kind == _PARTS and not file.useless
        if file.useless or ((too_old or too_much) and not being_written):
            try:
                file.path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{file.path}: cannot be removed: {error.strerror}") from error
            removed[file.kind] += 1
            left_files, left_bytes = left_files - 1, left_bytes - file.bytes
    gone = sum(file.bytes for file in files) - left_bytes
    return Pruned(root, dict(sorted(removed.items())), gone, left_files, left_bytes)


def _files(root: Path) -> Iterator[_File]:
    """Yield the files that are the cache's own; links are followed nowhere."""
    for kind in _entries_of(root):
        if not (_KIND.fullmatch(kind.name) and kind.is_dir(follow_symlinks=False)):
            continue
        for item in _entries_of(Path(kind.path)):
            if item.is_dir(follow_symlinks=False) and len(item.name) == 2:
                for inner in _entries_of(Path(item.path)):
                    match = _CONTENT.fullmatch(inner.name)
                    if match and match[1] == item.name:
                        old = _OLD if inner.name.endswith(".safetensors") else ""
                        yield from _file(inner, kind.name + old)
                    elif _is_part(inner.name):
                        yield from _file(inner, _PARTS)
            elif is_shard(item.name):
                yield from _file(item, kind.name)
            elif _is_part(item.name):
                yield from _file(item, _PARTS)


def _is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")


def _file(item: os.DirEntry[str], kind: str) -> Iterator[_File]:
    try:
        stat = item.stat(follow_symlinks=False)
    except FileNotFoundError:  # another process took it away or renamed it
        return
    if item.is_file(follow_symlinks=False):
        yield _File(Path(item.path), kind, stat.st_size, stat.st_mtime)


def _entries_of(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unusable(folder, error) from error


def _entries(path: Path) -> int:
    """Return how many entries a file holds; 0 for a damaged shard."""
    if not is_shard(path.name):
        return 1
    try:
        return len(read_spans(path))
    except (DamagedError, OSError):
        return 0


def _count(number: int, one: str, many: str = "") -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {many or one + 's'}"
