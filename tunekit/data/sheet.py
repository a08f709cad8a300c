"""Preflight: every picture decoded once, every fault told at once, and what to know.

`examine` reads and checks and keeps the faults among its findings; `preflight` refuses them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data import buckets, checks, crops, masks, source, visits
from tunekit.data.captions import expand
from tunekit.data.images import Picture, decode, pixel_hash
from tunekit.data.measures import Measures, measure
from tunekit.data.records import SEVERITIES, DataError, Example, Finding, Record, printable
from tunekit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from tunekit.data.buckets import Fit
    from tunekit.data.cache import Cache
    from tunekit.schema_data import Data

__all__ = ["DataError", "DataSheet", "Example", "Finding", "examine", "preflight"]

MOST_NAMED = 40
"""Pictures named after one remark in the summary; the others are counted."""
_AT_ONCE = 256  # records in the stream's memory


@dataclass(frozen=True)
class DataSheet:
    """What the sources hold: what a run prints and its report shows.

    label: the sources as the user named them. data: the recipe's section. multiple: pixels, what
    edges are multiples of. resolutions: edges in pixels, empty where none was asked. examples: in
    the order of their names; looks: what was measured of each, in the same order. found: whatever
    does not depend on the resolution.
    """

    label: str
    data: Data
    multiple: int
    resolutions: tuple[int, ...]
    examples: tuple[Example, ...]
    looks: tuple[Measures, ...]
    found: tuple[Finding, ...]

    @property
    def resolution(self) -> int | None:
        """The first resolution, that of the samples; None where none was asked."""
        return self.resolutions[0] if self.resolutions else None

    @property
    def folder(self) -> Path:
        """The source as a path; of several sources, or of one on the Hub, only a name."""
        return Path(self.label)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """All there is to tell: errors, then warnings, then notes."""
        found = list(self.found)
        for resolution in self.resolutions:
            found += checks.sizes(self.examples, self.data, resolution, self.multiple)
        if self.resolutions:
            found += checks.blurred(self.examples, self.looks, min(self.resolutions))
        return tuple(sorted(dict.fromkeys(found), key=lambda f: SEVERITIES.index(f.severity)))

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What refuses training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Warnings and notes, warnings first."""
        return tuple(finding for finding in self.findings if finding.severity != "error")

    def check(self) -> DataSheet:
        """Return the sheet itself. Raises DataError with every error, where there is one."""
        if self.errors:
            raise DataError(self.label, map(source.fault_line, self.errors))
        return self

    def fit(self, example: Example, resolution: int) -> Fit | None:
        """Return an example's bucket and middle crop; None where it cannot be used."""
        size = (example.width, example.height)
        if not buckets.usable(*size, resolution, self.data, self.multiple):
            return None
        return buckets.plan(*size, resolution, self.data, self.multiple)

    def crops(self, example: Example, resolution: int) -> tuple[Fit, ...]:
        """Return what of an example is trained on, each once; empty where it cannot be used.

        The places of smart crops are found in the picture, which is decoded again for them.
        """

        def best(middle: Fit) -> float:
            picture = decode(example.path, self.data.background)
            settings = self.data.mask
            mask = masks.of(settings, picture, example.mask) if settings else None
            return crops.best_place(picture.image, mask, middle)

        size, multiple = (example.width, example.height), self.multiple
        if not buckets.usable(*size, resolution, self.data, multiple):
            return ()
        found = crops.fits(*size, example.pixels, resolution, self.data, multiple, best)
        return tuple(found)

    def in_buckets(self, resolution: int) -> dict[tuple[int, int], int]:
        """Return how many pictures each bucket's (width, height) has, most first."""
        fits = [self.fit(example, resolution) for example in self.examples]
        counts = Counter((fit.width, fit.height) for fit in fits if fit)
        return dict(counts.most_common())

    def visits(self, batch_size: int, batches: int) -> tuple[tuple[int, int], ...]:
        """Return the least and the most visits each example gets, in the order of `examples`.

        batch_size: pictures a batch. batches: of the whole run. Empty where the sheet has no
        resolution, or a picture that cannot be used.
        """
        shapes = [self.fit(e, r) for r in self.resolutions for e in self.examples]
        if not shapes or None in shapes:
            return ()
        sizes = [(fit.width, fit.height) for fit in shapes if fit]
        repeats = [e.repeats for e in self.examples] * len(self.resolutions)
        told = visits.expected(sizes, repeats, batch_size, batches)
        count, all_visits = len(self.examples), batch_size * batches
        own = [told[place::count] for place in range(count)]
        return tuple(
            (sum(low for low, _ in each), min(all_visits, sum(high for _, high in each)))
            for each in own
        )

    def summary(self) -> list[str]:
        """Return the sheet as lines of text."""
        return [self.headline(), *(told(note) for note in self.notes)]

    def headline(self) -> str:
        """Return the sheet in one line: how many pictures, of which sizes, made what."""
        count = "1 picture" if len(self.examples) == 1 else f"{len(self.examples):,} pictures"
        if not self.examples:
            return f"{printable(self.label)}: no picture that can be used"
        sizes = sorted({(e.width, e.height) for e in self.examples}, key=lambda s: s[0] * s[1])
        span = " to ".join(f"{w}x{h}" for w, h in (sizes[0], sizes[-1])[: len(sizes)])
        made = " and ".join(self._made(resolution) for resolution in self.resolutions)
        return f"{printable(self.label)}: {count} of {span}" + (f", made {made}" if made else "")

    def _made(self, resolution: int) -> str:
        if self.data.buckets is None:
            return f"{resolution}x{resolution}"
        counts = self.in_buckets(resolution)
        if not counts:  # none can be used: told as errors
            return f"about {resolution}x{resolution}"
        listed = [f"{w}x{h} ({n})" for (w, h), n in list(counts.items())[:6]]
        more = f" and {len(counts) - 6} more buckets" if len(counts) > 6 else ""
        return ", ".join(listed) + more

    def at(self, resolution: int) -> DataSheet:
        """Return a sheet that was made without a resolution for one; nothing is decoded again.

        resolution: edge in pixels the pictures will have. Raises DataError for pictures that
        cannot be used at it.
        """
        if self.resolution == resolution:
            return self
        assert not self.resolutions
        return replace(self, resolutions=(resolution,)).check()


