"""Adapters merged into a base: a diffusers folder that draws as base and adapters do together."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError, some
from tunekit.files import output, sources
from tunekit.files.adapter import AdapterFile, metadata_of
from tunekit.files.names import SOME, Names, Place
from tunekit.files.sources import Entry, Source, Weights
from tunekit.files.stream import Form, write
from tunekit.progress import Reporter, Silent
from tunekit.schema import Base
from tunekit.wholefile import check_room, disk_errors, to_disk, whole_folder

if TYPE_CHECKING:
    from torch import Tensor

_INDEX_FILE = "model_index.json"
_KINDS = (".json", ".txt", ".model")
_WEIGHTS_INDEX = ".safetensors.index"
_ROOM_BESIDE = 10_000_000  # bytes: tokenizers and descriptions


@dataclass(frozen=True)
class Merged:
    """What `merge` did. modules: how many weights changed. norm: of all changes. lost: norm of what
    the weights' number format rounded away of them."""

    path: Path
    base: str
    adapters: tuple[str, ...]
    modules: int
    norm: float
    lost: float
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what was done, for people."""
        off = self.lost / self.norm if self.norm else 0.0
        return [
            *self.remarks,
            f"{self.path}: {self.base} with {', '.join(self.adapters)}",
            f"{self.modules} weights changed; their number format rounds {off:.1e} of the change",
        ]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {**vars(self), "path": str(self.path)}


def merge(
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    base: str | None = None,
    config: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Merged:
    """Write the base with every adapter added at its weight, as a diffusers folder.

    Each change is that of the untouched base, so their order does not matter. base, config: as
    `sources.find_base`. dtype: of what is written; None: each tensor keeps its own. Text encoders
    are written with the names, tokenizers with the files, that older libraries look for. Raises
    UserError where an adapter does not fit; the folder appears whole or not at all.
    """
    if dtype is not None:
        output.check_options("diffusers", dtype)
    first = adapters[0][0]
    found = sources.find_base(base, metadata_of(first), first, config)
    chosen = Base.model_validate(found.model_dump() | {"variant": variant})
    family = sources.outline(chosen)
    names = Names(family)
    files = [(AdapterFile(path, names), weight) for path, weight in adapters]
    weights = Weights(chosen, family, names)
    origin = weights.folder.weights or weights.folder.path
    _check_out(out, weights.folder.path, [origin, *(path for path, _ in adapters)], overwrite)
    for file, _ in files:
        _check_fits(file, weights)
    work = _Work(files, weights, names, dtype)
    components = family.components()
    total = sum(len(e) for held in weights.entries.values() for _, e in held)
    needed = work.bytes() + _bytes_copied(weights, set(names.folders.values()), components)
    check_room(out, needed + _ROOM_BESIDE, "make room, or name a folder on another disk")
    with disk_errors(out, needed=needed), whole_folder(out) as partial:
        with (reporter or Silent()).stage("merge", total) as tick:
            for component, held in weights.entries.items():
                work.component(partial / names.folders[component], held, tick)
        _copy_rest(weights, partial, set(names.folders.values()), components, work.remarks)
        for path in (*partial.rglob("*"),):
            to_disk(path)
    told = tuple(f"{path.name} x {weight:g}" for path, weight in adapters)
    remarks = [*weights.remarks, *(r for f, _ in files for r in f.remarks), *work.remarks]
    return Merged(
        out,
        family.label,
        told,
        len(work.changed),
        math.sqrt(work.squared),
        math.sqrt(work.lost),
        tuple(remarks),
    )


def _check_out(out: Path, base: Path, read: Sequence[Path], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder (or --into-adapter for a file)")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out}: is there already; --overwrite replaces it")
        if not (out / _INDEX_FILE).is_file():
            raise UserError(f"{out}: is no model's folder, which is all that is replaced")
    inside = out.resolve()
    if inside == base.resolve() or base.resolve() in inside.parents:
        raise UserError(f"--out: {out} is the base's own folder; name another one")
    for path in read:
        if inside in path.resolve().parents:
            raise UserError(
                f"--out: {out} holds {path}, and would be replaced; name another folder"
            )


def _check_fits(file: AdapterFile, weights: Weights) -> None:
    """Raise UserError where a file changes what the base's files do not hold."""
    missing = []
    for place, factors in file.kinds().items():
        wanted = (["weight"] if factors - {"diff_b", "alpha"} else []) + (
            ["bias"] if "diff_b" in factors else []
        )
        missing += [f"{'.'.join(place)}.{w}" for w in wanted if not weights.holds(place, w)]
    if missing:
        raise UserError(f"{file.path}: {weights.label} has no {some(missing, SOME)} in its files")


