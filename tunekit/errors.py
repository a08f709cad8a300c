"""What a user can get wrong, said in one line."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from typing import TypeVar

_Error = TypeVar("_Error", bound=BaseException)


class UserError(ValueError):
    """A fault the user can mend: the command line prints it without a traceback and exits with 2.

    The message is one plain line that names the file, line or key, the value and the remedy.
    """


def some(names: Iterable[object], most: int = 3) -> str:
    """Return the first of some names, parted by commas, and how many more there are."""
    known = [str(name) for name in names]
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``' (did you mean "x"?)'`` for the nearest of `known`; ``''`` where none is near."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f' (did you mean "{by_lower[near[0]]}"?)' if near else ""


def without_frames(error: _Error) -> _Error:
    """Return `error` without the variables of where it was raised: they may hold a whole model."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    return error
