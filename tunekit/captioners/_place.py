"""Where captions are written: into a folder's metadata.jsonl, beside its pictures, or elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tunekit.data.listing import METADATA, decode_text
from tunekit.data.metadata import caption_column, captions_of, is_blank, json_object, more_captions
from tunekit.data.records import Record
from tunekit.errors import UserError
from tunekit.wholefile import write_whole

_IN_METADATA = re.compile(r"metadata\.(?:jsonl|csv):(\d+)")
_IN_SIDECAR = re.compile(r".+\.(?:txt|caption)", re.DOTALL)


@dataclass
class Place:
    """Where the captions of some records go, and which are there already.

    out: a .jsonl file, or with `sidecars` the folder. files: each record's name there. lines:
    those of `out` as they stand, with the line's number of each name. copied: whether the pictures
    come from a table or shard and are laid beside `out`. had: captions that stand there already.
    """

    out: Path
    files: dict[str, Record]
    sidecars: bool = False
    copied: bool = False
    lines: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    had: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        """Where captions are kept until all are made."""
        folder = self.out if self.sidecars else self.out.parent
        return folder / f".{'captions' if self.sidecars else self.out.name}.part"

    def write(self, captions: Mapping[str, str]) -> None:
        """Write the new captions, by name; those that were there and are not in it stay."""
        if self.copied:
            for name, record in self.files.items():
                if not (self.out.parent / name).exists():
                    shutil.copyfile(record.path, self.out.parent / name)
        if self.sidecars:
            for name, text in captions.items():
                write_whole(self._sidecar(name), text + "\n")
            return
        rows = [line for line in self.lines if line.strip()]
        column = caption_column(_columns(rows), None) or "text"
        lines = list(self.lines)
        added = {n: list(t) if len(t) > 1 else t[0] for n, t in self.had.items()} | dict(captions)
        for name in self.files:
            if name in captions and name in self.numbers:
                lines[self.numbers[name]] = _changed(
                    lines[self.numbers[name]], column, captions[name]
                )
            elif name in added and name not in self.numbers:
                row = {"file_name": name, column: added[name]}
                lines.append(json.dumps(row, ensure_ascii=False))
        write_whole(self.out, "".join(f"{line}\n" for line in lines if line.strip()))

    def _sidecar(self, name: str) -> Path:
        own = self.files[name].origin
        if _IN_SIDECAR.fullmatch(own):
            return self.out / own
        return self.out / PurePosixPath(name).with_suffix(".txt")


def find(source: Path, records: Sequence[Record], out: Path | None) -> Place:
    """Return where captions of `source` go. out: as the user says; None: where its own stand.

    Raises UserError where they would stand beside others, so that neither counts.
    """
    if out is not None and out.suffix != ".jsonl":
        raise UserError(f"--out {out}: captions are written as .jsonl; name such a file")
    if not source.is_dir():
        return _beside_copies(source, records, out)
    files = {record.name: record for record in records}
    own = {r.name: r for r in records if r.captions and not r.origin.startswith("folder ")}
    sidecars = any(_IN_SIDECAR.fullmatch(r.origin) for r in records)  # an empty one as well
    metadata, table = (source / name for name in METADATA)
    if out is not None and out.resolve() != metadata.resolve():
        return _read(Place(out, files))
    if table.exists():
        raise UserError(
            f"{table}: its captions count, and only .jsonl is written: name a file elsewhere with "
            "--out, or turn the table into metadata.jsonl first"
        )
    had = {name: record.captions for name, record in own.items()}
    if sidecars and out is None:
        return Place(source, files, sidecars=True, had=had)
    if sidecars:
        raise UserError(
            f"{out}: {source} has captions in .txt files, and in both places they would be in "
            "conflict: leave --out away to write more .txt files, or name a file elsewhere"
        )
    place = Place(metadata, files, had=had)
    if metadata.exists():
        place.lines = _text(metadata).split("\n")
        matches = {name: _IN_METADATA.fullmatch(r.origin) for name, r in files.items()}
        place.numbers = {name: int(match[1]) - 1 for name, match in matches.items() if match}
    return place


def _beside_copies(source: Path, records: Sequence[Record], out: Path | None) -> Place:
    """Return a folder where pictures of a table or shard get files of their own."""
    if out is None or out.name != METADATA[0]:
        raise UserError(
            f"{source}: is no folder, so captions cannot be written into it: with "
            f"--out FOLDER/{METADATA[0]} the pictures are laid there too"
        )
    if out.parent.exists() and not out.exists() and any(out.parent.glob("[!.]*")):
        raise UserError(f"--out {out}: the folder holds other files; name an empty or a new one")
    files: dict[str, Record] = {}
    for record in records:
        stem = re.sub(r"[^\w.-]+", "-", record.name).removesuffix(record.path.suffix).strip(".-")
        name, number = f"{stem}{record.path.suffix}", 1
        while name in files:
            number += 1
            name = f"{stem}-{number}{record.path.suffix}"
        files[name] = record
    place = _read(Place(out, files, copied=True))
    place.had = {n: r.captions for n, r in files.items() if r.captions} | place.had
    return place


def _read(place: Place) -> Place:
    """Take in what a file of captions holds that is not the folder's own."""
    if not place.out.exists():
        return place
    place.lines = _text(place.out).split("\n")
    for number, line in enumerate(place.lines):
        if not line.strip():
            continue
        try:
            row = json_object(line)
            if not isinstance(row.get("file_name"), str):
                raise UserError('"file_name" is needed')
            texts = () if is_blank(row, "text") else captions_of(row, "text")
        except UserError as error:
            raise UserError(f"{place.out}:{number + 1}: {error}") from None
        place.numbers[row["file_name"]] = number
        if texts:
            place.had[row["file_name"]] = texts
    return place


def _text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _columns(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key for line in lines for key in json_object(line)))


def _changed(line: str, column: str, caption: str) -> str:
    """Return a line with one caption in the place of all it had; the rest of it stays."""
    row: dict[str, Any] = json_object(line)
    for other in more_captions(row, column):
        del row[other]
    return json.dumps({**row, column: caption}, ensure_ascii=False)
