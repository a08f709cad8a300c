"""A recipe's text as plain values, each with the place it came from: file and line, or override."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tunekit import hub
from tunekit.errors import UserError, did_you_mean
from tunekit.redaction import secret_in, without_secrets

Key = tuple[str | int, ...]

MAX_BYTES = 64_000
MAX_DEPTH = 20
MAX_NODES = 20_000
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
_CORE = "tag:yaml.org,2002:"
_TEXT = {_CORE + "str", _CORE + "timestamp"}
_NUMBERS = {_CORE + "int", _CORE + "float"}
_SCALARS = _TEXT | _NUMBERS | {_CORE + "bool", _CORE + "null"}


@dataclass(frozen=True)
class Place:
    """Where a key stands. `folder` is the file's; None where there is no file."""

    name: str
    line: int | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe; `key` is dotted, '' for the whole."""

    place: Place
    key: str
    problem: str

    def __str__(self) -> str:
        whole = ": ".join(part for part in (str(self.place), self.key, self.problem) if part)
        return without_secrets(whole)


class RecipeError(UserError):
    """A recipe that is refused. `faults` holds every one found; the message has a line for each."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults
        files = list(dict.fromkeys(fault.place.name for fault in faults))
        order = sorted(
            faults,
            key=lambda f: (f.place.folder is None, files.index(f.place.name), f.place.line or 0),
        )
        self.faults: tuple[Fault, ...] = tuple(dict.fromkeys(order))
        super().__init__("\n".join(str(fault) for fault in self.faults))


