"""The entries of one kind: an index of its shards, and what is not yet written."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data.shards import Block, DamagedError, Span, read_block, read_spans, write_shard
from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 8_000_000
SHARD_ENTRIES = 1024  # of small entries the header would grow long
SHARD_SECONDS = 30.0  # what a killed process may lose of a slow encoder's work
_COARSE = 2.0  # seconds: how far apart two changes of a folder may share a time stamp
_TOUCH_AGAIN = 60.0  # seconds


class Shelf:
    """The entries of one kind in a folder of shards.

    New entries are gathered and written as one shard when they are `SHARD_BYTES` or
    `SHARD_SECONDS` old, or at `flush`; until then they are read from memory. Entries that other
    processes write are found when they are looked for. Threads may share it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self._say = say or logging.getLogger("tunekit").warning
        self._index: dict[str, tuple[str, Span]] = {}  # key -> name of its shard, and where there
        self._shards: set[str] = set()  # those that the index knows
        self._damaged: set[str] = set()  # never opened again, should they stay on the disk
        self._touched: dict[str, float] = {}
        self._listed: int | None = None  # the folder's time stamp when it was listed
        self._pending: dict[str, Block] = {}
        self._pending_since = 0.0
        self._owner = os.getpid()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Shelf], tuple[Path]]:
        # For worker processes, which read: what is pending must be on the disk for them.
        self.flush()
        return Shelf, (self.folder,)

    def find(self, key: str) -> Block | None:
        """Return an entry, checked; None where there is none. A damaged one is said and removed.

        Raises UserError where the folder cannot be read.
        """
        with self._lock:
            while True:
                if key in self._pending:
                    return self._pending[key]
                place = self._locate(key)
                if place is None:
                    return None
                try:
                    return self._read(key, *place)
                except FileNotFoundError:
                    self._forget()
                except DamagedError as error:
                    self._mend(place[0], key, str(error))

    def read(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of an entry that was there. Raises UserError where it is not whole."""
        with self._lock:
            for _ in range(2):
                if key in self._pending:
                    return self._pending[key].tensors()
                place = self._locate(key)
                if place is None:
                    break
                try:
                    return self._read(key, *place).tensors()
                except FileNotFoundError:  # mended by another process, or taken away
                    self._forget()
                except DamagedError as error:
                    path = self.folder / place[0]
                    raise UserError(
                        f"{path}: the entry {key} is damaged ({error}); start again, and it is "
                        "made again"
                    ) from None
        raise UserError(
            f"{self.folder}: the entry {key} has vanished since the run began; start again, and it "
            "is made again"
        )

    def add(self, key: str, block: Block) -> None:
        """Keep an entry. Raises UserError where it cannot be written."""
        with self._lock:
            self._owner = os.getpid()
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending[key] = block
            held = sum(len(block.data) for block in self._pending.values())
            waited = time.monotonic() - self._pending_since
            if (
                held >= SHARD_BYTES
                or len(self._pending) >= SHARD_ENTRIES
                or waited >= SHARD_SECONDS
            ):
                self.flush()

    def flush(self) -> None:
        """Write what is pending. Raises UserError where it cannot be written; it is then gone."""
        with self._lock:
            if not self._pending or os.getpid() != self._owner:  # a fork's parent writes its own
                return
            blocks, self._pending = self._pending, {}
            self._write(blocks)

    def _write(self, blocks: dict[str, Block]) -> None:
        name = f"shard-{secrets.token_hex(8)}.safetensors"
        try:
            spans = write_shard(self.folder / name, blocks)
        except OSError as error:
            size = sum(len(block.data) for block in blocks.values())
            raise unusable(self.folder / name, error, size) from error
        self._shards.add(name)
        self._index.update({key: (name, span) for key, span in spans.items()})

    def _locate(self, key: str) -> tuple[str, Span] | None:
        if key not in self._index:
            self._list()
        return self._index.get(key)

    def _list(self) -> None:
        """Read the headers of shards that were not there before, if the folder has changed."""
        try:
            stamp = self.folder.stat().st_mtime_ns
            if stamp == self._listed:
                return
            names = {name for name in os.listdir(self.folder) if is_shard(name)}
        except FileNotFoundError:
            return
        except OSError as error:
            raise unusable(self.folder, error) from error
        if self._shards - names:  # an entry may also stand in a shard that is still there
            self._forget()
        for name in sorted(names - self._shards - self._damaged):
            self._open(name)
        # A change in the same tick of the disk's clock would not be seen: then list again.
        self._listed = stamp if time.time() - stamp / 1e9 > _COARSE else None

    def _forget(self) -> None:
        """Look at the disk anew at the next question."""
        self._shards.clear()
        self._index.clear()
        self._listed = None

    def _open(self, name: str) -> None:
        path = self.folder / name
        try:
            spans = read_spans(path)
        except FileNotFoundError:  # taken away between the listing and now
            return
        except OSError as error:
            raise unusable(path, error) from error
        except DamagedError as error:
            self._say(f"{path}: damaged cache file ({error}); what it held is made again")
            self._damaged.add(name)
            remove(path)
            return
        self._shards.add(name)
        for key, span in spans.items():
            self._index[key] = (name, span)

    def _read(self, key: str, name: str, span: Span) -> Block:
        path = self.folder / name
        try:
            block = read_block(path, key, span)
            if time.time() - self._touched.get(name, 0.0) > _TOUCH_AGAIN:
                self._touched[name] = time.time()
                with contextlib.suppress(PermissionError):  # another user's file, shared
                    os.utime(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise unusable(path, error) from error
        return block

    def _mend(self, name: str, key: str, reason: str) -> None:
        """Write a shard's whole entries into another and remove it; the damaged ones are missing.

        Others may be reading from it: they find the new one.
        """
        path, whole, damaged = self.folder / name, {}, 0
        for other, (where, span) in list(self._index.items()):
            if where == name:
                try:
                    whole[other] = read_block(path, other, span)
                except (DamagedError, OSError):
                    damaged += 1
        more = f" and {damaged - 1} more" if damaged > 1 else ""
        self._say(f"{path}: damaged cache entry {key}{more} ({reason}); it is made again")
        self._damaged.add(name)
        if whole:
            self._write(whole)
        remove(path)
        self._forget()


def is_shard(name: str) -> bool:
    """Return whether a file's name is one that shards are given."""
    return name.startswith("shard-") and name.endswith(".safetensors")


def remove(path: Path) -> None:
    """Remove a file that is useless; where that is not allowed, it stays."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def unusable(path: Path, error: OSError, size: int | None = None) -> UserError:
    """Return the fault to raise where the cache cannot be read, or `size` bytes not written."""
    what = "read" if size is None else f"written ({size:,} bytes)"
    return UserError(
        f"{path}: the cache cannot be {what}: {error.strerror}; make room or set TUNEKIT_CACHE to "
        "another folder"
    )
