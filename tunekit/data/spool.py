"""Pictures from tables, shards and the Hub, kept as files of the cache, so that each has a path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from tunekit.data.cache import Cache
from tunekit.data.records import Finding
from tunekit.data.upkeep import size_text

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)
KIND = "pictures"


def suffix_of(data: bytes) -> str:
    """Return the suffix that a picture's first bytes ask for; ".bin" for anything unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), ".bin")


@dataclass
class Spool:
    """Takes pictures' bytes and gives paths; counts what it was given.

    cache: where they are kept, as ``pictures/ab/<sha256>.<suffix>``.
    """

    cache: Cache = field(default_factory=Cache)
    count: int = 0
    size: int = 0

    def keep(self, data: bytes) -> Path:
        """Return the path of a file with these bytes. Raises UserError where it cannot be kept."""
        self.count += 1
        self.size += len(data)
        key, suffix = hashlib.sha256(data).hexdigest(), suffix_of(data)
        path = self.cache.keep_file(KIND, key, suffix, lambda: data)
        if path.read_bytes() != data:  # damaged since it was written
            path.unlink()
            path = self.cache.keep_file(KIND, key, suffix, lambda: data)
        return path

    def told(self) -> list[Finding]:
        """Return the note that says where the pictures are, where there are any."""
        if not self.count:
            return []
        what = "1 picture" if self.count == 1 else f"{self.count:,} pictures"
        text = f"{what} ({size_text(self.size)}) kept as files in {self.cache.root / KIND}"
        return [Finding("note", "kept", text)]
