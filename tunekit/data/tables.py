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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.data.columns import Columns, choose_columns
from tunekit.data.listing import fault
from tunekit.data.metadata import captions_of, is_blank, weight_of
from tunekit.data.reading import Reading, masks_unused
from tunekit.data.records import Finding, Record, Severity
from tunekit.data.spool import Spool
from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures

_BATCH = 16  # rows in memory at a time
_BUFFER = 1 << 20  # bytes read ahead of a file


@dataclass(frozen=True)
class Rows:
    """A table: how it is opened, and how its rows are called.

    where: the source, for messages. features: of `datasets`, by column. open: columns -> a
    `datasets.IterableDataset` of the rows with their pictures not decoded. names: a name a row.
    root: what paths of pictures must lie in to be opened, "" for nowhere.
    """

    where: str
    features: Mapping[str, Any]
    open: Callable[[Columns], Iterable[Mapping[str, Any]]]
    names: Iterable[str]
    root: str = ""


def read_parquet(
    source: Pictures, files: list[Path], how: Reading
) -> tuple[list[Record], list[Finding]]:
    """Return a record a row of the files, and what is to be told."""
    import pyarrow.parquet as pq

    import datasets

    counts, faults = _row_counts(files)
    if faults:
        return [], faults
    features = datasets.Features.from_arrow_schema(pq.read_schema(files[0]))

    def opened(columns: Columns) -> Iterable[Mapping[str, Any]]:
        used = columns.used()

        def rows(files: list[str]) -> Iterator[dict[str, Any]]:
            # The reader of `datasets` scans ahead and holds several row groups, each often hundreds
            # of megabytes of pictures; this one holds a page and a batch.
            for file in files:
                with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as table:
                    for batch in table.iter_batches(batch_size=_BATCH, columns=used):
                        yield from batch.to_pylist()

        undecoded = {name: datasets.Image(decode=False) for name in columns.pictures()}
        kinds = datasets.Features({name: features[name] for name in used} | undecoded)
        settings = {"files": [str(file) for file in files]}
        stream: Iterable[Mapping[str, Any]] = datasets.IterableDataset.from_generator(
            rows, features=kinds, gen_kwargs=settings
        )
        return stream

    names = (f"{name}:{row}" for name, count in counts.items() for row in range(count))
    return read_rows(Rows(str(source.path), features, opened, names), source, how)


def read_hub(source: Pictures, how: Reading) -> tuple[list[Record], list[Finding]]:
    """Return a record a row of a Hub dataset's split, and what is to be told."""
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
    return read_rows(rows, source, how)


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

    def opened(columns: Columns) -> Iterable[Mapping[str, Any]]:
        found = stream.select_columns(columns.used())
        for column in columns.pictures():
            found = found.cast_column(column, datasets.Image(decode=False))
        undecoded: Iterable[Mapping[str, Any]] = found
        return undecoded

    names = (f"{source.split}:{row}" for row in range(2**62))
    return Rows(name, stream.features, opened, names, root)


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
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
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


# Rows


def read_rows(rows: Rows, source: Pictures, how: Reading) -> tuple[list[Record], list[Finding]]:
    """Return a record a row, its picture kept as a file, and what is to be told."""
    try:
        columns = choose_columns(rows.features, source, how.mask)
    except UserError as error:
        return [], [fault(rows.where, str(error))]
    taken = _Taken(rows, columns, source.split, how)
    try:
        for name, row in zip(rows.names, rows.open(columns), strict=False):
            taken.take(name, row)
            if how.progress is not None:
                how.progress(name)
    except UserError:
        raise
    except Exception as error:  # the network, or a broken file, in the middle of it
        what = f"reading ended after {taken.seen:,} rows: {_why(error)}"
        taken.findings.append(fault(rows.where, what))
    taken.tell()
    return taken.records, taken.findings


class _Taken:
    """What was taken of a table so far."""

    def __init__(self, rows: Rows, columns: Columns, split: str, how: Reading) -> None:
        self.rows, self.columns, self.split, self.how = rows, columns, split, how
        self.spool = Spool(how.cache)
        self.records: list[Record] = []
        self.findings: list[Finding] = []
        self.seen = 0
        self.other_split: dict[str, int] = {}

    def take(self, name: str, row: Mapping[str, Any]) -> None:
        """Make a record of a row, or note its fault."""
        self.seen += 1
        columns = self.columns
        if columns.split:
            its_split = str(row[columns.split] or "train")
            if its_split != self.split:
                self.other_split[its_split] = self.other_split.get(its_split, 0) + 1
                return
        try:
            captions: tuple[str, ...] = ()
            if columns.captions and not self._uncaptioned(row, columns.captions):
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

    def _uncaptioned(self, row: Mapping[str, Any], column: str) -> bool:
        return row[column] is None or (self.how.uncaptioned and is_blank(row, column))

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
            what, are = ("1 row", "is") if count == 1 else (f"{count:,} rows", "are")
            text = f'{what} of the split "{split}" {are} not used'
            self.findings.append(Finding("note", "other-split", text))
        if not self.seen and not self.findings:
            self.findings.append(fault(where, "no rows"))
        if self.seen and self.seen == sum(self.other_split.values()):
            there = ", ".join(sorted(self.other_split))
            what = f'no row of the split "{self.split}"; there are: {there}'
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
        self._tell_masks()
        without = [r.name for r in self.records if not r.captions] if columns.captions else []
        if without:
            text = "rows without a caption, which the template captions"
            self.findings.append(Finding("warning", "no-caption", text, tuple(without)))
        self.findings += self.spool.told()

    def _tell_masks(self) -> None:
        if self.columns.masks_unused:
            self.findings.append(masks_unused(self.columns.masks_unused))
        if not self.how.mask or not self.records:
            return
        if all(record.mask is None for record in self.records):
            what = "data.mask is set, but there are no masks here; give them in a column `mask`"
            self.findings.append(fault(self.rows.where, what))
        elif without := [record.name for record in self.records if record.mask is None]:
            text = "no mask, so the whole picture is trained"
            self.findings.append(Finding("warning", "no-mask", text, tuple(without)))


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
