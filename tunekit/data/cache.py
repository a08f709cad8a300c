"""Latents and conditioning on disk, found by content.

An entry's name is the sha256 of everything it was made from, so a changed picture, setting or
weight is another entry, and a renamed file or another run's recipe is the same one. There is
nothing to invalidate. Entries carry a digest of themselves and stand many together in shards
(`shards.py`, `shelf.py`): what is read is what was written, or it is said and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data import upkeep
from tunekit.data.locks import shared
from tunekit.data.shards import Block
from tunekit.data.shelf import Shelf, unusable
from tunekit.errors import UserError
from tunekit.wholefile import whole_file

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "1"  # part of every key: raise it when what an entry means changes


def cache_root() -> Path:
    """Return ``$TUNEKIT_CACHE``, or ``~/.cache/tunekit`` where it is not set."""
    named = os.environ.get("TUNEKIT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "tunekit"


def content_key(**parts: object) -> str:
    """Return the sha256 (hex) of `parts`, JSON values by name."""
    text = json.dumps({"format": _FORMAT, **parts}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor], *facts: str) -> str:
    """Return the sha256 (hex) of tensors' names, number formats, shapes and values.

    tensors: a module's `state_dict()`, for one. facts: what else decides the module's result and
    is not in its weights, such as its configuration as JSON.
    """
    import torch

    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{len(fact)}:{fact}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """Tensors in the cache, read when they are asked for. Made by `Cache.keep`; can be pickled."""

    shelf: Shelf
    key: str

    def read(self) -> dict[str, Tensor]:
        """Return the tensors, on the CPU, read from the disk and checked; the caller's own.

        Raises UserError, naming the entry, where it has vanished or is damaged.
        """
        return self.shelf.read(self.key)


class Cache:
    """Tensors by kind and content key under `root`; safe with several processes and threads.

    New entries are gathered and written some 8 MB at a time: at `flush`, at the end of `using`, or
    when this object goes, at the latest.

    root: default `cache_root()`. say: told of a damaged entry, one line.
    hits, misses: how many entries were found and made since this object exists.
    """

    def __init__(self, root: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self.root = root or cache_root()
        self.hits = self.misses = 0
        self._say = say or logging.getLogger("tunekit").warning
        self._shelves: dict[str, Shelf] = {}
        self._users = 0
        weakref.finalize(self, _flush_late, self._shelves, self._say)

    def fetch(
        self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the entry's tensors; where there is none, or a damaged one, make it and keep it.

        kind: folder name, such as "latents". key: of `content_key`. make: returns the tensors.
        Raises UserError where the cache folder cannot be read or written.
        """
        return self._block(kind, key, make).tensors()

    def keep(self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Entry:
        """Return the entry without its tensors; arguments and faults as of `fetch`.

        An entry that is there is read once and checked, so that damage is found now.
        """
        self._block(kind, key, make)
        return Entry(self._shelf(kind), key)

    def keep_file(self, kind: str, key: str, suffix: str, make: Callable[[], bytes]) -> Path:
        """Return the path of a file named by its content; where there is none, make it.

        suffix: such as ".png". make: returns the file's bytes. Faults as of `fetch`.
        """
        assert suffix.startswith(".")
        assert suffix != ".safetensors"
        path = self.root / kind / key[:2] / f"{key}{suffix}"
        try:
            os.utime(path)  # its last use
        except FileNotFoundError:
            data = make()
            try:
                with whole_file(path) as part:
                    part.write_bytes(data)
            except OSError as error:
                raise unusable(path, error, len(data)) from error
            self.misses += 1
        except PermissionError:  # another user's file, shared
            self.hits += 1
        except OSError as error:
            raise unusable(path, error) from error
        else:
            self.hits += 1
        return path

    @contextlib.contextmanager
    def using(self) -> Iterator[Cache]:
        """Keep every process from clearing the cache for as long as the block runs, then flush.

        Before that, a cache larger than $TUNEKIT_CACHE_MAX (default 20 GB) is pruned to it, and
        `say` is told. Entries are safe from `prune` inside the block only: a run holds it from its
        first entry to its last step. Blocks may be nested.
        Raises UserError where the cache folder cannot be written.
        """
        if not self._users:
            upkeep.bound(self.root, self._say)
        with shared(self.root, self._say):
            self._users += 1
            try:
                yield self
            finally:
                self._users -= 1
                self.flush()

    def usage(self) -> list[upkeep.Usage]:
        """Return what the cache holds, by kind. Raises UserError where it cannot be read."""
        self.flush()
        return upkeep.usage(self.root)

    def prune(
        self, max_bytes: int | None = None, older_than_seconds: float | None = None
    ) -> upkeep.Pruned:
        """Remove what is of no use any more, what is too old, and then the least recently used.

        max_bytes: how much may stay; 0: nothing. older_than_seconds: since its last use.
        Raises UserError while anybody uses the cache, and where files cannot be removed.
        """
        self.flush()
        return upkeep.prune(self.root, max_bytes, older_than_seconds)

    def flush(self) -> None:
        """Write what is still held. Raises UserError where it cannot be written."""
        for shelf in list(self._shelves.values()):
            shelf.flush()

    def _block(self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Block:
        shelf = self._shelf(kind)
        block = shelf.find(key)
        if block is not None:
            self.hits += 1
            return block
        block = Block.of(make())
        shelf.add(key, block)
        self.misses += 1
        return block

    def _shelf(self, kind: str) -> Shelf:
        if kind not in self._shelves:
            self._shelves[kind] = Shelf(self.root / kind, self._say)
        return self._shelves[kind]


def _flush_late(shelves: dict[str, Shelf], say: Callable[[str], None]) -> None:
    for shelf in shelves.values():
        try:
            shelf.flush()
        except UserError as error:  # the object is gone: nobody is there to raise it to
            say(str(error))
