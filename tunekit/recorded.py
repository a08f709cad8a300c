"""What a picture says of how it was drawn, read again: bounded, of known keys, and no path.

A picture may come from anybody. What is in it names files by their last names and knows them by
their hashes; it never says where to look.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from tunekit import hub
from tunekit.errors import UserError, did_you_mean
from tunekit.pictures import read_settings
from tunekit.schema import Base
from tunekit.section import Section, Seed


def _last_name(name: str) -> str:
    """Refuse what leads anywhere: a name is looked for in a few places, and never is a path."""
    if name in (".", "..") or not name.isprintable() or set("/\\") & set(name):
        raise ValueError("is no file's name")
    return name


def _checkpoint_or_name(name: str) -> str:
    run, slash, step = name.rpartition("/")
    if slash and not re.fullmatch(r"step-\d{1,12}", step):
        raise ValueError("is no file's name, nor a checkpoint's")
    _last_name(run if slash else name)
    return name


def _base_name(name: str) -> str:
    if not hub.is_id(name) or name.endswith("/.."):
        _last_name(name)
    return name


_Text = Annotated[str, Field(max_length=20_000)]
_Short = Annotated[str, Field(min_length=1, max_length=200)]
_Name = Annotated[_Short, AfterValidator(_last_name)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Strength = Annotated[float, Field(ge=-100, le=100)]
_ABOUT_A_BASE = (
    "revision variant vae config clip_skip prediction zero_terminal_snr dtype quantize".split()
)
FILES = ("vae", "config")
_GRID = {"prompts", "seeds"}


class File(Section):
    """A file that took part: its last name, and the sha256 of what is in it."""

    name: _Name
    sha256: _Hash | None = None


class Adapter(Section):
    """An adapter that took part, and how strong; a checkpoint is named with its run's folder."""

    name: Annotated[_Short, AfterValidator(_checkpoint_or_name)]
    weight: _Strength = 1.0
    text_weight: _Strength | None = None
    sha256: _Hash | None = None


class Start(File):
    """The picture that it started from: where it might change, how much, and what was added."""

    strength: float = 1.0
    mask: File | None = None
    extend: dict[str, int] = Field(default_factory=dict)


class Control(File):
    """The picture that it was held to, and how strongly."""

    scale: float = 1.0


class Recorded(Section):
    """How a picture was drawn. batch: the seeds that were drawn with its own, its own among them.

    base_sha256: the fingerprint of the base's weights and settings (`identity.of_drawing`).
    """

    prompt: _Text
    negative_prompt: _Text = ""
    seed: Seed
    batch: Annotated[tuple[Seed, ...], Field(strict=False, max_length=64)] = ()
    steps: int
    guidance_scale: float
    scheduler: Annotated[str, Field(max_length=100)]
    width: int
    height: int
    scale: float = 1.0
    text_scale: float | None = None
    base: Annotated[_Short, AfterValidator(_base_name)]
    base_settings: dict[str, JsonValue] = Field(default_factory=dict)
    base_sha256: _Hash | None = None
    adapters: Annotated[tuple[Adapter, ...], Field(strict=False, max_length=100)] = ()
    start: Start | None = None
    control: Control | None = None
    controlnet: File | None = None
    version: Annotated[str, Field(max_length=100)] = ""

    @field_validator("base_settings")
    @classmethod
    def _names_alone(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key in value.keys() & set(FILES):
            _last_name(str(value[key]))
        return value

    @model_validator(mode="after")
    def _in_its_batch(self) -> Recorded:
        if self.batch and self.seed not in self.batch:
            raise ValueError(f"its batch has no seed {self.seed}")
        return self

    def values(self) -> dict[str, Any]:
        """Return the settings by their names in `DrawSettings`."""
        names = "steps guidance_scale scheduler negative_prompt width height scale text_scale"
        return {name: getattr(self, name) for name in names.split()}


def read(path: Path) -> Recorded:
    """Return what the picture at `path` says of how it was drawn.

    Raises UserError for what is no picture of ours, for a grid, for keys that are not known, and
    for values out of their bounds.
    """
    settings = read_settings(path)
    if settings.keys() >= _GRID:
        raise UserError(f"{path}: is a grid of several pictures; name one of them")
    if unknown := sorted(settings.keys() - Recorded.model_fields.keys()):
        near = did_you_mean(unknown[0], Recorded.model_fields)
        raise UserError(
            f'{path}: says "{unknown[0][:60]}" of how it was drawn, which this version does not '
            f"know{near}: it cannot be drawn again"
        )
    try:
        return Recorded.model_validate(settings)
    except ValidationError as fault:
        raise UserError(f"{path}: its settings cannot be drawn: {_first(fault)}") from None


def about_base(base: Base) -> dict[str, JsonValue]:
    """Return what a picture says of a base beside its name: what is not as usual, and no path."""
    told = base.model_dump(mode="json", include=set(_ABOUT_A_BASE), exclude_defaults=True)
    for key in FILES:
        if key in told:
            told[key] = Path(str(told[key])).name
    return told


def base_of(path: Path, model: str, settings: Mapping[str, JsonValue]) -> Base:
    """Return the base called `model`, with what a picture at `path` says of it.

    Raises UserError for keys that no picture says, such as whose code is trusted.
    """
    if unknown := sorted(settings.keys() - set(_ABOUT_A_BASE)):
        raise UserError(f'{path}: says "{unknown[0][:60]}" of its base, which no picture may')
    try:
        return Base.model_validate({"model": model, **settings})
    except ValidationError as fault:
        raise UserError(f"{path}: its base cannot be had: {_first(fault)}") from None


def _first(fault: ValidationError) -> str:
    error = fault.errors()[0]
    said = error["msg"].removeprefix("Value error, ")
    return ": ".join(part for part in (".".join(map(str, error["loc"])), said) if part)
