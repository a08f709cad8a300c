"""Ids of the Hugging Face Hub, told from paths; and what a path in a recipe means."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def is_id(text: str) -> bool:
    """Return whether `text` has the form of a Hub id: owner/name."""
    return _ID.fullmatch(text) is not None


def here(model: str, revision: str | None = None) -> bool:
    """Return whether a model of the Hub was brought to this disk before, at a revision.

    What files and pictures say of their base may be anybody's word: it brings no other model. Its
    description is looked for; loading may still fetch what is missing of it, or newer.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return isinstance(found, str)


def as_path(text: str) -> Path:
    """Return a path as people write it, ``~`` being the home; a home that is not known stays."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody: there is no such file, which is told as of any other
        return Path(text)


def impossible(text: str) -> bool:
    """Return whether no disk can have a file of this name: over 255 bytes, or half a character."""
    try:
        return any(len(part) > 255 for part in text.encode().split(b"/"))
    except UnicodeEncodeError:
        return True


def means_id(text: str) -> bool:
    """Return whether `text` can only mean a Hub id: it has the form, and is no path from here.

    Where there is a folder of the owner's name here, `text` is a path with a typing error in it
    (runs/chracter), and asking the Hub for it would end in a riddle about networks.
    """
    return is_id(text) and not Path(text).parent.is_dir()