@dataclass
class _Work:
    """One merge: what is added to which weights."""

    files: Sequence[tuple[AdapterFile, float]]
    weights: Weights
    names: Names
    dtype: str | None
    remarks: list[str] = field(default_factory=list)
    changed: set[tuple[Place, str]] = field(default_factory=set)
    squared: float = 0.0
    lost: float = 0.0

    def bytes(self) -> int:
        """Return how many bytes of weights it writes."""
        held = [one for source in self.weights.entries.values() for one in source]
        return sum(self._form(file, entry).bytes for file, entries in held for entry in entries)

    def component(
        self, folder: Path, held: Sequence[tuple[Source, list[Entry]]], tick: Any
    ) -> None:
        """Write a component's weights and its configuration."""
        folder.mkdir()
        source = held[0][0].path.parent
        self._copy_descriptions(source, folder)
        placed: dict[str, str] = {}
        size = 0
        for file, entries in held:
            name = self._plain_name(file.path.name)
            forms = {e.wide: self._form(file, e) for e in entries}
            if len(forms) != len(entries):
                raise UserError(f"{file.path}: holds two tensors under names for one")
            write(folder / name, forms, self._tensors(file, entries, tick), {"format": "pt"})
            placed |= dict.fromkeys(forms, name)
            size += sum(form.bytes for form in forms.values())
        if len(held) > 1:
            stem = self._plain_name(held[0][0].path.name).partition("-0")[0]
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
            (folder / f"{stem}{_WEIGHTS_INDEX}.json").write_text(json.dumps(index, indent=2))

    def _plain_name(self, name: str) -> str:
        variant = self.weights.base.variant
        return name.replace(f".{variant}", "", 1) if variant else name

    def _form(self, file: Source, entry: Entry) -> Form:
        form = file.forms[entry.name]
        if self.dtype is None or not form.kind.is_floating_point:
            return form
        return Form(output.FORMATS[self.dtype], form.shape)

    def _tensors(
        self, file: Source, entries: list[Entry], tick: Any
    ) -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            yield entry.wide, self._merged(file, entry)
            tick()

    def _merged(self, file: Source, entry: Entry) -> Tensor:
        """Return a tensor with all that is added to it, in the format that is written."""
        tensor = file.read(entry.name)
        change = self._change(entry, tensor)
        kind = self._form(file, entry).kind
        whole = tensor if change is None else tensor.float() + change
        cast = whole.to(kind)
        if tensor.is_floating_point() and not bool(cast.float().isfinite().all()):
            raise UserError(
                f"{'.'.join(entry.place or ('', entry.name))}: becomes NaN or more than "
                f"{str(kind).removeprefix('torch.')} can hold; a lower weight, or --dtype fp32"
            )
        if change is not None:
            self.squared += float(change.norm()) ** 2
            if cast is not whole:
                self.lost += float((cast.float() - whole).norm()) ** 2
        return cast

    def _change(self, entry: Entry, tensor: Tensor) -> Tensor | None:
        if entry.place is None:
            return None
        total: Tensor | None = None
        wide = tensor.float()
        for file, weight in self.files:
            if entry.place not in file.places:
                continue
            parts = file.read(entry.place)
            if entry.which == "bias":
                if "diff_b" not in parts.factors:
                    continue
                change = parts.factors["diff_b"].float() * weight
            elif parts.factors.keys() - {"diff_b"}:
                change = file.change(entry.place, parts, wide, weight)
            else:
                continue
            total = change if total is None else total + change
            self.changed.add((entry.place, entry.which))
        return total

    @staticmethod
    def _copy_descriptions(source: Path, folder: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.suffix in _KINDS and _WEIGHTS_INDEX not in path.name and path.is_file():
                shutil.copyfile(path, folder / path.name)


def _bytes_copied(weights: Weights, written: set[str], components: dict[str, Any]) -> int:
    """Return how many bytes the weights take that no adapter changes."""
    source, variant = weights.folder.path, weights.base.variant
    here = [name for name in components if name not in written and name not in weights.others]
    files = [path for name in here for path in sources.weight_files(source / name, variant)]
    forms = [form for held in weights.others.values() for form in held.forms.values()]
    return sum(path.stat().st_size for path in files) + sum(form.bytes for form in forms)


def _copy_rest(
    weights: Weights, out: Path, written: set[str], components: dict[str, Any], remarks: list[str]
) -> None:
    """Copy what no adapter changes: VAE, tokenizers, scheduler; and say what is left out."""
    source, variant = weights.folder.path, weights.base.variant
    index = dict(weights.folder.model_index)
    left = []
    for name, value in weights.folder.model_index.items():
        if not isinstance(value, list) or value[:1] == [None] or name in written:
            continue
        bare = name.startswith(("tokenizer", "scheduler", "feature_extractor"))
        if not (bare or name in components) or not (source / name).is_dir():
            index[name] = [None, None]
            left.append(name)
            continue
        (out / name).mkdir()
        _Work._copy_descriptions(source / name, out / name)
        if name in weights.others:
            held = weights.others[name]
            tensors = ((key, held.read(key)) for key in held.forms)
            write(out / name / held.path.name, held.forms, tensors, {"format": "pt"})
        elif name in components:
            for path in sources.weight_files(source / name, variant):
                plain = path.name.replace(f".{variant}", "", 1) if variant else path.name
                shutil.copyfile(path, out / name / plain)
            _copy_index(source / name, out / name, variant)
        if name.startswith("tokenizer"):
            _spell_out(out / name)
    if "safety_checker" in left and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False  # else diffusers warns of what is not there
    if left:
        remarks.append(f"{', '.join(left)}: left out, since drawing does not need it")
    (out / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_index(source: Path, folder: Path, variant: str | None) -> None:
    for path in source.glob(f"*{_WEIGHTS_INDEX}*.json"):
        text = path.read_text(encoding="utf-8")
        plain = f".{variant}" if variant else ""
        if (plain in path.name) == bool(variant):
            name = path.name.replace(plain, "", 1)
            (folder / name).write_text(text.replace(plain, "") if plain else text)


def _spell_out(folder: Path) -> None:
    """Write vocab.json and merges.txt, which older libraries read, where they are not there."""
    whole, words, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() or (words.is_file() and merges.is_file()):
        return
    try:
        model = json.loads(whole.read_text(encoding="utf-8"))["model"]
        if model.get("type") != "BPE":
            return
        pairs = [p if isinstance(p, str) else " ".join(p) for p in model["merges"]]
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{whole}: is damaged: it names no words") from None
    words.write_text(vocabulary, encoding="utf-8")
    merges.write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
