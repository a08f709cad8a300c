"""Adapter kinds: a file each, and the file's name is the kind's name. No torch here."""

from __future__ import annotations

import sys

from tunekit import registry
from tunekit.adapters.base import Adapter
from tunekit.schema import AdapterSettings

__all__ = ["Adapter", "get", "names", "settings_types"]


def names() -> tuple[str, ...]:
    """Return every kind's name."""
    return registry.names(sys.modules[__name__])


def get(kind: str) -> type[Adapter]:
    """Return the adapter kind called `kind`; UserError where there is none."""
    return registry.get(sys.modules[__name__], kind, Adapter, "adapter kind")


def settings_types() -> dict[str, type[AdapterSettings]]:
    """Return every kind's settings class under the kind's name, for the recipe."""
    return {kind: get(kind).Settings for kind in names()}
