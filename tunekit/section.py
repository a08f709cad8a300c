"""What every section of a recipe is made of: the base class, notes on fields, common types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
)


def also(*words: str) -> dict[str, JsonValue]:
    """Return `json_schema_extra` that records what other trainers call the field."""
    return {"x-also": list(words)}


Place = Literal["folder", "model", "part", "pictures", "embedding"]


def holds_path(kind: Place) -> dict[str, JsonValue]:
    """Return `json_schema_extra` that marks what may be a path, to be looked for on this disk.

    "folder": a folder that must be there. "part": a folder or a file that must be there. "model":
    `toybox`, a path that must be there, or a Hub id. "pictures": a folder or a file, where `*`
    stands for anything in a file's name. "embedding": a .safetensors file that must be there, or
    words.
    """
    return {"x-path": kind}


def template(text: str) -> str:
    """Refuse braces other than {trigger} and {class}; ``{{`` and ``}}`` are braces themselves."""
    if re.search(r"[{}]", re.sub(r"\{\{|\}\}|\{trigger\}|\{class\}", "", text)):
        raise ValueError(f'"{text}" has braces other than {{trigger}} and {{class}}')
    return text


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands there more than once")
    return values


def _form(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return LIST
    return SECTION if isinstance(value, (Mapping, BaseModel)) else ONE


ONE, SECTION, LIST = BRANCHES = ("<one>", "<section>", "<list>")
"""What may stand in one place, told by its form: pydantic names these in the place of an error."""
by_form = Discriminator(_form)
"""Put on a union whose members carry a Tag: only the fitting one is tried, only it complains."""

Precision = Literal["fp32", "bf16", "fp16"]
Word = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\s{}]([^{}\r\n]*[^\s{}])?$")]
Template = Annotated[str, Field(min_length=1), AfterValidator(template)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, strictly typed, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )
