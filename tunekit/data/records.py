"""What the parts of `tunekit.data` hand each other: records, findings, examples."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunekit.errors import UserError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))  # controls, half characters, line breaks
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Return `text` in one line that drives no terminal: control characters as in ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character in _BIDI or unicodedata.category(character) in _UNPRINTABLE
        else character
        for character in text
    )


@dataclass(frozen=True, slots=True)
class Record:
    """A picture as a source names it, not opened yet.

    path: the picture's file (pictures from tables, shards and the Hub are kept in the cache).
    name: unique among all sources: the path inside its source, "/" between its parts, and with
    several sources their label in front. captions: its own, raw; none: the template is used.
    origin: where they stand: "metadata.jsonl:3", "00.txt", "folder 10_zorp robot", "a.parquet:17",
    or "template". repeats: visits an epoch. weight: factor of its loss. mask: a mask's file.
    """

    path: Path
    name: str
    captions: tuple[str, ...] = ()
    origin: str = "template"
    repeats: int = 1
    weight: float = 1.0
    mask: Path | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know about some pictures.

    severity: "error" refuses training, "warning" may hurt the result, "note" is only told.
    code: one word or two for scripts, such as "near-duplicate". names: the pictures (with details
    in brackets where they help); empty: all of it. advice: what to do, "" where nothing is to do.
    """

    severity: Severity
    code: str
    text: str
    names: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        mark = "" if self.severity == "note" else f"{self.severity}: "
        told = f"{mark}{self.text}" + (f": {', '.join(self.names)}" if self.names else "")
        return printable(f"{told}; {self.advice}" if self.advice else told)


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and its words, checked: what training is told about it.

    path, name, origin, repeats, weight, mask: as in its Record. captions: at least one,
    placeholders filled in, as they are before what is done to them at each visit.
    width, height: pixels after the EXIF orientation. pixels: sha256 of the decoded RGB pixels.
    mask_pixels: sha256 of the mask's, "" without one. key: sha256 of pixels and captions: what the
    example is, whatever its file is called.
    """

    path: Path
    name: str
    captions: tuple[str, ...]
    origin: str
    width: int
    height: int
    pixels: str
    key: str
    repeats: int = 1
    weight: float = 1.0
    mask: Path | None = None
    mask_pixels: str = ""

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


class DataError(UserError):
    """Everything that is wrong with the pictures, a line each: ``file: what``, ``file:line: what``.

    where: the source, as the user named it.
    """

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(map(printable, faults))
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(
            "\n  ".join([f"{printable(str(where))}: {count}; nothing was used", *self.faults])
        )
