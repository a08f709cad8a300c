"""Everything `data.source` can name, read to records: what is where, and nothing decoded.

    folder.py    a folder of pictures and words; metadata.py reads its metadata
    tables.py    parquet files and Hub datasets, streamed; tars.py: webdataset shards, streamed
    spool.py     their pictures, kept as files in the cache

Several sources become one list. A picture's visits an epoch are its source's `repeats` times those
its folder's name gives; weights are turned into such repeats, and the share that results is told.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from tunekit import hub
from tunekit.data.cache import Cache
from tunekit.data.folder import read_folder
from tunekit.data.listing import fault
from tunekit.data.reading import NOT_UTF8, Progress, Reading, escaped, is_utf8
from tunekit.data.records import Finding, Record
from tunekit.data.sidecars import MOST_REPEATS
from tunekit.errors import some

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures

_FINEST = 100  # more repeats than this are not tried to come nearer to the weights
_NEAR = 0.02  # a share this near to its weight, relatively, is near enough


@dataclass
class Found:
    """What the sources hold.

    label: how the user named them. records: those without a fault of their own, in the order of
    the sources and of names. findings: faults are those of severity "error".
    """

    label: str
    records: list[Record] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """A line for each error, as DataError takes them."""
        return [fault_line(finding) for finding in self.findings if finding.severity == "error"]


def fault_line(finding: Finding) -> str:
    """Return a finding as a fault's line: ``file: what; what to do``."""
    if len(finding.names) == 1:
        told = f"{finding.names[0]}: {finding.text}"
    else:
        told = finding.text + (f": {', '.join(finding.names)}" if finding.names else "")
    return f"{told}; {finding.advice}" if finding.advice else told


