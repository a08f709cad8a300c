"""``metadata.jsonl`` and ``metadata.csv``: a line a picture, its words and what else is said of it.

    file_name   the picture, inside the folder
    text        its caption, or a list of captions in JSON; more in text_2, text_3 ...; `caption` is
                taken where no line has `text`, and the source's `caption_column` names another
    mask        the mask's file, inside the folder (optional)
    weight      factor of the picture's loss, above 0 to 1000 (optional)
    split       only lines of the source's split are used, lines without one are `train` (optional)

Other columns are told and not used. Every picture of the folder needs a line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from tunekit.data.images import SUFFIXES
from tunekit.data.listing import (
    OUTSIDE,
    Folder,
    Row,
    caption_fault,
    fault,
    inside,
    read_text,
    there,
)
from tunekit.data.reading import escaped
from tunekit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures

CAPTION_COLUMNS = ("text", "caption")
_OPTIONAL = ("mask", "weight", "split")
_SYNONYMS = {
    "file_name": ("file", "image", "path", "filename", "image_path"),
    "text": ("caption", "prompt", "captions", "description"),
}
Lines = list[tuple[int, dict[str, Any]]]


def read_metadata(folder: Folder, pictures: Pictures, uncaptioned: bool = False) -> None:
    """Take captions, masks, weights and splits from the folder's metadata; faults are noted.

    uncaptioned: as of `Reading`.
    """
    if len(folder.metadata) > 1:
        folder.fault(folder.metadata[1], f"there is {folder.metadata[0]} as well; keep one of them")
        return
    name = folder.metadata[0]
    try:
        text = read_text(folder.root / name)
    except UserError as error:
        folder.fault(name, str(error))
        return
    lines = _csv_lines(folder, name, text) if name.endswith(".csv") else _json_lines(folder, text)
    if lines is None:
        return
    columns = list(dict.fromkeys(key for _, row in lines for key in row))
    try:
        column = caption_column(columns, pictures.caption_column) or "text"
    except UserError as error:
        folder.fault(name, str(error))
        return
    listed: dict[str, int] = {}
    splits: set[str] = set()
    for number, row in lines:
        try:
            blank = uncaptioned and is_blank(row, column)
            _read_row(folder, row, name, number, column, pictures.split, listed, splits, blank)
        except UserError as error:
            folder.fault(f"{name}:{number}", str(error))
    for mask in folder.claimed & folder.pictures.keys() - listed.keys():
        folder.masks[mask] = folder.pictures.pop(mask)
    _tell(folder, name, columns, column, listed)
    if splits and not folder.rows and pictures.split not in splits:
        there = ", ".join(sorted(splits)) or "train"
        folder.fault(name, f'no line of the split "{pictures.split}"; there are: {there}')


def _tell(
    folder: Folder, name: str, columns: Iterable[str], column: str, listed: Mapping[str, int]
) -> None:
    for picture in sorted({*folder.pictures, *folder.outside} - listed.keys()):
        what = f"not listed in {name}; add a line for it, or move it out"
        folder.findings.append(fault(picture, what, "not-listed"))
    for sidecar in folder.sidecars:
        folder.fault(sidecar, f"captions stand in {name} already; keep one of them")
    used = {"file_name", column, *_OPTIONAL, *more_captions(columns, column)}
    unused = sorted(set(columns) - used)
    if unused:
        told = [key + did_you_mean(key, _OPTIONAL) for key in unused]
        folder.note("unused-columns", f"columns of {name} that are not used", told)
    if column != "text":
        folder.note("caption-column", f"captions are the column of {name} called", [column])


def caption_column(columns: Iterable[str], asked: str | None, told: str = "") -> str | None:
    """Return the column of the captions, None where there is none.

    asked: the source's `caption_column`. told: the columns as a message lists them. Raises
    UserError where that is not there, or where both `text` and `caption` are.
    """
    columns = list(columns)
    there = f"the columns are: {told or ', '.join(columns) or 'none'}"
    if asked is not None:
        if asked not in columns:
            hint = did_you_mean(asked, columns)
            raise UserError(f'there is no caption_column "{asked}"{hint}; {there}')
        return asked
    found = [column for column in CAPTION_COLUMNS if column in columns]
    if len(found) > 1:
        raise UserError(f"captions may be in text or caption; name one as caption_column; {there}")
    return found[0] if found else None


def more_captions(columns: Iterable[str], column: str) -> list[str]:
    """Return the columns called as `column` with _2, _3 ... behind, in the order of numbers."""
    numbered = re.compile(rf"{re.escape(column)}_([0-9]{{1,4}})")
    found = [(int(match[1]), match[0]) for key in columns if (match := numbered.fullmatch(key))]
    return [name for _, name in sorted(found)]


def is_blank(row: Mapping[str, Any], column: str) -> bool:
    """Return whether a row has no caption yet: nothing, or only empty text, in its columns.

    Where another column may be meant as that of the captions, it is not blank but in error.
    """
    if column not in row and _meant(row, column):
        return False
    for key in (column, *more_captions(row, column)):
        value = row.get(key)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not (isinstance(text, str) and not text.strip()):
                return False
    return True


def captions_of(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Return the captions of a row: text or a list of texts in `column`, and those of _2, _3 ...

    Raises UserError for anything that is no caption.
    """
    captions = []
    for key in (column, *more_captions(row, column)):
        value = row.get(key)
        for text in value if isinstance(value, list) else [value]:
            if text is None and key != column:
                continue
            if not isinstance(text, str):
                raise UserError(f'"{key}" is {json.dumps(text, default=str)[:60]} and not text')
            if fault := caption_fault(text):
                raise UserError(fault)
            captions.append(text.strip())
    if not captions:
        raise UserError("the caption is empty")
    return tuple(captions)


