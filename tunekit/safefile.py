"""Whether files are what they seem, before any library opens them: safetensors, a run's folder."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunekit.errors import UserError

# Ten times what the largest models have, by a word in the setting's name.
_MOST = {"layers": 1000, "channels": 40_000, "hidden_size": 200_000, "intermediate": 1_000_000}
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit


def check_header(path: Path) -> int:
    """Return the header's length in bytes; no library has looked at the file when this returns.

    Raises UserError for a pickle, an impossible header, or a file that cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    header = int.from_bytes(first[:8], "little")
    if first[8:] == b"{" and header <= min(size - 8, _HEADER_LIMIT):
        return header
    # A zip of pickles, or a bare one. Only now: these bytes can also begin an honest length.
    if first[:2] == b"PK" or first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise UserError(
            f"{path}: is a pickle, whatever its name says; it could run code when it is read and "
            "is refused: ask for a .safetensors file"
        )
    if first[8:] != b"{":
        raise UserError(f"{path}: is no safetensors file")
    raise UserError(
        f"{path}: is no whole safetensors file: its header claims {header} bytes, the file has "
        f"{size}"
    )


def tensor_names(path: Path) -> list[str]:
    """Return the names of a file's tensors, in order; no tensor is read, nor torch imported.

    Raises UserError for what is not a whole safetensors file.
    """
    length = check_header(path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        missing = 8 + length + end - path.stat().st_size
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}: is damaged: its header cannot be read") from None
    if missing > 0:
        raise UserError(f"{path}: is cut short: {missing} bytes are missing; download it again")
    return sorted(header)


def check_sizes(path: Path, description: Mapping[str, Any]) -> None:
    """Raise UserError where a model's description asks for what no model has.

    Libraries build what is described before they look for its weights: a hundred thousand layers
    would keep them busy for hours.
    """
    for key, value in description.items():
        most = next((most for word, most in _MOST.items() if word in key), None)
        for number in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(number, int) and number > most:
                raise UserError(f"{path}: {key} is {number:.3g}; no model has more than {most:,}")


def check_folder(folder: Path) -> None:
    """Raise UserError where a folder holds anything but files and folders of its own.

    What is written into it would reach through a link to a file that lies elsewhere, and reading
    what is no file may never end.
    """
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here) / name
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # gone meanwhile: another run's, which its lock will tell
                continue
            if stat.S_ISLNK(mode):
                raise UserError(f"{path}: is a link; put the file itself here, or name the folder")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{path}: is neither a file nor a folder; remove it")
