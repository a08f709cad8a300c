"""Parquet files and Hub datasets, read as one stream through `datasets`, pictures not decoded.

Pictures are in the only column that can hold them, or the one `image_column` names; captions in
`text` or `caption`, or where `caption_column` says, and more of them in that name with _2, _3 ...
(or a list). `weight` is the factor of a picture's loss, `mask` its mask, and `split` says in files
on this disk which rows are used. Anything that may mean two things is a fault that lists the
columns. Rows count from 0, as in every viewer of tables.

Nothing that a table names is opened but files of the same Hub dataset, nothing is unpickled, and
no dataset's script is run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.data.listing import fault
from tunekit.data.metadata import caption_column, captions_of, more_captions, weight_of
from tunekit.data.records import Finding, Record, Severity
from tunekit.data.spool import Spool
from tunekit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures

_BATCH = 16  # rows in memory at a time


@dataclass(frozen=True)
class Columns:
    """Which column is what; None or empty: there is none. unused: all the others."""

    image: str
    captions: str | None
    more: tuple[str, ...]
    mask: str | None
    weight: str | None
    split: str | None
    unused: tuple[str, ...]

    def used(self) -> list[str]:
        """Return the names of the columns that are read."""
        named = (self.image, self.captions, *self.more, self.mask, self.weight, self.split)
        return [name for name in named if name is not None]


@dataclass
class Rows:
    """A table's rows, and how they are called.

    where: the source, for messages. stream: a `datasets.IterableDataset` of known features.
    names: a name a row. root: what paths of pictures must lie in to be opened, "" for nowhere.
    """

    where: str
    stream: Any
    names: Iterator[str]
    root: str = ""


def read_parquet(
    source: Pictures, files: list[Path], mask: bool, progress: Callable[[str], object] | None
) -> tuple[list[Record], list[Finding]]:
    """Return a record a row of the files, and what is to be told; arguments as of source.read."""
    from pyarrow.dataset import ParquetFragmentScanOptions

    import datasets

    counts, faults = _row_counts(files)
    if faults:
        return [], faults
    names = (f"{name}:{row}" for name, count in counts.items() for row in range(count))
    # A row group is often the whole file; without these it would be in memory as a whole.
    slowly = ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
    stream = datasets.load_dataset(
        "parquet",
        data_files={"train": [str(file) for file in files]},
        split="train",
        streaming=True,
        batch_size=_BATCH,
        fragment_scan_options=slowly,
    )
    return read_rows(Rows(str(source.path), stream, names), source, mask, progress)


def read_hub(
    source: Pictures, mask: bool, progress: Callable[[str], object] | None
) -> tuple[list[Record], list[Finding]]:
    """Return a record a row of a Hub dataset's split; arguments as of source.read."""
    name = source.dataset
    assert name is not None
    if Path(name).exists():
        # `datasets` would read the folder instead and say nothing.
        what = f"is a file or folder here too; name it as `path: ./{name}`, or start elsewhere"
        return [], [fault(name, what)]
    try:
        rows = open_dataset(name, f"hf://datasets/{name}", source)
    except UserError as error:
        return [], [fault(name, str(error))]
    return read_rows(rows, source, mask, progress)


