"""A folder of pictures and words, read as a stream of records or refused with all its faults.

A record is ``{"image": {"path", "bytes"}, "name", "text", "origin"}``: the name is the path inside
the folder with "/" between its parts, text is null where the picture has no caption of its own,
and origin says where the caption stands. Whatever sources come later deliver the same records.

Captions are taken from ``metadata.jsonl`` (a JSON object a line: file_name, text), or else from
``.txt`` files of the pictures' names. Subfolders are read; names that begin with a dot are not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypedDict

from tunekit.data.images import SUFFIXES, UNREADABLE_SUFFIXES
from tunekit.errors import UserError, did_you_mean

METADATA = "metadata.jsonl"
CAPTION_LIMIT = 10_000
_NOT_YET = ("mask", "weight", "split")
_OTHER_CAPTIONS = frozenset({".caption", ".cap"})


class DataError(UserError):
    """Everything that is wrong with a folder of pictures, a line each.

    faults: ``file: what`` or ``metadata.jsonl:line: what``, paths relative to the folder.
    """

    def __init__(self, folder: Path, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n  ".join([f"{folder}: {count}; nothing was used", *self.faults]))


class Image(TypedDict):
    """How `datasets` hands over a picture that is not decoded."""

    path: str
    bytes: bytes | None


class Record(TypedDict):
    """A picture, its own caption if it has one, and where that stands."""

    image: Image
    name: str
    text: str | None
    origin: str


@dataclass
class Folder:
    """What was found in a folder, each file by its name.

    pictures, sidecars: the files. texts: caption and origin by picture. aside: neither pictures
    nor words. outside: pictures that are links out of the folder. joined: sidecars of several
    lines. has_metadata: whether metadata.jsonl is where captions are from.
    """

    root: Path
    pictures: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    sidecars: dict[str, Path] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    aside: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    unused_columns: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    has_metadata: bool = False

    def records(self) -> list[Record]:
        """Return a record a picture, in the order of their names."""
        return [
            {
                "image": {"path": str(self.pictures[name]), "bytes": None},
                "name": name,
                "text": text,
                "origin": origin,
            }
            for name in sorted(self.pictures)
            for text, origin in [self.texts.get(name, (None, "template"))]
        ]


def stream(records: list[Record]) -> Iterator[Record]:
    """Yield `records` through Hugging Face `datasets`, types checked and pictures not decoded."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "name": datasets.Value("string"),
            "text": datasets.Value("string"),
            "origin": datasets.Value("string"),
        }
    )
    table = datasets.Dataset.from_list([dict(record) for record in records], features=features)
    yield from table.to_iterable_dataset()


def read_folder(root: Path) -> Folder:
    """List the pictures of a folder and their captions; no picture is opened.

    Every fault is in the result's `faults`. Raises UserError where there is no folder, or no
    picture in it.
    """
    if not root.exists():
        raise UserError(f"{root}: there is no such folder of pictures")
    if not root.is_dir():
        raise UserError(f"{root}: a folder of pictures is needed here, this is a file")
    folder = Folder(root)
    _list(folder)
    if folder.has_metadata:
        _read_metadata(folder)
    else:
        _read_sidecars(folder)
        folder.faults += [f"{name}: {_OUTSIDE}" for name in sorted(folder.outside)]
    if not folder.pictures and not folder.faults:
        found = f" (it holds {', '.join(folder.aside[:5])})" if folder.aside else " (it is empty)"
        raise UserError(f"{root}: no pictures here{found}; PNG, JPEG and WebP files are usual")
    return folder


def _list(folder: Folder) -> None:
    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, folder.root)
        folder.faults.append(f"{where}: cannot be listed ({error.strerror})")

    for here, folders, files in os.walk(folder.root, onerror=unreadable):
        below = Path(here)
        for name in sorted(folders):
            path = below / name
            if name.startswith("."):
                folder.aside.append(f"{_name(folder, path)}/")
            elif path.is_symlink():
                folder.faults.append(
                    f"{_name(folder, path)}: a link to a folder; put the pictures here, or name "
                    "that folder as data.source"
                )
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            _sort_file(folder, below / name)


def _name(folder: Folder, path: Path) -> str:
    return path.relative_to(folder.root).as_posix()


def _sort_file(folder: Folder, path: Path) -> None:
    """Put a file where it belongs: picture, caption, metadata, aside or fault."""
    name, suffix = _name(folder, path), path.suffix.lower()
    is_picture, is_caption = suffix in SUFFIXES, suffix == ".txt"
    if path.name.startswith(".") or not (
        is_picture
        or is_caption
        or suffix in UNREADABLE_SUFFIXES | _OTHER_CAPTIONS
        or path.stem.lower() == "metadata"
    ):
        folder.aside.append(name)
    elif not path.resolve().is_relative_to(folder.root.resolve()):
        if is_picture:
            folder.outside.add(name)  # told later: with the line, where metadata.jsonl names it
        else:
            folder.faults.append(f"{name}: {_OUTSIDE}")
    elif not path.is_file():
        folder.faults.append(f"{name}: a link to nothing, or not an ordinary file")
    elif is_picture:
        folder.pictures[name] = path
    elif is_caption:
        folder.sidecars[name] = path
    elif name == METADATA:
        folder.has_metadata = True
    elif path.stem.lower() == "metadata":
        folder.faults.append(f"{name}: only a {METADATA} in the top folder is read; use that")
    elif suffix in UNREADABLE_SUFFIXES:
        folder.faults.append(f"{name}: {suffix} cannot be read; convert it to PNG or JPEG")
    else:
        folder.faults.append(f"{name}: captions are read from .txt files; rename it")


