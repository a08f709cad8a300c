"""Model families: a file each, and the file's name is the family's name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import registry
from tunekit.errors import UserError
from tunekit.families._control import load as controlnet
from tunekit.families.base import Description, Family, ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.schema import Base

__all__ = [
    "Description",
    "Family",
    "ModelFolder",
    "controlnet",
    "describe",
    "get",
    "load",
    "names",
    "outline",
    "recognise",
]


def names() -> tuple[str, ...]:
    """Return every family's name."""
    return registry.names(sys.modules[__name__])


def get(name: str) -> type[Family]:
    """Return the family called `name`; UserError where there is none."""
    return registry.get(sys.modules[__name__], name, Family, "family")


def recognise(folder: Path | ModelFolder) -> type[Family]:
    """Return the family of a diffusers folder.

    Raises UserError that names what was found and what each family needs.
    """
    found = folder if isinstance(folder, ModelFolder) else ModelFolder.read(folder)
    families = [get(name) for name in names()]
    fitting = [family for family in families if family.recognise(found.model_index, found.configs)]
    if not fitting:
        for family in families:
            if kin := family.relative(found.model_index, found.configs):
                raise UserError(
                    f"{found.label}: is {kin}; tunekit cannot teach it (it holds "
                    f"{found.summary()}): take the base that draws from words alone"
                )
        raise UserError(
            f"{found.label}: holds {found.summary()}, which tunekit cannot teach; "
            f"it needs {_either(f.needs for f in families)}"
        )
    assert len(fitting) == 1, f"{found.label} is taken for {[f.name for f in fitting]}"
    return fitting[0]


def load(base: Base, device: torch.device | str = "cpu") -> Family:
    """Return the recipe's base, loaded and frozen on `device`.

    Raises UserError where the model cannot be found, is of no known family, is not the family that
    `base.family` names, holds only pickled weights, or carries code without `trust_remote_code`.
    """
    folder = ModelFolder.open(base)
    family = recognise(folder)
    if base.family is not None and get(base.family) is not family:
        raise UserError(
            f"base.family: {base.family}, but {folder.label} is {family.name}: it holds "
            f"{folder.summary()}; set base.family: {family.name} or leave it out"
        )
    return family.load(base, device, folder)


def outline(base: Base) -> dict[str, nn.Module]:
    """Return every component of the base by its diffusers name, without any weight.

    They are of the real classes, in `base.dtype`, on the device "meta": built from their
    configurations, whatever the size in no time. `load(base, "meta")` gives a family around the
    like. Raises UserError as `load` does.
    """
    return load(base, "meta").components()


def describe(base: Base) -> Description:
    """Return what the recipe's base says of itself, without reading its weights.

    Raises UserError where the model cannot be found or is of no known family.
    """
    folder = ModelFolder.open(base)
    return recognise(folder).describe(folder)


def _either(needs: Iterable[str]) -> str:
    return ", or ".join(needs)