def told(finding: Finding, most: int = MOST_NAMED) -> str:
    """Return a finding as a line that names at most `most` pictures and counts the others."""
    hidden = len(finding.names) - most
    if hidden <= 0:
        return str(finding)
    return str(replace(finding, names=(*finding.names[:most], f"and {hidden:,} more")))


def examine(
    data: Data,
    resolution: int | None = None,
    *,
    multiple: int = 8,
    folder: str | None = None,
    cut_words: Callable[[str], str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Cache | None = None,
) -> DataSheet:
    """Read and check `data`'s sources, or the held-out pictures in `folder`; errors are findings.

    resolution: edge in pixels the pictures will have; default `data.resolution`. With neither,
    nothing is said about enlarging and cutting. multiple: what edges must be multiples of, pixels.
    cut_words: a caption -> the end of it that the text encoder never reads, "" where it reads all;
    asked here because conditioning found in the cache was cut long ago, and nobody would say so.
    progress: told (pictures done, in all). cache: keeps the pictures of tables and shards.
    Pictures in `folder` are only looked at: they need no masks and may be enlarged.
    """
    from tunekit.schema_source import Pictures

    wanted = (resolution,) if resolution else data.resolutions
    sources = data.sources
    if folder is not None:
        sources = (Pictures(path=folder),)
        data = data.model_copy(update={"mask": None, "upscale": True})
    masked = data.mask is not None and data.mask.source == "files"
    read = source.read(sources, mask=masked, cache=cache)
    found, remarks = list(read.findings), dict[str, list[str]]()
    if folder is not None:
        found = [_unneeded(f) if f.code == "mask-unused" else f for f in found]
    examples, looks = [], []
    total = len(read.records)
    for done, record in enumerate(_streamed(read.records), 1):
        try:
            example, look = _example(record, data, wanted, multiple, remarks)
        except _FaultError as fault:
            found.append(fault.finding)
        else:
            examples.append(example)
            looks.append(look)
        if progress:
            progress(done, total)
    found += [Finding("note", "converted", text, tuple(names)) for text, names in remarks.items()]
    words = checks.words(examples, data)
    if any(finding.code == "missing-caption" for finding in words):
        found = [f for f in found if f.code != "no-caption"]  # a table's word for the same
    found += words
    if cut_words:
        found += checks.cut_captions(examples, cut_words, data.captions)
    found += checks.blank(examples, looks) + checks.duplicates(examples, looks)
    if data.mask:
        found += checks.masks(examples, looks, data.mask)
    else:
        found += checks.background(examples, looks)
    return DataSheet(
        read.label, data, multiple, wanted, tuple(examples), tuple(looks), tuple(found)
    )


def preflight(
    data: Data,
    resolution: int | None = None,
    *,
    multiple: int = 8,
    folder: str | None = None,
    cut_words: Callable[[str], str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Cache | None = None,
) -> DataSheet:
    """Do what `examine` does. Raises DataError with every fault of every file, if there is one."""
    return examine(
        data,
        resolution,
        multiple=multiple,
        folder=folder,
        cut_words=cut_words,
        progress=progress,
        cache=cache,
    ).check()


def shared_pictures(one: DataSheet, other: DataSheet) -> list[tuple[str, str]]:
    """Return the names of pictures that stand in both sheets, compared by their pixels."""
    names = {example.pixels: example.name for example in one.examples}
    return [(names[e.pixels], e.name) for e in other.examples if e.pixels in names]


def _streamed(records: list[Record]) -> Iterator[Record]:
    """Yield records as a stream and forget them, so that of many only the examples are held."""
    while records:
        part = records[:_AT_ONCE]
        del records[:_AT_ONCE]
        yield from source.stream(part)


def _unneeded(masks: Finding) -> Finding:
    return Finding("note", masks.code, "masks, which held-out pictures do not need", masks.names)


class _FaultError(UserError):
    """A record that gives no example, with the error that says so."""

    def __init__(self, code: str, text: str, name: str) -> None:
        super().__init__(text)
        self.finding = Finding("error", code, text, (name,))


def _example(
    record: Record, data: Data, wanted: Sequence[int], multiple: int, remarks: dict[str, list[str]]
) -> tuple[Example, Measures]:
    """Decode a record's picture, once, and say what it is. Raises _FaultError."""
    try:
        picture = decode(record.path, data.background)
    except UserError as error:
        raise _FaultError("broken", str(error), record.name) from error
    for remark in picture.notes:
        remarks.setdefault(remark, []).append(record.name)
    try:
        captions = expand(record.captions, data)
    except UserError as error:
        text = f"caption in {record.origin}: {error}"
        raise _FaultError("caption", text, record.name) from error
    width, height = picture.image.size
    pixels = pixel_hash(picture.image)
    mask = _mask(record, picture, data)
    example = Example(
        path=record.path,
        name=record.name,
        captions=captions,
        origin=record.origin,
        width=width,
        height=height,
        pixels=pixels,
        key=hashlib.sha256("\n".join([pixels, *captions]).encode()).hexdigest(),
        repeats=record.repeats,
        weight=record.weight,
        mask=record.mask,
        mask_pixels=masks.digest(mask) if mask else "",
    )
    if mask:
        _check_mask(example, picture, mask, data, wanted, multiple)
    return example, measure(picture.image, masks.coverage(mask) if mask else None)


def _mask(record: Record, picture: Picture, data: Data) -> Image.Image | None:
    try:
        return masks.of(data.mask, picture, record.mask) if data.mask else None
    except UserError as error:
        text = f"its mask {record.mask and record.mask.name}: {error}"
        raise _FaultError("mask", text, record.name) from error


def _check_mask(
    example: Example,
    picture: Picture,
    mask: Image.Image,
    data: Data,
    wanted: Sequence[int],
    multiple: int,
) -> None:
    """Raise _FaultError for a mask of another size, all black, or outside of every crop."""
    assert data.mask is not None
    size, fits = (example.width, example.height), []
    if mask.size == size:  # else nothing can be said of crops
        for resolution in wanted:
            if buckets.usable(*size, resolution, data, multiple):
                best = partial(crops.best_place, picture.image, mask)
                fits += crops.fits(*size, example.pixels, resolution, data, multiple, best)
    if fault := masks.check(mask, *size, data.mask, fits):
        raise _FaultError("mask", fault, example.name)
