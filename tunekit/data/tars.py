"""Webdataset shards: tar files in which a picture and its words share a name up to the first dot.

    key.jpg (or .png, .webp ...)          the picture
    key.txt or key.caption                its caption
    key.json                              an object with text (or caption) and weight, as metadata
    key.mask.png or key-masklabel.png     its mask

The table of contents and the words are read and checked first, so that every fault of a shard is
told with its member's name; the pictures then come through `datasets` as one stream. Its own reader
of shards takes the columns from the first five samples and decodes what it finds, which tells
neither which member is wrong nor that a later one differs.

Nothing is unpacked under a member's own name, and nothing is unpickled.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from tunekit.data.images import SUFFIXES, UNREADABLE_SUFFIXES
from tunekit.data.listing import CAPTION_LIMIT, caption_fault, decode_text, fault
from tunekit.data.metadata import (
    CAPTION_COLUMNS,
    captions_of,
    is_blank,
    json_object,
    weight_of,
)
from tunekit.data.reading import NOT_UTF8, Reading, escaped, is_utf8, masks_unused
from tunekit.data.records import Finding, Record
from tunekit.data.spool import Spool
from tunekit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures

_PICKLED = frozenset({".pkl", ".pickle", ".pyd", ".pth", ".pt", ".ckpt", ".joblib", ".dill"})
_LABEL = "-masklabel"
_JSON_LIMIT = 1_000_000
_TEXTS = ("txt", "caption")
_WORDS = (*_TEXTS, "json")
_END = 2 * tarfile.BLOCKSIZE  # bytes of zeros behind the last member


@dataclass(frozen=True)
class _Member:
    """An ordinary file in a shard: where its bytes lie. start, size: bytes."""

    name: str
    start: int
    size: int

    def read(self, shard: BinaryIO) -> bytes:
        shard.seek(self.start)
        return shard.read(self.size)


@dataclass
class _Sample:
    """What a shard holds under one key: members by field, which is all after the first dot.

    label: the mask called key-masklabel. The other values are chosen from these.
    """

    name: str
    fields: dict[str, _Member] = field(default_factory=dict)
    label: _Member | None = None
    image: _Member | None = None
    mask: _Member | None = None
    captions: tuple[str, ...] = ()
    origin: str = "template"
    weight: float = 1.0


@dataclass
class _Shards:
    """What was found in the shards so far. joined: captions of several lines."""

    source: Pictures
    how: Reading
    findings: list[Finding] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)
    masks: list[str] = field(default_factory=list)

    def fault(self, where: str, what: str) -> None:
        self.findings.append(fault(where, what))


def read_tars(
    source: Pictures, files: list[Path], how: Reading
) -> tuple[list[Record], list[Finding]]:
    """Return a record a sample of the shards, and what is to be told.

    Samples come in the order of the shards and of their first members.
    """
    shards = _Shards(source, how)
    if source.split != "train":
        what = f'split "{source.split}" is asked, but shards name none; name its files as `path`'
        shards.fault(str(source.path), what)
    top = os.path.commonpath([file.parent for file in files])
    found: dict[Path, list[_Sample]] = {}
    for file in files:
        name = Path(os.path.relpath(file, top)).as_posix()
        try:
            found[file] = _samples(file, name, shards)
        except (tarfile.TarError, OSError) as error:
            shards.fault(name, f"no tar file, or a broken one: {error}")
    if not any(found.values()) and not shards.findings:
        shards.fault(str(source.path), "no pictures in these shards")
    spool = Spool(how.cache)
    records = []
    for sample, image, covered in _pictures(found):
        if not image:
            shards.fault(sample.name, "an empty picture (0 bytes)")
            continue
        kept = spool.keep(covered) if covered is not None else None
        path, weight = spool.keep(image), sample.weight
        records.append(
            Record(path, sample.name, sample.captions, sample.origin, weight=weight, mask=kept)
        )
        if how.progress is not None:
            how.progress(sample.name)
    _tell(shards, records)
    return records, [*shards.findings, *spool.told()]


def _pictures(found: dict[Path, list[_Sample]]) -> Iterator[tuple[_Sample, bytes, bytes | None]]:
    """Yield the samples with the bytes of their pictures and masks, as a stream of `datasets`."""
    import datasets

    def rows(shards: list[str]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            with Path(shard).open("rb") as file:
                for number, sample in enumerate(found[Path(shard)]):
                    assert sample.image is not None
                    image = {"path": None, "bytes": sample.image.read(file)}
                    mask = sample.mask.read(file) if sample.mask else None
                    yield {"shard": shard, "number": number, "image": image, "mask": mask}

    if not any(found.values()):
        return
    features = datasets.Features(
        {
            "shard": datasets.Value("string"),
            "number": datasets.Value("int64"),
            "image": datasets.Image(decode=False),
            "mask": datasets.Value("large_binary"),
        }
    )
    shards = {"shards": [str(file) for file in found]}
    stream = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs=shards)
    for row in stream:
        yield found[Path(row["shard"])][row["number"]], row["image"]["bytes"], row["mask"]


# What a shard holds


def _samples(file: Path, shard: str, shards: _Shards) -> list[_Sample]:
    """Return the shard's samples that have no fault; the faults are noted."""
    samples: dict[str, _Sample] = {}
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            _sort_member(member, shard, samples, shards)
        last, end = tar.getmembers()[-1:], tar.offset
    good = []
    with file.open("rb") as opened:
        if what := _end_fault(opened, end):
            behind = f" behind {escaped(last[0].name)}" if last else ""
            shards.fault(shard, f"{what}{behind}; pack or download it again")
        for sample in samples.values():
            try:
                _choose(sample, shards)
                _read_words(opened, sample, shard, shards)
            except _MemberError as error:
                shards.fault(f"{shard}/{error.member}", str(error))
            except UserError as error:
                shards.fault(sample.name, str(error))
            else:
                good.append(sample)
    return good