_OUTSIDE = "a link that leads out of the folder; put the file itself here"


def read_text(path: Path) -> str:
    """Return a file's text, in UTF-8 with or without a byte order mark. Raises UserError."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = data[: error.start].count(b"\n") + 1
        what = "UTF-16" if utf16 else f"not UTF-8 (line {line}, byte {error.start})"
        raise UserError(f"{what}; save it as UTF-8") from None


def _caption_fault(text: str) -> str | None:
    if not text.strip():
        return "the caption is empty"
    if len(text) > CAPTION_LIMIT:
        return f"{len(text):,} characters are no caption; the limit is {CAPTION_LIMIT:,}"
    return "\\0 in the caption" if "\0" in text else None


def _read_sidecars(folder: Folder) -> None:
    by_stem: dict[str, list[str]] = {}
    for name in sorted({*folder.pictures, *folder.outside}):
        by_stem.setdefault(name.removesuffix(PurePosixPath(name).suffix), []).append(name)
    for sidecar, path in folder.sidecars.items():
        stem = sidecar.removesuffix(path.suffix)
        pictures = by_stem.get(stem, [])
        if len(pictures) != 1:
            why = f"captions {' and '.join(pictures)} at once; give each its own name"
            if not pictures:
                why = f"there is no picture of that name{did_you_mean(stem, by_stem)}; "
                why += "rename it, or move it out of the folder"
            folder.faults.append(f"{sidecar}: {why}")
            continue
        try:
            text = read_text(path)
        except UserError as error:
            folder.faults.append(f"{sidecar}: {error}")
            continue
        if fault := _caption_fault(text):
            hint = "" if text.strip() else "; write one, or delete the file to use the template"
            folder.faults.append(f"{sidecar}: {fault}{hint}")
            continue
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) > 1:
            folder.joined.append(sidecar)
        folder.texts[pictures[0]] = (" ".join(lines), sidecar)


def _read_metadata(folder: Folder) -> None:
    try:
        text = read_text(folder.root / METADATA)
    except UserError as error:
        folder.faults.append(f"{METADATA}: {error}")
        return
    listed: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                _read_line(folder, line, number, listed)
        except UserError as error:
            folder.faults.append(f"{METADATA}:{number}: {error}")
    for name in sorted({*folder.pictures, *folder.outside} - listed.keys()):
        folder.faults.append(f"{name}: not listed in {METADATA}; add a line for it, or move it out")
    for sidecar in folder.sidecars:
        folder.faults.append(f"{sidecar}: captions stand in {METADATA} already; keep one of them")


def _read_line(folder: Folder, line: str, number: int, listed: dict[str, int]) -> None:
    """Take one picture's caption from a line. Raises UserError without the line's number."""
    row = _json_object(line)
    name = _inside(folder, _text_of(row, "file_name"))
    if name in listed:
        raise UserError(f"{name} is listed already in line {listed[name]}")
    listed[name] = number
    if name in folder.outside:
        raise UserError(f"{name}: {_OUTSIDE}")
    caption = _text_of(row, "text")
    if fault := _caption_fault(caption):
        raise UserError(f"{name}: {fault}")
    for key in _NOT_YET:
        if key in row:
            raise UserError(f'{name}: "{key}" is not supported; it would have no effect')
    folder.unused_columns.update(row.keys() - {"file_name", "text"})
    folder.texts[name] = (caption.strip(), f"{METADATA}:{number}")


def _json_object(line: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f'key "{key}" stands twice')
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError("not valid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise UserError(f"a JSON object is needed, this is {line.strip()[:60]}")
    return row


def _text_of(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    if value is not None:
        raise UserError(f'"{key}" is {json.dumps(value)[:60]} and not text')
    near = [k for k in row if k in _SYNONYMS[key] or did_you_mean(k, [key])]
    hint = f'; "{near[0]}" should be called that' if near and key not in row else ""
    raise UserError(f'"{key}" is missing{hint}')


_SYNONYMS = {
    "file_name": ("file", "image", "path", "filename", "image_path"),
    "text": ("caption", "prompt", "captions", "description"),
}


def _inside(folder: Folder, value: str) -> str:
    """Return the name of the picture in the folder that `value` means. Raises UserError."""
    path = PurePosixPath(value)
    if path.is_absolute() or PureWindowsPath(value).drive or "\0" in value:
        raise UserError(f'"{value}": an absolute path; name a picture inside the folder')
    if ".." in path.parts or ".." in PureWindowsPath(value).parts:
        raise UserError(f'"{value}": ".." leads out of the folder; name a picture inside it')
    name = path.as_posix()
    if name not in folder.pictures and name not in folder.outside:
        if (folder.root / name).exists():
            raise UserError(f'"{value}": not a picture by its name (.png, .jpg, .webp are usual)')
        raise UserError(f'"{value}": there is no such picture{did_you_mean(name, folder.pictures)}')
    return name