@dataclass
class Source:
    """A tree of plain values, the place of each of its keys, and what was already found wrong.

    `layers` are the names of the files it was read from; each extends the one that follows.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    layers: tuple[str, ...] = ()

    def place(self, key: Key) -> Place:
        """Return the place of `key`, or of the nearest section around it."""
        while key not in self.places:
            assert key, "the whole has a place"
            key = key[:-1]
        return self.places[key]

    def inherits(self, key: Key, other: Key) -> bool:
        """Say whether `key` stands in a recipe beneath the one, or the override, with `other`."""
        one, over = self.place(key).name, self.place(other).name
        if one not in self.layers:
            return False
        return over not in self.layers or self.layers.index(over) < self.layers.index(one)

    def fault(self, key: Key, problem: str) -> Fault:
        """Return the fault that `key` has `problem`, at its place."""
        return Fault(self.place(key), dotted(key), problem)

    def secrets(self) -> Iterator[Fault]:
        """Yield a fault for each text that holds a secret: every file of a run would repeat it."""
        for key, text in _texts(self.tree, ()):
            if what := secret_in(text):
                yield self.fault(
                    key,
                    f"holds {what}, which every file of the run would repeat: take it out; tokens "
                    "are read from HF_TOKEN or from where `hf auth login` keeps them",
                )

    def lay_over(self, under: Source) -> Source:
        """Return `under` with everything that stands here put over it, section by section."""
        merged = Source(copy.deepcopy(under.tree), dict(under.places), under.faults + self.faults)
        merged.layers = self.layers + under.layers
        merged.places[()] = self.places.get((), under.place(()))
        _merge(merged, merged.tree, self, self.tree, ())
        return merged


def _merge(into: Source, tree: dict[str, Any], over: Source, values: Any, key: Key) -> None:
    for name, value in values.items():
        here = (*key, name)
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            if here in over.places:
                into.places[here] = over.places[here]
            _merge(into, tree[name], over, value, here)
            continue
        for stale in [k for k in into.places if k[: len(here)] == here]:
            del into.places[stale]
        into.places |= {k: p for k, p in over.places.items() if k[: len(here)] == here}
        tree[name] = copy.deepcopy(value)


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, (*key, name))


def dotted(key: Key) -> str:
    """Return `key` as people write it: ``evaluate.prompts.0``."""
    return ".".join(str(part) for part in key)


def from_file(path: Path) -> Source:
    """Read a recipe file and what it extends.

    Raises RecipeError where the text cannot be read as YAML; faults that leave the rest readable
    (a key written twice, a tag) are collected in the result.
    """
    return _from_file(path, ())


def _from_file(path: Path, trail: tuple[Path, ...]) -> Source:
    source = _Reader.of_text(_text(path), Place(str(path), None, path.parent)).source
    extends = source.tree.pop("extends", None)
    if extends is None:
        return source
    problem = None
    if not isinstance(extends, str) or hub.impossible(extends):
        problem = f"must be the name of another recipe file, not {extends!r:.60}"
    else:
        other = path.parent / hub.as_path(extends)
        seen = (*trail, path.resolve())
        if other.resolve() in seen:
            names = " -> ".join(p.name for p in (*seen, other))
            problem = f'"{extends}" leads back here ({names})'
        elif not other.is_file():
            problem = f'there is no file "{extends}" beside this recipe{_near(other)}'
    if problem is not None:
        raise RecipeError([*source.faults, source.fault(("extends",), problem)])
    return source.lay_over(_from_file(other, seen))


def _near(path: Path) -> str:
    folder = path.parent
    return did_you_mean(
        path.name, [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    )


def _text(path: Path) -> str:
    place = Place(str(path), None, path.parent)
    try:
        if path.is_dir():
            _refuse(place, "is a folder; a recipe is a .yaml file")
        if not path.exists():
            _refuse(place, f"there is no such recipe{_near(path)}")
        if path.stat().st_size > MAX_BYTES:
            _refuse(place, f"is {path.stat().st_size} bytes; a recipe has at most {MAX_BYTES}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        _refuse(place, f"is not UTF-8 text (byte {exc.start})")
    except OSError as exc:
        _refuse(place, f"cannot be read: {exc.strerror}")


def _refuse(place: Place, problem: str) -> NoReturn:
    raise RecipeError([Fault(place, "", problem)])


class _Reader:
    """Walks YAML nodes, because only they know their lines; nothing but plain values comes out."""

    def __init__(self, place: Place) -> None:
        self.yaml = YAML(typ="safe", pure=True)
        self.base = place
        self.source = Source(places={(): place})
        self.nodes = 0

    @classmethod
    def of_text(cls, text: str, place: Place) -> _Reader:
        reader = cls(place)
        node = reader.compose(text)
        if node is None:
            _refuse(place, "is empty")
        if not isinstance(node, MappingNode) or node.tag != _CORE + "map":
            _refuse(place, "is not a recipe: it must hold keys such as `base:` and `data:`")
        reader.source.tree = reader.value(node, ())
        reader.source.layers = (place.name,)
        return reader

    def compose(self, text: str) -> Node | None:
        """Return the text's only document. Raises RecipeError for what is not YAML."""
        # ruamel's time grows with the square of open brackets: refuse before it starts.
        opened = itertools.accumulate(_BRACKETS.get(character, 0) for character in text)
        if max(opened, default=0) > MAX_DEPTH:
            _refuse(self.base, "is nested too deeply")
        try:
            node: Node | None = self.yaml.compose(text)
        except MarkedYAMLError as exc:
            line = exc.problem_mark.line if exc.problem_mark else 0
            problem = str(exc.problem)
            if r"\t" in problem or "\t" in "".join(text.splitlines()[line : line + 1]):
                problem = "holds a tab; YAML is indented with spaces only"
            _refuse(self.at(line), f"not YAML: {problem}")
        except YAMLError as exc:
            line = text.count("\n", 0, getattr(exc, "position", 0) or 0)
            _refuse(self.at(line), f"not YAML: {str(exc).splitlines()[0]}")
        except RecursionError:
            _refuse(self.base, "is nested too deeply")
        except KeyError:  # the library looks up the version that a %YAML line says
            _refuse(self.base, "says a version of YAML that is unknown: leave its %YAML line out")
        return node

    def at(self, line: int) -> Place:
        if self.base.folder is None:
            return self.base
        return Place(self.base.name, line + 1, self.base.folder)

    def where(self, node: Node) -> Place:
        """Return a node's place; what is typed on the command line has no line."""
        return self.at(node.start_mark.line) if node.start_mark else self.base

    def refuse(self, node: Node, key: Key, problem: str) -> None:
        self.source.faults.append(Fault(self.where(node), dotted(key), problem))

    def value(self, node: Node, key: Key) -> Any:
        """Return what `node` says; faults are noted and leave None in its place."""
        self.nodes += 1
        if len(key) > MAX_DEPTH or self.nodes > MAX_NODES:
            raise RecipeError(
                [Fault(self.where(node), dotted(key[:3]), "is too large or too deep")]
            )
        if isinstance(node, MappingNode) and node.tag == _CORE + "map":
            return self.mapping(node, key)
        if isinstance(node, SequenceNode) and node.tag == _CORE + "seq":
            for index, item in enumerate(node.value):
                self.source.places[(*key, index)] = self.at(item.start_mark.line)
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag in _SCALARS:
            return self.scalar(node, key)
        self.refuse(node, key, f'"{_tag(node)}" is refused: a recipe holds plain values only')
        return None

    def mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, child in node.value:
            if not isinstance(name, ScalarNode) or name.tag not in _SCALARS:
                problem = (
                    "merge keys are not read here; `extends:` inherits from another recipe"
                    if name.tag == _CORE + "merge"
                    else f'a key must be a plain word, not "{_tag(name)}"'
                )
                self.refuse(name, key, problem)
                continue
            here = (*key, str(name.value))
            if here[-1] in values:
                first = self.source.places[here].line
                self.refuse(name, here, f"is written twice (first in line {first}): keep one")
                continue
            self.source.places[here] = self.at(name.start_mark.line)
            values[str(name.value)] = self.value(child, here)
        return values

    def scalar(self, node: ScalarNode, key: Key) -> Any:
        if node.tag in _TEXT:
            return str(node.value)
        try:
            return self.yaml.constructor.construct_object(node)
        except (ValueError, KeyError, YAMLError):
            shown = str(node.value)[:40]
            self.refuse(node, key, f'"{shown}" is no {str(node.tag).removeprefix(_CORE)}')
            return None


