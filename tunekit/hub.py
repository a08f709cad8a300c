"""Ids of the Hugging Face Hub, told from paths."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def is_id(text: str) -> bool:
    """Return whether `text` has the form of a Hub id: owner/name."""
    return _ID.fullmatch(text) is not None


def means_id(text: str) -> bool:
    """Return whether `text` can only mean a Hub id: it has the form, and is no path from here.

    Where there is a folder of the owner's name here, `text` is a path with a typing error in it
    (runs/chracter), and asking the Hub for it would end in a riddle about networks.
    """
    return is_id(text) and not Path(text).parent.is_dir()
