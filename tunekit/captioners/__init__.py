"""Captioners: a file each, and the file's name is the captioner's name. No torch here."""

from __future__ import annotations

import sys

from tunekit import registry
from tunekit.captioners.base import Captioner, Wishes

__all__ = ["Captioner", "Wishes", "get", "names"]


def names() -> tuple[str, ...]:
    """Return every captioner's name."""
    return registry.names(sys.modules[__name__])


def get(name: str) -> type[Captioner]:
    """Return the captioner called `name`; UserError where there is none."""
    return registry.get(sys.modules[__name__], name, Captioner, "captioner")
