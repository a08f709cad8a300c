"""What names say: captions and masks in files called as their picture, and folders' repeats."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tunekit.data.listing import MASK_NAME, Folder, caption_fault, read_text
from tunekit.data.reading import escaped, masks_unused
from tunekit.data.records import Finding, Severity
from tunekit.errors import UserError

MOST_REPEATS = 10_000
_CONCEPT = re.compile(r"(?P<repeats>\d+)_(?P<words>\S.*)", re.DOTALL)
_MANY_REPEATS = 500  # more is rather a year, or a number of the file, than meant as repeats
Texts = dict[str, tuple[tuple[str, ...], str]]


def stems(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by what they are without their suffix."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        plain = unicodedata.normalize("NFC", name.removesuffix(PurePosixPath(name).suffix))
        found.setdefault(plain, []).append(name)
    return found


def read_sidecars(folder: Folder, uncaptioned: bool = False) -> Texts:
    """Return captions and where they stand, by picture. uncaptioned: as of `Reading`."""
    by_stem = stems({*folder.pictures, *folder.outside})
    texts: Texts = {}
    joined = []
    for sidecar, path in folder.sidecars.items():
        stem = unicodedata.normalize("NFC", sidecar.removesuffix(path.suffix))
        pictures = by_stem.get(stem, [])
        if len(pictures) != 1:
            folder.fault(sidecar, _whose(folder, stem, pictures, by_stem, "captions"))
            continue
        if pictures[0] in texts:
            other = texts[pictures[0]][1]
            folder.fault(sidecar, f"{pictures[0]} has a caption in {other} too; keep one of them")
            continue
        try:
            text = read_text(path)
        except UserError as error:
            folder.fault(sidecar, str(error))
            continue
        if uncaptioned and not text.strip():
            texts[pictures[0]] = ((), sidecar)
            continue
        if what := caption_fault(text):
            hint = "" if text.strip() else "; write one, or delete the file to use the template"
            folder.fault(sidecar, f"{what}{hint}")
            continue
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) > 1:
            joined.append(sidecar)
        texts[pictures[0]] = ((" ".join(lines),), sidecar)
    if joined:
        folder.note("joined-lines", "several lines joined to one caption", joined)
    return texts


def _whose(
    folder: Folder, stem: str, pictures: list[str], by_stem: Iterable[str], does: str
) -> str:
    if pictures:
        return f"{does} {' and '.join(pictures)} at once; give each its own name"
    why = f"there is no picture of that name{folder.near(stem, by_stem)}; "
    return why + "rename it, or move it out of the folder"


# Repeats


def folder_repeats(folder: Folder, texts: Texts) -> dict[str, int]:
    """Return the repeats that folder names such as ``10_zorp robot`` give their pictures.

    The nearest folder around a picture that is named so counts, that of the source included.
    Pictures without a caption get the folder's words in `texts`.
    """
    concepts = {name: _concept(folder, name) for name in sorted(folder.pictures)}
    named = {at: match for found in concepts.values() if found for at, match in [found]}
    if not named:
        return {}
    first = next(iter(named))
    outside = {name.rpartition("/")[0] for name, found in concepts.items() if not found}
    for plain in sorted(outside - {""}):
        what = f'not named "NUMBER_words" as {first}/ is, whose number is taken as repeats; '
        folder.fault(f"{plain}/", what + "name all folders so, or none")
    for name, found in concepts.items():
        if not found and "/" not in name:
            what = f"lies beside {first}/, whose number is taken as repeats; "
            folder.fault(name, what + "move it into a folder, or rename the folders")
    for at, match in named.items():
        if not 1 <= int(match["repeats"]) <= MOST_REPEATS:
            what = f"{match['repeats']} repeats; 1 to {MOST_REPEATS:,} are possible"
            folder.fault(f"{at}/", f"{what}, or rename the folder")
    repeats = {}
    for name, found in concepts.items():
        if found:
            at, match = found
            # Nothing can be reckoned with a number that is refused above: it has any size.
            repeats[name] = min(int(match["repeats"]), MOST_REPEATS)
            texts.setdefault(name, ((match["words"].strip(),), f"folder {at}"))
    told = [f"{at}/ ({int(match['repeats'])})" for at, match in named.items()]
    text = "visits an epoch that the folders' names give each of their pictures"
    many = max(int(match["repeats"]) for match in named.values()) > _MANY_REPEATS
    advice = "rename the folders if these numbers are something else" if many else ""
    severity: Severity = "warning" if many else "note"
    folder.findings.append(Finding(severity, "folder-repeats", text, tuple(told), advice))
    return repeats


def _concept(folder: Folder, picture: str) -> tuple[str, re.Match[str]] | None:
    """Return the nearest folder around a picture that is named ``10_words``, and the match."""
    for above in PurePosixPath(picture).parents:
        # Of the source only its own name counts; what lies above it is the user's disk.
        name = above.name or os.path.basename(os.path.abspath(folder.root))
        if match := _CONCEPT.fullmatch(name):
            return (above.as_posix() if above.name else escaped(name)), match
    return None


# Masks


def match_masks(folder: Folder, wanted: bool) -> dict[str, Path]:
    """Return each picture's mask: from its line of metadata, or by the mask's name."""
    found = {name: folder.root / row.mask for name, row in folder.rows.items() if row.mask}
    by_stem = stems({*folder.pictures, *folder.outside})
    unused = [] if wanted else list(folder.claimed)
    for mask, path in sorted(folder.masks.items()):
        if mask in folder.claimed:
            continue
        match = MASK_NAME.fullmatch(mask.removesuffix(path.suffix))
        assert match is not None
        stem = unicodedata.normalize("NFC", match["stem"])
        pictures = by_stem.get(stem, [])
        if not wanted:
            unused.append(mask)
        elif len(pictures) != 1:
            folder.fault(mask, _whose(folder, stem, pictures, by_stem, "masks"))
        elif pictures[0] in found:
            other = found[pictures[0]].relative_to(folder.root).as_posix()
            folder.fault(mask, f"{pictures[0]} has a mask in {other} too; keep one of them")
        else:
            found[pictures[0]] = path
    if unused:
        folder.findings.append(masks_unused(unused))
    if wanted:
        _tell_missing(folder, found)
    return found if wanted else {}


def _tell_missing(folder: Folder, masks: dict[str, Path]) -> None:
    used = set(folder.rows) if folder.metadata else set(folder.pictures)
    without = sorted(used - masks.keys())
    if without and not masks and not folder.masks:
        what = "data.mask is set, but there are no masks here; name them NAME.mask.png"
        folder.fault(str(folder.root), what)
    elif without:
        text = "no mask, so the whole picture is trained"
        folder.findings.append(Finding("warning", "no-mask", text, tuple(without)))