def weight_of(value: object) -> float:
    """Return the weight that a cell says, 1 where it is empty. Raises UserError."""
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight <= 1000:
        told = json.dumps(value, default=str)[:60]
        raise UserError(f'"weight" is {told}; a number above 0, at most 1000, is needed')
    return weight


def _read_row(
    folder: Folder,
    row: dict[str, Any],
    metadata: str,
    number: int,
    column: str,
    split: str,
    listed: dict[str, int],
    splits: set[str],
    blank: bool,
) -> None:
    """Take what one line says of its picture. Raises UserError without the line's number."""
    name = _picture(folder, _text_of(row, "file_name"))
    if name in listed:
        raise UserError(f"{name} is listed already in line {listed[name]}")
    listed[name] = number
    if name in folder.outside:
        raise UserError(f"{name}: {OUTSIDE}")
    its_split = row.get("split") if row.get("split") is not None else "train"
    if not isinstance(its_split, str):
        raise UserError(f'{name}: "split" is {json.dumps(its_split)[:60]} and not text')
    splits.add(its_split)
    mask = None if row.get("mask") is None else _mask(folder, name, _text_of(row, "mask"))
    if row.get(column) is None and not blank:
        _text_of(row, column)  # says that it is missing, and what may be meant
    try:
        captions = () if blank else captions_of(row, column)
        weight = weight_of(row.get("weight"))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if its_split != split:
        folder.other_split.setdefault(its_split, []).append(name)
        return
    folder.rows[name] = Row(captions, f"{metadata}:{number}", weight, mask)


def _picture(folder: Folder, value: str) -> str:
    """Return the name of the picture in the folder that `value` means. Raises UserError."""
    asked = inside(folder, value)
    name = folder.find(asked, folder.pictures, folder.outside)
    if name is not None:
        return name
    if asked in folder.masks:
        raise UserError(f'"{value}": a mask by its name, not a picture')
    if there(folder.root / asked):
        raise UserError(f'"{value}": not a picture by its name (.png, .jpg, .webp are usual)')
    raise UserError(f'"{value}": there is no such picture{folder.near(asked, folder.pictures)}')