def read(
    sources: Sequence[Pictures],
    *,
    mask: bool = False,
    uncaptioned: bool = False,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> Found:
    """Read the sources' pictures and words; folders are listed, tables and shards streamed.

    For the other arguments see `Reading`; where `streamed` says so, who reads holds the cache with
    `using` for as long as the pictures are read. Every fault is a finding; raises UserError where
    the cache cannot keep pictures.
    """
    how = Reading(mask, uncaptioned, progress, cache or Cache())
    labels = _labels(sources)
    found = Found(some(_named(source) for source in sources))
    parts = []
    for source, label in zip(sources, labels, strict=True):
        records, findings = _read_one(source, how)
        if len(sources) > 1:
            records = [replace(r, name=_under(label, r.name)) for r in records]
            findings = [_labelled(finding, label, source) for finding in findings]
        parts.append(records)
        found.findings += findings
    found.findings += _twice(sources)
    repeats, told = _repeats(sources, labels, parts)
    found.findings += told
    for records, factor in zip(parts, repeats, strict=True):
        found.records += [replace(record, repeats=record.repeats * factor) for record in records]
    return found


def streamed(sources: Sequence[Pictures]) -> bool:
    """Return whether pictures of the sources are kept in the cache: all that are in no folder."""
    return any(source.path is None or not Path(source.path).is_dir() for source in sources)


def stream(records: Sequence[Record]) -> Iterator[Record]:
    """Yield `records` through Hugging Face `datasets`, types checked and pictures not decoded."""
    import datasets

    text, number = datasets.Value("string"), datasets.Value("float64")
    features = datasets.Features(
        {
            "path": text,
            "name": text,
            "captions": datasets.List(text),
            "origin": text,
            "repeats": datasets.Value("int64"),
            "weight": number,
            "mask": text,
        }
    )
    if not records:
        return  # `datasets` cannot type a table without rows
    rows = [
        asdict(record) | {"path": str(record.path), "mask": record.mask and str(record.mask)}
        for record in records
    ]
    table = datasets.Dataset.from_list(rows, features=features)
    for row in table.to_iterable_dataset():
        path, mask = Path(row.pop("path")), row.pop("mask")
        captions = tuple(row.pop("captions"))
        yield Record(path=path, captions=captions, mask=mask and Path(mask), **row)


# One source


def _named(source: Pictures) -> str:
    return source.path or source.dataset or ""


def _read_one(source: Pictures, how: Reading) -> tuple[list[Record], list[Finding]]:
    named = _named(source)
    if source.dataset is not None:
        from tunekit.data.tables import read_hub

        return read_hub(source, how)
    if Path(named).is_dir():
        if source.image_column:
            what = f'image_column "{source.image_column}" is for tables and shards, not for folders'
            return [], [fault(named, what)]
        return read_folder(source, how)
    files, what = _files(named)
    if what:
        return [], [fault(named, what)]
    if files[0].suffix.lower() == ".tar":
        from tunekit.data.tars import read_tars

        return read_tars(source, files, how)
    from tunekit.data.tables import read_parquet

    return read_parquet(source, files, how)


def _files(named: str) -> tuple[list[Path], str]:
    """Return the table or shard files that a path names, or what is wrong with it."""
    path = Path(named)
    files = [path] if path.exists() else []
    if not files and "*" in named:
        files = [Path(name) for name in sorted(glob.glob(named))]
        if not files:
            return [], "no file has such a name"
    if not files:
        hint = ""
        if hub.means_id(named):
            hint = f"; a dataset on the Hub is named `source: {{dataset: {named}}}`"
        return [], f"there is no such folder of pictures{hint}"
    if odd := [file for file in files if not is_utf8(str(file))]:
        return [], f"names {escaped(odd[0].name)}: {NOT_UTF8}"
    suffixes = sorted({"folder" if file.is_dir() else file.suffix.lower() for file in files})
    if len(suffixes) > 1:
        return [], f"names files of several kinds ({', '.join(suffixes)}); name one kind"
    if suffixes[0] in (".parquet", ".tar"):
        return files, ""
    if suffixes[0] == "folder":
        return [], "names several folders; name each as a source of its own"
    if str(files[0]).endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        return [], "a compressed shard cannot be read picture by picture; unpack it to .tar"
    return (
        [],
        "a folder of pictures, .parquet file or .tar shard is needed here, this is a file",
    )


# Several sources


def _labels(sources: Sequence[Pictures]) -> list[str]:
    """Return a short name for each source: the end of its path, as long as it must be."""
    labels: list[str] = []
    paths = [PurePath(_named(source)).parts for source in sources]
    for number, parts in enumerate(paths):
        others = {other for at, other in enumerate(paths) if at != number} - {parts}
        length = 1
        while length < len(parts) and any(o[-length:] == parts[-length:] for o in others):
            length += 1
        label = "/".join(part.strip("/") for part in parts[-length:] if part != "/") or "."
        again = sum(old == label or old.startswith(f"{label} (") for old in labels)
        labels.append(f"{label} ({again + 1})" if again else label)
    return labels


def _under(label: str, name: str) -> str:
    """Return a name with its source's label in front; a file's own rows bear it already."""
    is_file = label.endswith((".parquet", ".tar"))
    return name if is_file and name.startswith((f"{label}:", f"{label}/")) else f"{label}/{name}"


def _labelled(finding: Finding, label: str, source: Pictures) -> Finding:
    """Put the source's label before the names of a finding about its files."""
    whole = _named(source)
    names = tuple(name if name == whole else _under(label, name) for name in finding.names)
    return replace(finding, names=names) if names else replace(finding, names=(label,))


def _twice(sources: Sequence[Pictures]) -> list[Finding]:
    read = [_what(source) for source in sources]
    again = [_named(s) for at, s in enumerate(sources) if read[at] in read[:at]]
    if not again:
        return []
    advice = "name it once, with `repeats` or `weight`"
    return [Finding("error", "source-twice", "named twice as a source", tuple(again), advice)]


def _what(source: Pictures) -> Pictures:
    """Return what is read of a source: the same however its path is spelled, and how often."""
    path = source.path and os.path.realpath(source.path)
    return source.model_copy(update={"path": path, "repeats": 1, "weight": None})


def _repeats(
    sources: Sequence[Pictures], labels: Sequence[str], parts: Sequence[Sequence[Record]]
) -> tuple[list[int], list[Finding]]:
    """Return the repeats of each source, and what is to be told of them."""
    visits = [sum(record.repeats for record in records) for records in parts]
    weights = [source.weight for source in sources if source.weight is not None]
    repeats = [source.repeats for source in sources]
    findings = []
    if weights and all(visits):
        repeats, near = weighted_repeats(weights, visits)
        if not near:
            text = f"visits do not follow the weights within {_NEAR:.0%}"
            advice = "give sources `repeats`, or more pictures to those of great weight"
            findings.append(Finding("warning", "weights", text, (), advice))
        if max(repeats) > MOST_REPEATS:
            text = f"these weights would take {max(repeats):,} repeats, and {MOST_REPEATS:,} is the"
            findings.append(Finding("error", "weights", f"{text} most", (), "bring them nearer"))
    if len(sources) == 1:
        return repeats, findings
    total = sum(r * n for r, n in zip(repeats, visits, strict=True))
    told = []
    for at, label in enumerate(labels):
        wanted = f", {weights[at] / sum(weights):.1%} asked" if weights else ""
        share = repeats[at] * visits[at] / total if total else 0
        times = "1 repeat" if repeats[at] == 1 else f"{repeats[at]} repeats"
        count = "1 picture" if len(parts[at]) == 1 else f"{len(parts[at])} pictures"
        told.append(f"{label} ({count}, {times}, {share:.1%}{wanted})")
    return repeats, [*findings, Finding("note", "shares", "share of all visits", tuple(told))]


def weighted_repeats(weights: Sequence[float], visits: Sequence[int]) -> tuple[list[int], bool]:
    """Return the smallest repeats that give each source its share of visits, and whether they do.

    weights: the shares, in proportion. visits: of each source in an epoch without repeats, 1 or
    more. A share is met within 2 % of itself; where no repeats up to 100 for the rarest source
    meet all of them, the nearest are returned.
    """
    wanted = [weight / sum(weights) for weight in weights]
    ratios = [weight / count for weight, count in zip(weights, visits, strict=True)]
    best, nearest = [1] * len(weights), float("inf")
    for rarest in range(1, _FINEST + 1):
        repeats = [max(1, round(ratio / min(ratios) * rarest)) for ratio in ratios]
        total = sum(r * n for r, n in zip(repeats, visits, strict=True))
        off = max(
            abs(r * n / total / share - 1)
            for r, n, share in zip(repeats, visits, wanted, strict=True)
        )
        if off < nearest - 1e-12:
            best, nearest = repeats, off
        if off <= _NEAR:
            break
    return best, nearest <= _NEAR