def _tag(node: Node) -> str:
    return str(node.tag).replace(_CORE, "!!")


def from_mapping(values: Mapping[str, Any], name: str = "recipe") -> Source:
    """Take a recipe given as Python values; its keys' place is `name`."""
    return Source(_plain(values), {(): Place(name)}, layers=(name,))


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_overrides(overrides: Sequence[str]) -> Iterator[Source]:
    """Read ``KEY=VALUE`` each into a source of its own, to be laid over the recipe in turn.

    VALUE is a YAML scalar, taken whole as text where it is no number, truth value or null; one
    that opens with ``[``, ``{`` or a quote is read as YAML. Nothing after ``=`` is empty text.
    """
    if isinstance(overrides, str):
        overrides = (overrides,)
    if isinstance(overrides, Mapping) or not all(isinstance(text, str) for text in overrides):
        said = f'must be texts such as ["train.steps=500"], not {overrides!r:.60}'
        raise RecipeError([Fault(Place("overrides"), "", said)])
    seen: dict[str, str] = {}
    for override in overrides:
        place = Place(f'override "{override}"')
        key, equals, text = override.partition("=")
        parts = tuple(key.strip().split("."))
        problem = None
        if not equals or not all(parts):
            problem = "is not KEY=VALUE, such as train.steps=500"
        elif parts[0] == "extends":
            problem = "extends stands in recipe files only"
        elif key.strip() in seen:
            problem = f'contradicts override "{seen[key.strip()]}": give the key once'
        if problem is not None:
            yield Source(faults=[Fault(place, "", problem)])
            continue
        seen[key.strip()] = override
        yield _override(parts, text.strip(), place)


def _override(parts: tuple[str, ...], text: str, place: Place) -> Source:
    reader = _Reader(place)
    try:
        node = reader.compose(text) if text[:1] in tuple("[{\"'") else None
    except RecipeError as exc:
        if text[0] != "{":  # "{trigger} {class}" is text, not a broken mapping
            return Source(faults=list(exc.faults))
        node = None
    if node is None:
        tag = reader.yaml.resolver.resolve(ScalarNode, text, (True, False)) if text else None
        node = ScalarNode(str(tag or _CORE + "str"), text)
    value = reader.value(node, parts)
    source = reader.source
    source.places[parts] = place
    del source.places[()]
    for part in reversed(parts[1:]):
        value = {part: value}
    source.tree = {parts[0]: value}
    return source
