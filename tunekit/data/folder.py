"""A folder of pictures and words, listed: pictures, captions, masks, repeats; nothing is opened.

Captions are taken from ``metadata.jsonl`` or ``metadata.csv`` (metadata.py), or else from ``.txt``
or ``.caption`` files of the pictures' names; several lines of one file are one caption. Subfolders
are read; names that begin with a dot are not. Subfolders named as sd-scripts names them,
``10_zorp robot``, give their pictures 10 visits an epoch and, where no file has words for them,
the caption "zorp robot"; then every picture must lie in such a folder, at whatever depth. The
folder itself may be named so too.

``NAME.mask.png`` and ``NAME-masklabel.png`` are masks of the picture NAME, never pictures.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tunekit.data.listing import OUTSIDE, Folder, list_folder
from tunekit.data.metadata import read_metadata
from tunekit.data.reading import Reading
from tunekit.data.records import Finding, Record
from tunekit.data.sidecars import folder_repeats, match_masks, read_sidecars

if TYPE_CHECKING:
    from tunekit.schema_source import Pictures


def read_folder(pictures: Pictures, how: Reading) -> tuple[list[Record], list[Finding]]:
    """Return a record a picture of the folder `pictures.path`, by name, and what is to be told.

    The records are those that have no fault of their own.
    """
    assert pictures.path is not None
    folder = Folder(Path(pictures.path))
    list_folder(folder)
    if folder.metadata:
        read_metadata(folder, pictures, how.uncaptioned)
        texts = {name: (row.captions, row.origin) for name, row in folder.rows.items()}
    else:
        _metadata_keys(folder, pictures)
        texts = read_sidecars(folder, how.uncaptioned)
        for name in sorted(folder.outside):
            folder.fault(name, OUTSIDE)
    repeats = folder_repeats(folder, texts)
    masks = match_masks(folder, how.mask)
    _tell(folder)
    left_out = {name for names in folder.other_split.values() for name in names}
    records = [
        Record(
            folder.pictures[name],
            name,
            captions,
            origin,
            repeats.get(name, 1),
            row.weight if row else 1.0,
            masks.get(name),
        )
        for name in sorted(folder.pictures)
        for captions, origin in [texts.get(name, ((), "template"))]
        for row in [folder.rows.get(name)]
        if name not in left_out and (row or not folder.metadata)
    ]
    if not records and not any(f.severity == "error" for f in folder.findings):
        folder.fault(pictures.path, _nothing(folder))
    return records, folder.findings


def _nothing(folder: Folder) -> str:
    tables = [name for name in folder.aside if name.endswith((".parquet", ".tar"))]
    if tables:
        suffix = PurePosixPath(tables[0]).suffix
        return f"no pictures here, but {tables[0]}; name the files: {folder.root}/*{suffix}"
    found = f"(it holds {', '.join(folder.aside[:5])})" if folder.aside else "(it is empty)"
    return f"no pictures here {found}; PNG, JPEG and WebP files are usual"


def _metadata_keys(folder: Folder, pictures: Pictures) -> None:
    """Refuse keys of the source that only metadata could fulfil."""
    where = str(folder.root)
    if pictures.split != "train":
        folder.fault(where, f'split "{pictures.split}" is asked, but there is no metadata here')
    if pictures.caption_column:
        what = f'caption_column "{pictures.caption_column}" is set, but there is no metadata here'
        folder.fault(where, what)


def _tell(folder: Folder) -> None:
    """Note what was left aside, and names that other disks cannot tell apart."""
    alike: dict[str, list[str]] = {}
    for name in sorted({*folder.pictures, *folder.sidecars}):
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            # A warning and not a fault: here every one of them is read, and with its own caption.
            text = "names that differ in case only, which the disks of Windows and macOS take for "
            text += "one file"
            advice = "rename them before the folder is copied or unpacked elsewhere"
            folder.findings.append(Finding("warning", "case-only", text, tuple(names), advice))
    for split, names in sorted(folder.other_split.items()):
        text = f'pictures of the split "{split}" that are not used ({len(names)})'
        folder.note("other-split", text, names)
    if folder.aside:
        folder.note("left-aside", "not pictures and left aside", sorted(folder.aside))