def _end_fault(shard: BinaryIO, end: int) -> str:
    """Return what is wrong with a shard's end, "" where it is whole. end: bytes of all members.

    `tarfile` takes whatever is no member for the end, so that a shard that was cut between two
    members, or has a second one behind it, would pass for a smaller one.
    """
    shard.seek(end)
    mark = shard.read(_END)
    if mark.strip(b"\0"):
        return "broken: neither a member nor the end"
    if len(mark) < _END:
        return f"cut off: {len(mark)} of the {_END:,} zero bytes that end a tar file"
    while more := shard.read(1 << 20):
        if more.strip(b"\0"):
            return "there is more behind the end, as where shards were put together,"
    return ""


def _sort_member(
    member: tarfile.TarInfo, shard: str, samples: dict[str, _Sample], shards: _Shards
) -> None:
    """Put a member with the sample that its name belongs to."""
    name = member.name.removeprefix("./")
    path, where = PurePosixPath(name), f"{shard}/{escaped(name)}"
    if member.isdir():
        return
    if not is_utf8(name):
        shards.fault(where, NOT_UTF8)
        return
    if path.name.startswith("."):
        shards.aside.append(where)
        return
    if not member.isfile() or member.issparse():
        shards.fault(where, "a link or device and not an ordinary file; pack the file itself")
        return
    if path.is_absolute() or ".." in path.parts:
        shards.fault(where, "a name that leads out of the shard; pack it under a plain name")
        return
    suffix = path.suffix.lower()
    if suffix in _PICKLED:
        what = f"{suffix} files can run code when they are opened, and are never read; pack the "
        shards.fault(where, what + "shard without them")
        return
    stem, dot, kind = path.name.partition(".")
    if not dot:
        shards.aside.append(where)
        return
    is_label = stem.endswith(_LABEL) and suffix in SUFFIXES
    key = path.with_name(stem.removesuffix(_LABEL) if is_label else stem).as_posix()
    sample = samples.setdefault(key, _Sample(f"{shard}/{key}"))
    if (is_label and sample.label) or (not is_label and kind.lower() in sample.fields):
        shards.fault(where, "stands in the shard twice; keep one of them")
        return
    packed = _Member(name, member.offset_data, member.size)
    if is_label:
        sample.label = packed
    else:
        sample.fields[kind.lower()] = packed