def _mask(folder: Folder, picture: str, value: str) -> str:
    """Return the name of the mask in the folder that `value` means. Raises UserError."""
    asked = inside(folder, value, "mask")
    name = folder.find(asked, folder.masks, folder.pictures)
    if name == picture:
        raise UserError(f'"{value}": the picture cannot be its own mask')
    if name is not None:
        folder.claimed.add(name)
        return name
    if asked in folder.outside or not (folder.root / asked).resolve().is_relative_to(
        folder.root.resolve()
    ):
        raise UserError(f'"{value}": {OUTSIDE}')
    if there(folder.root / asked) and PurePosixPath(asked).suffix.lower() not in SUFFIXES:
        raise UserError(f'"{value}": not a picture by its name; masks are usually .png')
    near = folder.near(asked, (*folder.masks, *folder.pictures))
    raise UserError(f'"{value}": there is no such mask{near}')


def _text_of(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    if value is not None:
        raise UserError(f'"{key}" is {json.dumps(value)[:60]} and not text')
    near = _meant(row, key)
    hint = f'; "{near[0]}" should be called that' if near and key not in row else ""
    raise UserError(f'"{key}" is missing{hint}')


def _meant(columns: Iterable[str], key: str) -> list[str]:
    """Return the columns that may be meant as `key`."""
    return [k for k in columns if k in _SYNONYMS.get(key, ()) or did_you_mean(k, [key])]


# Lines


def _json_lines(folder: Folder, text: str) -> Lines:
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                lines.append((number, json_object(line)))
        except UserError as error:
            folder.fault(f"{folder.metadata[0]}:{number}", str(error))
    return lines


def json_object(line: str) -> dict[str, Any]:
    """Return a JSON object, each key once. Raises UserError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f'key "{escaped(twice)}" stands twice')
        return row

    try:
        row = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError("not valid JSON: nested too deeply") from None
    except UserError:
        raise
    except ValueError:  # Python's own bound, which keeps it from counting for hours
        raise UserError("a number of thousands of digits; write a smaller one") from None
    if not isinstance(row, dict):
        raise UserError(f"a JSON object is needed, this is {line.strip()[:60]}")
    if r"\u" in line:
        _check_characters(row)
    return row


def _check_characters(row: dict[str, Any]) -> None:
    """Raise UserError for half a character, which JSON can say and no file of text can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{half} is half of a character; write the whole one") from None


def _csv_lines(folder: Folder, name: str, text: str) -> Lines | None:
    """Return the rows with the lines they begin in, empty cells as None; None: no usable header."""
    lines: Lines = []
    header: list[str] | None = None
    for number, cells in _csv_rows(folder, name, text):
        if header is None:
            header = [cell.strip() for cell in cells]
            if what := _header_fault(header):
                folder.fault(f"{name}:{number}", what)
                return None
        elif len(cells) != len(header):
            what = f"{len(cells)} cells where the first line names {len(header)}; put text with "
            folder.fault(f"{name}:{number}", what + "commas in quotes")
        else:
            lines.append(
                (number, dict(zip(header, (cell.strip() or None for cell in cells), strict=True)))
            )
    return lines


def _csv_rows(folder: Folder, name: str, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # What follows a broken quote cannot be told apart, so reading ends here.
            folder.fault(f"{name}:{number}", f"not valid CSV: {error}; nothing below was read")
            return
        if any(cell.strip() for cell in cells):
            yield number, cells


def _header_fault(header: list[str]) -> str | None:
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        return f'the column "{twice[0]}" stands twice'
    if "file_name" in header:
        return None
    for sign, called in ((";", "semicolons"), ("\t", "tabs")):
        if any(sign in column for column in header):
            return f"separated by {called}; save it with commas"
    near = _meant(header, "file_name")
    hint = f'; "{near[0]}" should be called that' if near else ""
    return f'the first line names no column "file_name"{hint}'
