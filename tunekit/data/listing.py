"""A folder's files, each put where its name says it belongs; nothing is opened."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from tunekit.data.images import SUFFIXES, UNREADABLE_SUFFIXES
from tunekit.data.reading import NOT_UTF8, escaped, is_utf8
from tunekit.data.records import Finding
from tunekit.errors import UserError, did_you_mean

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_LIMIT = 10_000
CAPTION_SUFFIXES = frozenset({".txt", ".caption"})
OUTSIDE = "a link that leads out of the folder; put the file itself here"
MASK_NAME = re.compile(r"(?P<stem>.+)(?:\.mask|-masklabel)\Z", re.DOTALL)
_MOST_HINTS = 20
_LONGEST_NAME = 1000  # characters


@dataclass
class Row:
    """What a line of metadata says of a picture. origin: "metadata.jsonl:3"."""

    captions: tuple[str, ...]
    origin: str
    weight: float = 1.0
    mask: str | None = None


@dataclass
class Folder:
    """What was found in a folder, each file by its name: its path inside, "/" between the parts.

    pictures, masks, sidecars: the files. outside: pictures that are links out of the folder.
    metadata: which of METADATA are there. claimed: masks that metadata names. rows: what metadata
    says, by picture. other_split: pictures that metadata gives to other splits, by
    split. findings: all there is to tell.
    hints: how many near misses were looked for.
    """

    root: Path
    pictures: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    sidecars: dict[str, Path] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    aside: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)
    rows: dict[str, Row] = field(default_factory=dict)
    other_split: dict[str, list[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    hints: int = 0

    def fault(self, where: str, what: str) -> None:
        """Note a fault. where: the file, with its line where there is one."""
        self.findings.append(fault(where, what))

    def note(self, code: str, text: str, names: Iterable[str], advice: str = "") -> None:
        """Note something that is only told."""
        self.findings.append(Finding("note", code, text, tuple(names), advice))

    @cached_property
    def _composed(self) -> dict[str, list[str]]:
        """The names of pictures and masks, by their letters as single signs."""
        found: dict[str, list[str]] = {}
        for name in (*self.pictures, *self.outside, *self.masks):
            found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return found

    def find(self, name: str, *among: Container[str]) -> str | None:
        """Return which of `among` is called `name`, whichever way its letters are composed.

        Some disks keep "ü" as one sign and others as two; a name in a file is the same name.
        """
        alike = [name, *self._composed.get(unicodedata.normalize("NFC", name), ())]
        return next((other for other in alike for names in among if other in names), None)

    def near(self, name: str, known: Iterable[str]) -> str:
        """Return a hint at the nearest of `known`; none where many were asked for already.

        A metadata file of thousands of wrong names would take minutes otherwise.
        """
        self.hints += 1
        return did_you_mean(name, known) if self.hints <= _MOST_HINTS else ""


def fault(where: str, what: str, code: str = "source") -> Finding:
    """Return an error finding about one file, told as ``where: what``."""
    return Finding("error", code, what, (where,))


# Listing


def list_folder(folder: Folder) -> None:
    """Sort every file below `folder.root` into pictures, masks, captions, metadata and the rest."""

    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, folder.root)
        folder.fault(escaped(where), f"cannot be listed ({error.strerror})")

    root = folder.root.resolve()
    for here, folders, files in os.walk(folder.root, onerror=unreadable):
        below = Path(here)
        for name in sorted(folders):
            path = below / name
            if name.startswith("."):
                folder.aside.append(f"{_name(folder, path)}/")
            elif path.is_symlink():
                folder.fault(
                    _name(folder, path),
                    "a link to a folder; put the pictures here, or name that folder as data.source",
                )
            elif not is_utf8(name):
                folder.fault(f"{_name(folder, path)}/", NOT_UTF8)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and is_utf8(name))
        for name in sorted(files):
            _sort_file(folder, below / name, root)


def _name(folder: Folder, path: Path) -> str:
    """Return how a file is called; a name that is no text is escaped, and only told."""
    return escaped(path.relative_to(folder.root).as_posix())


def _sort_file(folder: Folder, path: Path, root: Path) -> None:
    """Put a file where it belongs: picture, mask, caption, metadata, aside or fault."""
    name, suffix = _name(folder, path), path.suffix.lower()
    is_picture, is_caption = suffix in SUFFIXES, suffix in CAPTION_SUFFIXES
    is_mask = is_picture and MASK_NAME.fullmatch(path.stem) is not None
    if path.name.startswith(".") or not (
        is_picture
        or is_caption
        or suffix in UNREADABLE_SUFFIXES
        or suffix == ".cap"
        or path.stem.lower() == "metadata"
    ):
        folder.aside.append(name)
    elif not is_utf8(path.name):
        folder.fault(name, NOT_UTF8)
    elif not _leads_inside(path, root):
        if is_picture and not is_mask:
            folder.outside.add(name)  # told later: with the line, where metadata names it
        else:
            folder.fault(name, OUTSIDE)
    elif not path.is_file():
        folder.fault(name, "a link to nothing, or not an ordinary file")
    elif is_mask:
        folder.masks[name] = path
    elif is_picture:
        folder.pictures[name] = path
    elif is_caption:
        folder.sidecars[name] = path
    elif name in METADATA:
        folder.metadata.append(name)
    elif path.stem.lower() == "metadata":
        folder.fault(name, f"only {' or '.join(METADATA)} in the top folder is read; use that")
    elif suffix in UNREADABLE_SUFFIXES:
        folder.fault(name, f"{suffix} cannot be read; convert it to PNG or JPEG")
    else:
        folder.fault(name, "captions are read from .txt and .caption files; rename it")


def _leads_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except RuntimeError:  # a link to itself: it leads nowhere, which is told of it later
        return True


def inside(folder: Folder, value: str, what: str = "picture") -> str:
    """Return `value` as a name inside the folder. Raises UserError where it leads out of it."""
    path = PurePosixPath(value)
    if "\0" in value:
        told = value.replace("\0", "\\0")
        raise UserError(f'"{told}": \\0 in the name; name a {what} inside the folder')
    if len(value) > _LONGEST_NAME:
        told = f"{len(value):,} characters; no file has so long a name"
        raise UserError(f'"{value[:60]}...": {told}, name a {what} inside the folder')
    if path.is_absolute() or PureWindowsPath(value).drive:
        raise UserError(f'"{value}": an absolute path; name a {what} inside the folder')
    if ".." in path.parts or ".." in PureWindowsPath(value).parts:
        raise UserError(f'"{value}": ".." leads out of the folder; name a {what} inside it')
    return path.as_posix()


def there(path: Path) -> bool:
    """Return whether there is such a file; there is none of a name that the disk cannot have."""
    try:
        return path.exists()
    except OSError:
        return False


# What a caption may be


def read_text(path: Path) -> str:
    """Return a file's text, in UTF-8 with or without a byte order mark. Raises UserError."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error


def decode_text(data: bytes) -> str:
    """Return UTF-8 text, with or without a byte order mark. Raises UserError naming the place."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = data[: error.start].count(b"\n") + 1
        what = "UTF-16" if utf16 else f"not UTF-8 (line {line}, byte {error.start})"
        raise UserError(f"{what}; save it as UTF-8") from None


def caption_fault(text: str) -> str | None:
    """Return why `text` cannot be a caption, None where it can."""
    if not text.strip():
        return "the caption is empty"
    if len(text) > CAPTION_LIMIT:
        return f"{len(text):,} characters are no caption; the limit is {CAPTION_LIMIT:,}"
    return "\\0 in the caption" if "\0" in text else None
