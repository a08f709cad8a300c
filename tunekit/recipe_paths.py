"""The paths of a recipe: looked for on this disk, and written as they are found."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunekit import hub, schema
from tunekit.errors import did_you_mean
from tunekit.modelfolder import names_file
from tunekit.recipe_faults import extra, fields, shown
from tunekit.recipe_source import Fault, Key, Source
from tunekit.schema_tokens import EMBEDDING

_TABLES = (".parquet", ".tar")


def find_paths(source: Source, sections: Mapping[str, type[schema.Section]]) -> Iterator[Fault]:
    """Replace each path in the tree by where it is found; yield a fault for each that is not."""
    for name, section in sections.items():
        for at, values in sections_at(source.tree, name.split(".") if name else []):
            for key, field in fields(section):
                kind = extra(field, "x-path")
                for place, text in texts_at((*at, key), values.get(key)) if kind else ():
                    found = yield from _find_path(source, place, text, kind)
                    _put(source.tree, place, found)


def sections_at(
    tree: Any, names: Sequence[str], at: Key = ()
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yield each section of values called `names`, lists of sections included, with its key."""
    if isinstance(tree, list):
        for number, item in enumerate(tree):
            yield from sections_at(item, names, (*at, number))
    elif isinstance(tree, dict) and names:
        yield from sections_at(tree.get(names[0]), names[1:], (*at, names[0]))
    elif isinstance(tree, dict):
        yield at, tree


def texts_at(key: Key, value: Any) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str) and value:
        yield key, value
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from texts_at((*key, number), item)


def _put(tree: Any, key: Key, value: str) -> None:
    for part in key[:-1]:
        tree = tree[part]
    tree[key[-1]] = value


def _find_path(source: Source, key: Key, text: str, kind: str) -> Generator[Fault, None, str]:
    """Return the path as it is found, or `text` where it is not; yield what is wrong with it."""
    if kind == "embedding" and not text.endswith(EMBEDDING):
        return text  # words
    if hub.impossible(text):
        yield source.fault(key, f"{shown(text)}: no disk has a file of such a name")
        return text
    roots = _roots(source.place(key).folder)
    found = _first_found(text, roots, kind)
    if found is not None:
        if kind == "embedding" and Path(found).is_dir():
            yield source.fault(key, f'"{text}" is a folder; it must be a file')
        if kind == "folder" and not Path(found).is_dir():
            yield source.fault(key, f'"{text}" is a file; it must be a folder')
        if kind == "pictures" and not Path(found).is_dir() and not found.endswith(_TABLES):
            problem = f'"{text}" holds no pictures; give a folder, a .parquet file or a .tar shard'
            yield source.fault(key, problem)
        return found
    if kind != "model" or not _may_be_remote(text):
        yield source.fault(key, _not_found(text, roots, kind))
    return text


def _roots(folder: Path | None) -> list[Path]:
    """Return where a path is looked for: here, then from the file's folder up to its project's."""
    if folder is None:
        return [Path()]
    folder = Path(os.path.abspath(folder))
    return [Path(), folder, *folder.parents[:2]]


def _first_found(text: str, roots: Sequence[Path], kind: str) -> str | None:
    """Return the path as it is written from the working directory, absolute if outside of it."""
    path = hub.as_path(text)
    for root in roots:
        if text != schema.BUNDLED and _exists(root / path, kind):
            if root == Path() and str(path) == text:
                return text
            whole = Path(os.path.abspath(root / path))
            return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)
    return None


def _exists(path: Path, kind: str) -> bool:
    if kind == "pictures" and "*" in path.name:
        return path.parent.is_dir() and any(path.parent.glob(path.name))
    return path.exists()


def _may_be_remote(text: str) -> bool:
    if text == schema.BUNDLED:
        return True
    return hub.means_id(text) and not names_file(text)


def _not_found(text: str, roots: Sequence[Path], kind: str) -> str:
    looked = list(dict.fromkeys(os.path.abspath(root / hub.as_path(text)) for root in roots))
    is_file = kind == "embedding" or (kind == "model" and names_file(text))
    what = "file" if is_file else "folder"
    what = "folder or file" if kind in ("part", "pictures") else what
    problem = f'there is no {what} "{text}" (looked for {", ".join(looked)})'
    if kind in ("folder", "embedding"):
        return problem
    if kind == "part":
        fetched = f"; fetch one from the Hub with `hf download {text} --local-dir FOLDER`"
        return problem + (fetched if hub.means_id(text) else "")
    if kind == "pictures":
        on_hub = f"; a dataset on the Hub is written dataset: {text}"
        return problem + (on_hub if hub.is_id(text) else "")
    near = did_you_mean(text, [schema.BUNDLED])
    return f"{problem}{near}; a Hub id has the form owner/name"
