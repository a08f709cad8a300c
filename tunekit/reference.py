"""Every key of a recipe as Markdown, told by the same schema that reads recipes: docs/recipe.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tunekit.recipe import json_schema
from tunekit.schedulers import NAMES
from tunekit.schema import PROMPTS

Schema = Mapping[str, Any]

_HEAD = "| key | value | default | meaning | elsewhere called |\n|---|---|---|---|---|"
_WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "object": "names and values",
}


def markdown() -> str:
    """Return a table for each section of a recipe: key, type, range, default, meaning, synonyms."""
    whole = json_schema()
    sections: list[str] = []
    own: list[str] = []
    for name, field in whole["properties"].items():
        kinds = _sections(field, whole["$defs"])
        if not kinds:
            own.append(_row(name, field, whole.get("else", {}).get("required", ())))
        for section in kinds:
            needed = whole["else"]["properties"].get(name, {})
            sections += _section(name, field, section, needed)
            for key, inside in section["properties"].items():
                for inner in _inner(inside, whole["$defs"]):
                    sections += _section(f"{name}.{key}", {}, inner, {})
    top = [_title("The recipe itself"), "\n".join([_HEAD, *own])]
    return "\n\n".join([*top, *sections]) + "\n"


def _title(text: str) -> str:
    return f"## {text}"


def _sections(field: Schema, known: Schema) -> list[Schema]:
    """Return the section that a key of the recipe holds, or every kind's of adapter."""
    options = [field, *field.get("anyOf", ()), field.get("items", {})]
    names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return [known[name] for name in names]


def _inner(field: Schema, known: Schema) -> list[Schema]:
    """Return the sections that a key inside a section holds, alone, in a list or among others."""
    if "$ref" in field:
        return [known[field["$ref"].rpartition("/")[2]]]
    options = [*field.get("anyOf", ()), *field.get("oneOf", ()), field.get("items", {})]
    found = [section for option in options if option for section in _inner(option, known)]
    return [section for n, section in enumerate(found) if section not in found[:n]]


def _section(name: str, field: Schema, section: Schema, needed: Schema) -> Iterator[str]:
    keys = section["properties"]
    kind = keys.get("kind", {}).get("const")
    yield _title(f"`{name}`" + (f", kind `{kind}`" if kind else ""))
    called = _called(field)
    told = field.get("description") or section["description"]
    yield told + (f" Elsewhere called {called}." if called else "")
    required = (*section.get("required", ()), *needed.get("required", ()))
    yield "\n".join([_HEAD, *(_row(key, keys[key], required) for key in keys)])
    yield from _lists(keys)


def _lists(keys: Schema) -> Iterator[str]:
    """Yield what a table has no room for: the prompts that are the default, the samplers."""
    if "prompts" in keys and "kind" in keys:
        for kind, prompts in PROMPTS.items():
            lines = "\n".join(f"- `{prompt}`" for prompt in prompts)
            yield f"The default `prompts` of kind `{kind}`:\n\n{lines}"
    if "scheduler" in keys:
        names = ", ".join(f"`{name}`" for name in NAMES)
        yield f"Names for `scheduler`: {names}, or the name of any diffusers class that fits."


def _row(key: str, field: Schema, required: Any) -> str:
    default = "required" if key in required else _default(field)
    cells = [f"`{key}`", _value(field), default, field["description"], _called(field)]
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """Return text that stays in its cell as it is: no line ends, bars escaped, and no tags."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(
        part if odd % 2 else part.replace("<", "&lt;") for odd, part in enumerate(parts)
    )


def _called(field: Schema) -> str:
    return ", ".join(f"`{word}`" for word in field.get("x-also", ()))


def _default(field: Schema) -> str:
    if "default" not in field:
        return "none" if field.get("type") == "string" else "as said"
    value = field["default"]
    written = value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{written}`"


def _value(field: Schema) -> str:
    """Return a key's type and range in words."""
    if "$ref" in field:
        return "a section of keys"
    if options := [*field.get("anyOf", ()), *field.get("oneOf", ())]:
        return ", or ".join(dict.fromkeys(_value(option) for option in options))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "null":
        return "null"
    if field.get("type") == "array":
        return _list(field)
    words = _WORDS[field["type"]]
    return " ".join(filter(None, [words, _range(field)]))


def _list(field: Schema) -> str:
    items = field.get("items") or field["prefixItems"][0]
    least, most = field.get("minItems", 0), field.get("maxItems")
    count = f"{least} " if least == most else "one or more " if least else ""
    if "oneOf" in items:
        return "list of these"
    plural = _value(items).replace("whole number", "whole numbers").replace("text", "texts")
    if items.get("type") == "number":
        plural = plural.replace("number", "numbers", 1)
    return f"list of {count}{plural}"


def _range(field: Schema) -> str:
    if field["type"] == "string":
        return f"of at most {field['maxLength']} characters" if "maxLength" in field else ""
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    if field["type"] == "integer" and below is not None:
        high, below = below - 1, None
    start = _number(low) if low is not None else None
    end = _number(high if high is not None else below)
    if start is None and above is None:
        return f"at most {end}" if end else ""
    if not end:
        return f"{start} or more" if start is not None else f"above {_number(above)}"
    text = f"{start} to {end}" if start is not None else f"above {_number(above)} to {end}"
    return text + (f" ({end} excluded)" if below is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 2**63 - 1:
        return "2^63 - 1"
    return f"{value:,.0f}" if value >= 10_000 else f"{value:g}"