def open_dataset(name: str, root: str, source: Pictures) -> Rows:
    """Open the split of a dataset as a stream. Raises UserError in one line.

    name: a Hub id, or a folder laid out like a dataset on the Hub. root: where its files lie.
    """
    import datasets

    try:
        stream = datasets.load_dataset(
            name,
            name=source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        if stream.features is None:
            stream = stream._resolve_features()  # of CSV and the like: read from the first rows
    except Exception as error:  # every layer below has errors of its own
        raise UserError(_why(error)) from error
    names = (f"{source.split}:{row}" for row in range(2**62))
    return Rows(name, stream, names, root)


def _why(error: Exception) -> str:
    """Return an error of `datasets` in one line, with what to do."""
    from datasets.exceptions import DatasetNotFoundError

    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    if isinstance(error, DatasetNotFoundError):
        return f"{first}; a private or gated one needs `hf auth login`"
    if isinstance(error, ConnectionError):
        return f"{first}; check the network, or name files on this disk as `path`"
    return f"cannot be read: {first or type(error).__name__}"


def _row_counts(files: list[Path]) -> tuple[dict[str, int], list[Finding]]:
    """Return the rows of each file by its name, and the faults of files that are no tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    top = os.path.commonpath([file.parent for file in files])
    counts: dict[str, int] = {}
    faults: list[Finding] = []
    schema = None
    for file in files:
        name = Path(os.path.relpath(file, top)).as_posix()
        try:
            with pq.ParquetFile(file) as table:
                counts[name] = table.metadata.num_rows
                columns = {field.name: str(field.type) for field in table.schema_arrow}
        except (OSError, pa.ArrowException) as error:
            first = str(error).strip().splitlines()[0][:200]
            faults.append(fault(name, f"no Parquet file, or a broken one: {first}"))
            continue
        schema = schema or columns
        if columns != schema:
            told = ", ".join(f"{key} ({kind})" for key, kind in columns.items())
            there = ", ".join(f"{key} ({kind})" for key, kind in schema.items())
            what = f"has the columns {told} where {next(iter(counts))} has {there}; "
            faults.append(fault(name, what + "name it as a source of its own"))
    return counts, faults


# Columns


def choose_columns(features: Mapping[str, Any], source: Pictures, mask: bool) -> Columns:
    """Return which column is what. Raises UserError where that is unclear, listing the columns.

    features: of `datasets`, by column. mask: whether masks are wanted.
    """
    kinds = {name: _kind(feature) for name, feature in features.items()}
    told = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    image = _image_column(kinds, source.image_column, told)
    captions = caption_column(kinds, source.caption_column, told)
    masks = [c for c in _picture_columns(kinds) if c != image and _is_mask(c)]
    if mask and len(masks) > 1:
        raise UserError(f"masks may be in {' or '.join(masks)}; keep one of them")
    found = Columns(
        image,
        captions,
        tuple(more_captions(kinds, captions)) if captions else (),
        masks[0] if mask and masks else None,
        "weight" if "weight" in kinds else None,
        "split" if "split" in kinds and source.path is not None else None,
        (),
    )
    return replace(found, unused=tuple(name for name in kinds if name not in found.used()))


def _kind(feature: Any) -> str:
    """Return what a column holds, in a word: "picture", "binary", "string" ..."""
    import datasets

    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return "picture"
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    return "binary" if "binary" in kind else kind


def _is_mask(column: str) -> bool:
    return column == "mask" or column.startswith("mask_")


def _picture_columns(kinds: Mapping[str, str]) -> list[str]:
    return [name for name, kind in kinds.items() if kind in ("picture", "binary")]


def _image_column(kinds: Mapping[str, str], asked: str | None, told: str) -> str:
    if asked is not None:
        if asked not in kinds:
            hint = did_you_mean(asked, kinds)
            raise UserError(f'there is no image_column "{asked}"{hint}; the columns are: {told}')
        if kinds[asked] not in ("picture", "binary"):
            raise UserError(
                f'the image_column "{asked}" holds {kinds[asked]} and no pictures (links and file '
                f"names are not followed); the columns are: {told}"
            )
        return asked
    able = [name for name in _picture_columns(kinds) if not _is_mask(name)]
    found = [name for name in able if kinds[name] == "picture"] or able
    if not found:
        raise UserError(f"no column holds pictures; the columns are: {told}")
    if len(found) > 1:
        raise UserError(f"pictures may be in {' or '.join(found)}; name one as image_column")
    return found[0]


# Rows


def read_rows(
    rows: Rows, source: Pictures, mask: bool, progress: Callable[[str], object] | None
) -> tuple[list[Record], list[Finding]]:
    """Return a record a row, its picture kept as a file, and what is to be told."""
    import datasets

    try:
        columns = choose_columns(rows.stream.features, source, mask)
    except UserError as error:
        return [], [fault(rows.where, str(error))]
    stream = rows.stream.select_columns(columns.used())
    for column in (columns.image, columns.mask):
        if column is not None:
            stream = stream.cast_column(column, datasets.Image(decode=False))
    taken = _Taken(rows, columns, source.split, Spool())
    try:
        for name, row in zip(rows.names, stream, strict=False):
            taken.take(name, row)
            if progress is not None:
                progress(name)
    except UserError:
        raise
    except Exception as error:  # the network, or a broken file, in the middle of it
        what = f"reading ended after {taken.seen:,} rows: {_why(error)}"
        taken.findings.append(fault(rows.where, what))
    taken.tell()
    return taken.records, taken.findings


class _Taken:
    """What was taken of a table so far."""

    def __init__(self, rows: Rows, columns: Columns, split: str, spool: Spool) -> None:
        self.rows, self.columns, self.split, self.spool = rows, columns, split, spool
        self.records: list[Record] = []
        self.findings: list[Finding] = []
        self.seen = 0
        self.other_split: dict[str, int] = {}

    def take(self, name: str, row: Mapping[str, Any]) -> None:
        """Make a record of a row, or note its fault."""
        self.seen += 1
        columns = self.columns
        its_split = (row.get(columns.split) if columns.split else None) or "train"
        if columns.split and its_split != self.split:
            self.other_split[str(its_split)] = self.other_split.get(str(its_split), 0) + 1
            return
        try:
            captions: tuple[str, ...] = ()
            if columns.captions and row[columns.captions] is not None:
                captions = captions_of(row, columns.captions)
            weight = weight_of(row[columns.weight]) if columns.weight else 1.0
            image = self._bytes(row[columns.image], columns.image)
            its_mask = row[columns.mask] if columns.mask else None
            covered = None if its_mask is None else self._bytes(its_mask, str(columns.mask))
        except UserError as error:
            self.findings.append(fault(name, str(error)))
            return
        self.records.append(
            Record(
                self.spool.keep(image),
                name,
                captions,
                name if captions else "template",
                weight=weight,
                mask=self.spool.keep(covered) if covered is not None else None,
            )
        )

    def _bytes(self, value: Mapping[str, Any] | None, column: str) -> bytes:
        """Return a picture's bytes. Raises UserError where the row has none."""
        if value is None:
            raise UserError(f'no picture in "{column}"')
        data, path = value.get("bytes"), value.get("path")
        if data is None and path:
            data = _fetch(path, self.rows.root)
        if not data:
            raise UserError(f'an empty picture in "{column}" (0 bytes)')
        return bytes(data)

    def tell(self) -> None:
        """Note how columns were used, and what was not."""
        columns, where = self.columns, self.rows.where
        for split, count in sorted(self.other_split.items()):
            text = f'{count:,} rows of the split "{split}" are not used'
            self.findings.append(Finding("note", "other-split", text))
        if not self.seen or (self.other_split and not self.records):
            there = f"; there are: {', '.join(sorted(self.other_split))}" if self.seen else ""
            what = f'no row of the split "{self.split}"{there}' if there else "no rows"
            if not any(finding.severity == "error" for finding in self.findings):
                self.findings.append(fault(where, what))
        told = [f"{columns.image} (pictures)"]
        told += [f"{name} (captions)" for name in (columns.captions, *columns.more) if name]
        told += [f"{columns.mask} (masks)"] * bool(columns.mask)
        told += [f"{columns.weight} (weights of the loss)"] * bool(columns.weight)
        self.findings.append(Finding("note", "columns", "columns that are read", tuple(told)))
        if columns.unused:
            text = "columns that are not used"
            advice = "" if columns.captions else "name the one of the captions as caption_column"
            severity: Severity = "note" if columns.captions else "warning"
            finding = Finding(severity, "unused-columns", text, columns.unused, advice)
            self.findings.append(finding)
        without = [r.name for r in self.records if not r.captions] if columns.captions else []
        if without:
            text = "rows without a caption, which the template captions"
            self.findings.append(Finding("warning", "no-caption", text, tuple(without)))
        self.findings += self.spool.told()


def _fetch(path: str, root: str) -> bytes:
    """Return the bytes of a dataset's own file. Raises UserError for any other path.

    A table is somebody else's data: what it names on this disk is none of its business.
    """
    from datasets.utils.file_utils import xopen

    archive = path.split("::")[-1]
    local = root and "://" not in archive and "://" not in root
    within = archive.startswith((f"{root}/", f"{root}@"))
    if local:
        within = Path(archive).resolve().is_relative_to(Path(root).resolve())
    if not root or not within or ".." in Path(archive).parts:
        raise UserError("holds the name of a file and not the picture; such names are not followed")
    try:
        with xopen(path, "rb") as file:
            data: bytes = file.read()
            return data
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
