"""Preflight: every picture of a folder decoded once, every fault told at once, and what to know."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tunekit.data.captions import fill
from tunekit.data.images import decode, pixel_hash, plan_fit
from tunekit.data.source import METADATA, DataError, Folder, Record, read_folder, stream
from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.schema import Data

MOST_ENLARGED = 8


@dataclass(frozen=True)
class Example:
    """A picture and its words, checked.

    path: the file. name: its path inside the folder. caption: placeholders filled in.
    origin: where the caption stands: "metadata.jsonl:3", "00.txt", or "template".
    width, height: pixels after the EXIF orientation. pixels: sha256 of the decoded RGB pixels.
    key: sha256 of pixels and caption: what the example is, whatever its file is called.
    """

    path: Path
    name: str
    caption: str
    origin: str
    width: int
    height: int
    pixels: str
    key: str


@dataclass(frozen=True)
class Note:
    """Something to know about some pictures. severity: whether it may hurt the result."""

    severity: Literal["note", "warning"]
    text: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        mark = "warning: " if self.severity == "warning" else ""
        return f"{mark}{self.text}: {', '.join(self.names)}" if self.names else mark + self.text


@dataclass(frozen=True)
class DataSheet:
    """What a folder of pictures holds: what a run prints and its report shows.

    resolution: edge in pixels the pictures are made, None where it was not asked.
    examples: in the order of their names. notes: warnings first.
    """

    folder: Path
    resolution: int | None
    examples: tuple[Example, ...]
    notes: tuple[Note, ...]

    def summary(self) -> list[str]:
        """Return the sheet as lines of text."""
        sizes = sorted({(e.width, e.height) for e in self.examples}, key=lambda s: s[0] * s[1])
        span = " to ".join(f"{w}x{h}" for w, h in (sizes[0], sizes[-1])[: len(sizes)])
        count = "1 picture" if len(self.examples) == 1 else f"{len(self.examples)} pictures"
        made = f", made {self.resolution}x{self.resolution}" if self.resolution else ""
        return [f"{self.folder}: {count} of {span}{made}", *(str(note) for note in self.notes)]

    def at(self, resolution: int) -> DataSheet:
        """Return a sheet that was made without a resolution for one; nothing is decoded again.

        resolution: edge in pixels the pictures will have. Raises DataError for pictures that are
        far too small for it.
        """
        if self.resolution == resolution:
            return self
        assert self.resolution is None
        if faults := _too_small(self.examples, resolution):
            raise DataError(self.folder, faults)
        notes = [*self.notes, *_size_notes(self.examples, resolution)]
        return replace(self, resolution=resolution, notes=_sorted(notes))

    def caption_sources(self) -> dict[str, int]:
        """Return how many captions are from "metadata.jsonl", ".txt files" and "the template"."""
        return dict(Counter(_source(example) for example in self.examples))

    def with_cut_captions(self, cut_words: Callable[[str], str]) -> DataSheet:
        """Return the sheet with a warning for captions longer than the text encoder reads.

        cut_words: a caption -> the end of it that is never read, "" where all is read. Asked here
        because conditioning found in the cache was cut long ago, and nobody would say so.
        """
        cut = [(example.name, cut_words(example.caption)) for example in self.examples]
        names = tuple(f'{name} ("{words}")' for name, words in cut if words)
        note = Note("warning", "the text encoder never reads the end of the caption", names)
        return replace(self, notes=(note, *self.notes)) if names else self


def preflight(data: Data, resolution: int | None = None, *, folder: str | None = None) -> DataSheet:
    """Read and check `data.source` (or `folder`, such as `data.holdout`).

    resolution: edge in pixels the pictures will have; default `data.resolution`. With neither,
    nothing is said about enlarging and cutting.
    Raises DataError with every fault of every file, and UserError where there are no pictures or
    the caption template is wrong.
    """
    size = resolution or data.resolution
    template = fill(data.caption, data.trigger, data.class_noun)
    found = read_folder(Path(folder or data.source))
    faults = list(found.faults)
    remarks: dict[str, list[str]] = {}
    examples = []
    for record in stream(found.records()):
        try:
            examples.append(_example(record, data, template, remarks))
        except UserError as error:
            faults.append(f"{record['name']}: {error}")
    faults += _too_small(examples, size) if size else []
    if faults:
        raise DataError(found.root, faults)
    notes = [Note("note", text, tuple(names)) for text, names in remarks.items()]
    notes += _caption_notes(found, examples, data) + _twins(examples)
    sheet = DataSheet(found.root, None, tuple(examples), _sorted(notes))
    return sheet.at(size) if size else sheet


def load_examples(data: Data) -> list[Example]:
    """Return the checked examples of `data.source`. Raises as preflight does."""
    return list(preflight(data).examples)


def shared_pictures(one: DataSheet, other: DataSheet) -> list[tuple[str, str]]:
    """Return the names of pictures that stand in both sheets, compared by their pixels."""
    names = {example.pixels: example.name for example in one.examples}
    return [(names[e.pixels], e.name) for e in other.examples if e.pixels in names]


def _source(example: Example) -> str:
    if example.origin == "template":
        return "the template"
    return METADATA if example.origin.startswith(f"{METADATA}:") else ".txt files"


def _example(record: Record, data: Data, template: str, remarks: dict[str, list[str]]) -> Example:
    path, name, text = Path(record["image"]["path"]), record["name"], record["text"]
    picture = decode(path)
    for remark in picture.notes:
        remarks.setdefault(remark, []).append(name)
    width, height = picture.image.size
    try:
        caption = template if text is None else fill(text, data.trigger, data.class_noun)
    except UserError as error:
        raise UserError(f"caption in {record['origin']}: {error}") from None
    pixels = pixel_hash(picture.image)
    key = hashlib.sha256(f"{pixels}\n{caption}".encode()).hexdigest()
    return Example(path, name, caption, record["origin"], width, height, pixels, key)


def _caption_notes(found: Folder, examples: Sequence[Example], data: Data) -> list[Note]:
    notes = []
    from_template = [e.name for e in examples if e.origin == "template"]
    if len(from_template) == len(examples):
        filled = examples[0].caption
        notes.append(Note("note", f'captions: all "{filled}", from the template', ()))
    elif from_template:
        text = f'no caption file, so the template "{data.caption}" captions them'
        notes.append(Note("warning", text, tuple(from_template)))
    for source, count in Counter(map(_source, examples)).items():
        if source != "the template":
            notes.append(Note("note", f"captions: {count} from {source}", ()))
    if found.joined:
        notes.append(Note("note", "several lines joined to one caption", tuple(found.joined)))
    without = [e.name for e in examples if data.trigger.lower() not in e.caption.lower()]
    if without:
        text = f'the caption does not say "{data.trigger}", so it does not teach the trigger'
        notes.append(Note("warning", text, tuple(without)))
    if found.unused_columns:
        columns = tuple(sorted(found.unused_columns))
        notes.append(Note("note", "columns of metadata.jsonl that are not used", columns))
    if found.aside:
        notes.append(Note("note", "not pictures and left aside", tuple(sorted(found.aside))))
    return notes


def _twins(examples: Sequence[Example]) -> list[Note]:
    by_pixels: dict[str, list[str]] = {}
    for example in examples:
        by_pixels.setdefault(example.pixels, []).append(example.name)
    return [
        Note(
            "warning", f"the same picture {len(names)} times, seen that much oftener", tuple(names)
        )
        for names in by_pixels.values()
        if len(names) > 1
    ]


def _too_small(examples: Sequence[Example], resolution: int) -> list[str]:
    return [
        f"{e.name}: {e.width}x{e.height} would be enlarged more than {MOST_ENLARGED} times for a "
        f"resolution of {resolution}; take a larger picture or lower data.resolution"
        for e in examples
        if min(e.width, e.height) * MOST_ENLARGED < resolution
    ]


def _size_notes(examples: Sequence[Example], resolution: int) -> list[Note]:
    enlarged, cut = [], []
    for e in examples:
        scale = plan_fit(e.width, e.height, resolution).scale
        lost = 1 - min(e.width, e.height) / max(e.width, e.height)
        if scale > 1:
            enlarged.append(f"{e.name} ({e.width}x{e.height}, {scale:.2f}x)")
        if lost:
            cut.append(f"{e.name} ({e.width}x{e.height}, {lost:.0%})")
    notes = []
    if enlarged:
        text = f"smaller than {resolution} pixels and enlarged, which teaches blur"
        notes.append(Note("warning", text, tuple(enlarged)))
    if cut:
        notes.append(Note("note", "not square, so this much is cut off", tuple(cut)))
    return notes


def _sorted(notes: Iterable[Note]) -> tuple[Note, ...]:
    return tuple(sorted(notes, key=lambda note: note.severity != "warning"))
