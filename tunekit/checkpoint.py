"""Tensors on disk: safetensors and JSON only, whole or not at all, verified before they are used.

A checkpoint is a folder with one `NAME.safetensors` for each set of tensors, `meta.json`, and
`manifest.json` with every file's size and SHA-256. It is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.safefile import check_header
from tunekit.wholefile import check_room, disk_errors, to_disk, whole_file, whole_folder

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
META = "meta.json"
_FORMAT = 1
_ROOM_BESIDE = 100_000  # bytes of the manifest and facts
_ENTRY = 160  # bytes that a header has of a tensor beside its name, at most
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a verified checkpoint folder holds: sets of tensors by name, and a JSON object."""

    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> Path:
    """Write a checkpoint and return its folder; one that stands there already is replaced.

    `tensors`: sets of tensors by name, such as {"adapter": ...}; `meta`: anything JSON can hold.
    The folder appears under its name only when every byte of it is on the disk; until then the old
    one stays. Raises UserError with the path and the bytes needed where it cannot be written, and
    before anything is where the disk has not as many.
    """
    folder = Path(folder)
    needed = sum(_bytes(group) for group in tensors.values())
    beside = _ROOM_BESIDE + sum(_described(group) for group in tensors.values())
    check_room(folder, needed + beside, "make room, or keep fewer checkpoints")
    with _disk_errors(folder, needed), whole_folder(folder) as partial:
        for name, group in tensors.items():
            assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
            _write_tensors(partial / f"{name}.safetensors", group, None)
        _write_json(partial / META, meta)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.iterdir())
        }
        _write_json(partial / MANIFEST, {"format": _FORMAT, "files": files})
    return folder


def steps(parent: Path) -> list[Path]:
    """Return the finished checkpoint folders `step-N` in `parent`, the lowest step first.

    Half-written ones have another name and are not among them. Nothing is verified: see `read`.
    """
    found = [
        (int(match[1]), path)
        for path in (parent.iterdir() if parent.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after; UserError for another name."""
    if (found := _STEP.fullmatch(folder.name)) is None:
        raise UserError(f"{folder}: is no checkpoint: those are called step-N")
    return int(found[1])


def read(folder: Path) -> Checkpoint:
    """Return a checkpoint, every byte of it checked against the manifest before any is used.

    Raises UserError that names the file which is missing, cut short, changed or no tensors at all.
    """
    folder = Path(folder)
    files = verify(folder)
    tensors = {
        name.removesuffix(".safetensors"): read_safetensors(folder / name)[0]
        for name in files
        if name.endswith(".safetensors")
    }
    return Checkpoint(tensors, _read_json(folder / META))


def verify(folder: Path) -> list[str]:
    """Check a checkpoint's files against its manifest and return their names.

    Raises UserError that names the file which is missing, changed or may not be read.
    """
    with disk_errors(folder, "read"):
        return _verify(folder)


def _verify(folder: Path) -> list[str]:
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: is no checkpoint: it has no {MANIFEST}")
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{folder / MANIFEST}: format {manifest.get('format')} is not one I read")
    files = manifest.get("files")
    if not isinstance(files, dict) or META not in files:
        raise UserError(f"{folder / MANIFEST}: lists no files")
    for name, facts in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not isinstance(facts, dict):
            raise UserError(f'{folder / MANIFEST}: "{name}" is no file of this checkpoint')
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; this checkpoint is damaged, take another one")
        size = path.stat().st_size
        if size != facts.get("bytes"):
            raise UserError(
                f"{path}: has {size} bytes instead of {facts.get('bytes')}; this checkpoint is "
                "damaged, take another one"
            )
        if sha256(path) != facts.get("sha256"):
            raise UserError(
                f"{path}: its content has changed since it was written (SHA-256 differs); this "
                "checkpoint is damaged, take another one"
            )
    return sorted(files)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to one file, whole or not at all, with the permissions the umask gives.

    Raises UserError with the path and the bytes needed where the disk refuses.
    """
    path = Path(os.path.realpath(path))  # write through a link, as opening the file would
    with _disk_errors(path, _bytes(tensors)), whole_file(path) as part:
        _write_tensors(part, tensors, metadata)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _described(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of a file's header, at most."""
    return sum(_ENTRY + len(name.encode()) for name in tensors)


def _write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> None:
    from safetensors.torch import save_file

    with path.open("wb"):
        mode = path.stat().st_mode
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, dict(metadata) if metadata else None)
    path.chmod(mode)  # safetensors leaves its files readable by the owner alone
    to_disk(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors, on the CPU and in memory of their own, and its metadata.

    Raises UserError for what is not a whole safetensors file; a pickle is never opened as one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            # A clone, because the library maps the file and the file may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn a disk's refusal into one line with the path and the bytes needed."""
    from safetensors import SafetensorError

    with disk_errors(path, needed=needed):
        try:
            yield
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())) from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
    to_disk(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def sha256(path: Path) -> str:
    """Return a file's SHA-256 as it stands in manifests, in hexadecimal; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