def _choose(sample: _Sample, shards: _Shards) -> None:
    """Decide which member is the picture, and which the mask. Raises UserError."""
    fields = sample.fields
    is_picture = {kind: PurePosixPath(f"x.{kind}").suffix in SUFFIXES for kind in fields}
    masks = [fields[k] for k in fields if is_picture[k] and k.split(".")[0] == "mask" and "." in k]
    masks += [sample.label] if sample.label else []
    able = [kind for kind in fields if is_picture[kind] and fields[kind] not in masks]
    told = ", ".join(sorted(fields)) or "none"
    asked = shards.source.image_column
    if asked is not None and (asked not in fields or not is_picture[asked]):
        hint = did_you_mean(asked, able)
        raise UserError(f'no picture "{asked}"{hint}, which image_column asks for; it has: {told}')
    if asked is None and len(able) > 1:
        raise UserError(f"pictures may be in {' or '.join(sorted(able))}; name one as image_column")
    if len(masks) > 1:
        raise UserError(f"has {len(masks)} masks; keep one of them")
    if not able and asked is None:
        other = [k for k in fields if PurePosixPath(f"x.{k}").suffix in UNREADABLE_SUFFIXES]
        why = f"; .{other[0]} cannot be read, pack it as PNG or JPEG" if other else ""
        raise UserError(f"no picture under this name{why}; it has: {told}")
    image = asked or able[0]
    sample.image = fields[image]
    if masks:
        shards.masks.append(sample.name)
        sample.mask = masks[0] if shards.how.mask else None
    for kind, member in fields.items():
        used = kind in (image, *_WORDS, shards.source.caption_column) or member in masks
        if not used:
            shards.unused[kind] = shards.unused.get(kind, 0) + 1


# Words


class _MemberError(UserError):
    """A fault of one member."""

    def __init__(self, member: str, what: str) -> None:
        super().__init__(what)
        self.member = member


def _read_words(file: BinaryIO, sample: _Sample, shard: str, shards: _Shards) -> None:
    """Read a sample's captions and weight. Raises UserError."""
    asked, packed, row = shards.source.caption_column, sample.fields.get("json"), {}
    if packed:
        row = _json(file, packed)
    if asked is None:
        files, keys = (
            [k for k in _TEXTS if k in sample.fields],
            [k for k in CAPTION_COLUMNS if k in row],
        )
    else:
        files, keys = [k for k in sample.fields if k == asked], [k for k in row if k == asked]
        if not files and not keys:
            raise UserError(f'no caption "{asked}", which caption_column asks for')
    if len(files) + len(keys) > 1:
        told = " or ".join([*(f".{k}" for k in files), *(f"{k} in .json" for k in keys)])
        raise UserError(f"captions may be in {told}; name one as caption_column")
    if files:
        member = sample.fields[files[0]]
        text = _caption(file, member, shard, shards)
        sample.captions = (text,) if text else ()
        sample.origin = f"{shard}/{member.name}"
    elif packed and keys:
        try:
            if not (shards.how.uncaptioned and is_blank(row, keys[0])):
                sample.captions = captions_of(row, keys[0])
        except UserError as error:
            raise _MemberError(packed.name, str(error)) from None
        sample.origin = f"{shard}/{packed.name}"
    if packed:
        try:
            sample.weight = weight_of(row.get("weight"))
        except UserError as error:
            raise _MemberError(packed.name, str(error)) from None


def _json(file: BinaryIO, member: _Member) -> dict[str, Any]:
    try:
        return json_object(_text(file, member, _JSON_LIMIT))
    except UserError as error:
        raise _MemberError(member.name, str(error)) from None


def _caption(file: BinaryIO, member: _Member, shard: str, shards: _Shards) -> str:
    text = _text(file, member, 4 * CAPTION_LIMIT + 3)
    if shards.how.uncaptioned and not text.strip():
        return ""
    if what := caption_fault(text):
        raise _MemberError(member.name, what)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        shards.joined.append(f"{shard}/{member.name}")
    return " ".join(lines)


def _text(file: BinaryIO, member: _Member, limit: int) -> str:
    if member.size > limit:
        what = f"{member.size:,} bytes of words; the limit is {limit:,}"
        raise _MemberError(member.name, what)
    try:
        return decode_text(member.read(file))
    except UserError as error:
        raise _MemberError(member.name, str(error)) from None


def _tell(shards: _Shards, records: list[Record]) -> None:
    """Note what was not used."""

    def add(severity: Any, code: str, text: str, names: list[str], advice: str = "") -> None:
        if names:
            shards.findings.append(Finding(severity, code, text, tuple(names), advice))

    add("note", "joined-lines", "several lines joined to one caption", shards.joined)
    add("note", "left-aside", "not pictures and left aside", shards.aside)
    unused = [f".{kind} ({count})" for kind, count in sorted(shards.unused.items())]
    add("note", "unused-fields", "members that are not used", unused)
    if shards.masks and not shards.how.mask:
        shards.findings.append(masks_unused(shards.masks))
    if shards.how.mask and records:
        without = [record.name for record in records if record.mask is None]
        if len(without) == len(records):
            what = "data.mask is set, but there are no masks here; pack them as NAME.mask.png"
            shards.fault(str(shards.source.path), what)
        else:
            add("warning", "no-mask", "no mask, so the whole picture is trained", without)
