"""What pydantic found wrong with a recipe, in the words of someone who edits one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tunekit.errors import did_you_mean
from tunekit.recipe_source import Fault, Key, Source, dotted
from tunekit.schema import Section
from tunekit.section import BRANCHES

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}
_BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}
_NOT_KEYS = frozenset({"default_factory_not_called"})


def explain(
    error: ValidationError, source: Source, sections: Mapping[str, type[Section]]
) -> list[Fault]:
    """Return a fault for each thing pydantic found, at the line where it stands.

    `sections` are the recipe's sections by dotted key, with '' for the recipe itself.
    """
    found: dict[Key, list[str]] = {}
    for details in error.errors(include_url=False):
        if details["type"] in _NOT_KEYS:
            continue  # a consequence of another fault, which is listed
        key = _key(details, source.tree)
        if details["type"] == "too_short" and any(k[: len(key)] == key for k in found):
            continue  # its items are refused already
        problem = _problem(details, key, sections)
        if problem not in found.setdefault(key, []):
            found[key].append(problem)
    return [source.fault(key, _joined(problems)) for key, problems in found.items()]


def _joined(problems: list[str]) -> str:
    """Return one sentence for a key that may be one kind of thing or another and is neither."""
    heads, tails = zip(*(problem.partition(", not ")[::2] for problem in problems), strict=True)
    if len(set(tails)) == 1 and tails[0] and all(h.startswith("must be ") for h in heads):
        wanted = " or ".join(head.removeprefix("must be ") for head in heads)
        return f"must be {wanted}, not {tails[0]}"
    return "; or ".join(problems)


def _key(details: ErrorDetails, tree: Any) -> Key:
    """Return the error's place in the tree, without the union branches pydantic puts between."""
    key: Key = ()
    for part in details["loc"]:
        if part in BRANCHES:
            continue
        if isinstance(tree, dict):
            tree = tree.get(str(part))
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            break
        key = (*key, part)
    return key


def _problem(details: ErrorDetails, key: Key, sections: Mapping[str, type[Section]]) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    field = _field(key, sections)
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(key, sections)}"
    if kind == "missing" and isinstance(value, list):
        return f"has too few items: {shown(value)}"
    if kind == "missing":
        return f"is missing: {_first_sentence(field)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "fault":
        return details["msg"]
    if kind == "literal_error":
        return _choice(value, _literals(details))
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}, not {shown(value)}{_hint(kind, value)}"
    if kind.endswith(("_too_short", "_too_long", "too_short", "too_long")) and not value:
        return "must not be empty"
    bounds = _bounds(field, context)
    if bounds:
        return f"must be {bounds}, not {shown(value)}"
    described = f": {field.description}" if field is not None else ""
    return f"{shown(value)} is not allowed{described}"


def shown(value: Any) -> str:
    """Return a value as it would stand in a recipe, cut to one readable line."""
    if isinstance(value, dict):
        return "a section of keys"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _choice(value: Any, allowed: list[str]) -> str:
    near = did_you_mean(value, allowed) if isinstance(value, str) else ""
    return f"must be {_either(allowed)}, not {shown(value)}{near}"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _literals(details: ErrorDetails) -> list[str]:
    expected = details.get("ctx", {})["expected"]
    return [w.strip().strip("'") for w in expected.replace(" or ", ", ").split(",")]


def _hint(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f' (quote it: "{json.dumps(value)}")'
    if kind == "model_type" and value is None:
        return " (indent its keys below it, or leave the line out)"
    if not isinstance(value, str):
        return ""
    if kind in ("int_type", "float_type") and _is_number(value):
        return f" (without the quotes: {value.strip()})"
    if kind == "bool_type" and value.lower() in ("yes", "on", "no", "off", "true", "false"):
        return f" (write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'})"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _bounds(field: FieldInfo | None, context: Mapping[str, Any]) -> str:
    limits = {name: context[name] for name in _BOUNDS if name in context}
    own = {
        n: getattr(m, n)
        for m in (field.metadata if field else ())
        for n in _BOUNDS
        if hasattr(m, n)
    }
    if limits and limits.items() <= own.items():  # else it is the bound of a list's item
        limits = own
    return " and ".join(
        text.format(_plain(limits[n])) for n, text in _BOUNDS.items() if n in limits
    )


def _plain(number: float) -> str:
    return f"{number:.0f}" if float(number).is_integer() else f"{number}"


def _first_sentence(field: FieldInfo | None) -> str:
    text = (field.description if field else None) or "it is required"
    return text.split(". ")[0].rstrip(".")


def _section(key: Key, sections: Mapping[str, type[Section]]) -> str:
    """Return the dotted name of the section that `key` stands in; '' is the recipe."""
    names = [str(part) for part in key[:-1] if not isinstance(part, int)]
    while names and ".".join(names) not in sections:
        names.pop()
    return ".".join(names)


def _field(key: Key, sections: Mapping[str, type[Section]]) -> FieldInfo | None:
    """Return the field that `key` (or the list around it) fills; None for an unknown one."""
    inside = _section(key, sections)
    names = [str(part) for part in key if not isinstance(part, int)]
    own = names[inside.count(".") + 1 if inside else 0 :]
    return dict(fields(sections[inside])).get(own[0]) if own else None


def nested(sections: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    """Return `sections` and the sections inside them, by dotted key."""
    found = dict(sections)
    for name, section in sections.items():
        if not name:
            continue  # the recipe's own are given, with the adapter's as its kind makes it
        inner = {
            f"{name}.{key}": kind
            for key, field in fields(section)
            for kind in _kinds(field.annotation)
        }
        found |= nested(inner)
    return found


def _kinds(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def fields(section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield a section's keys as they are written, with their fields."""
    for name, field in section.model_fields.items():
        yield field.alias or name, field


def extra(field: FieldInfo, name: str) -> Any:
    """Return what `schema.also` or its like recorded under `name`; None: nothing."""
    recorded = field.json_schema_extra
    return recorded.get(name) if isinstance(recorded, dict) else None


def _suggestion(key: Key, sections: Mapping[str, type[Section]]) -> str:
    """Say what an unknown key may have meant: here, by another trainer's word, or elsewhere."""
    word = str(key[-1])
    own = _section(key, sections)
    if len(key) > 1 and not own:
        return ""
    here = dict(fields(sections[own]))
    known_as = _synonym(word, here.items())
    if known_as:
        return f' (did you mean "{known_as}"?)'
    others = {name: dict(fields(section)) for name, section in sections.items() if name != own}
    same = [(name, word) for name, there in others.items() if word in there]
    known = [(name, _synonym(word, there.items())) for name, there in others.items()]
    inside = [(name, found) for name, found in known if found and name.startswith(f"{own}.")]
    if not same and not inside and (near := did_you_mean(word, here)):
        return near
    for name, found in [*inside, *same, *known]:
        if found:
            return f' (did you mean "{dotted((name, found)) if name else found}"?)'
    return f"; known here: {', '.join(here)}"


def _synonym(word: str, candidates: Iterable[tuple[str, FieldInfo]]) -> str | None:
    for name, field in candidates:
        if word.lower() in (extra(field, "x-also") or ()):
            return name
    return None
