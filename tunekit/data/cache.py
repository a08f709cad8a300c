"""Latents and conditioning on disk, found by content.

An entry's name is the sha256 of everything it was made from, so a changed picture, setting or
weight is another entry, and a renamed file or another run's recipe is the same one. There is
nothing to invalidate. Entries are safetensors files that carry a digest of their own tensors: what
is read is what was written, or it is said and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import UserError

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


class Cache:
    """Tensors by kind and content key under `root`; safe with several processes at once.

    root: default `cache_root()`. say: told of a damaged entry, one line.
    hits, misses: how many entries were found and made since this object exists.
    """

    def __init__(self, root: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self.root = root or cache_root()
        self.hits = self.misses = 0
        self._say = say or logging.getLogger("tunekit").warning

    def fetch(
        self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the entry; where there is none, or a damaged one, make it and keep it.

        kind: folder name, such as "latents". make: returns the entry's tensors.
        Raises UserError where the cache folder cannot be read or written.
        """
        path = self.root / kind / key[:2] / f"{key}.safetensors"
        found = self._read(path, key)
        if found is not None:
            self.hits += 1
            return found
        made = {name: t.detach().cpu().contiguous().clone() for name, t in make().items()}
        self._write(path, key, made)
        self.misses += 1
        return made

    def _read(self, path: Path, key: str) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(path, error) from error
        try:
            tensors: dict[str, Tensor] = load(data)
            # load() checked that the header is whole; it does not hand the metadata over.
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            noted = header.get("__metadata__", {})
        except (SafetensorError, ValueError, KeyError) as error:
            reason = str(error)
        else:
            if noted.get("key") == key and noted.get("digest") == fingerprint(tensors):
                return tensors
            reason = "its digest does not match"
        self._say(f"{path}: damaged cache entry ({reason}); it is made again")
        return None

    def _write(self, path: Path, key: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        data = save(tensors, {"key": key, "digest": fingerprint(tensors)})
        part = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("xb") as file:  # a plain open: the mode follows the umask
                    file.write(data)
                part.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._unusable(path, error, len(data)) from error

    def _unusable(self, path: Path, error: OSError, size: int | None = None) -> UserError:
        what = "read" if size is None else f"written ({size:,} bytes)"
        return UserError(
            f"{path}: the cache cannot be {what}: {error.strerror}; make room or set "
            "TUNEKIT_CACHE to another folder"
        )
