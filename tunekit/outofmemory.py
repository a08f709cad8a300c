"""Running out of memory: what was asked for, when, and which settings of the recipe lower it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tunekit.advice import lower_memory
from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.recipe import Recipe

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?([KMGT]i?B|bytes)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# How a RuntimeError says it: the allocators of torch for GPUs and for the computer's memory, CUDA
# itself, C++.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


class OutOfMemoryError(UserError):
    """Memory ran out. asked: bytes that were asked for at once; None where nobody knows."""

    def __init__(self, message: str, asked: int | None) -> None:
        super().__init__(message)
        self.asked = asked


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    )


def asked(error: BaseException) -> int | None:
    """Return how many bytes were asked for; None where the error does not say."""
    found = _ASKED.search(str(error))
    return found and int(float(found[1]) * _UNITS[found[2][0].lower()])


@contextlib.contextmanager
def told(when: Callable[[], str], recipe: Recipe, resolution: int | None = None) -> Iterator[None]:
    """Turn running out of memory into OutOfMemoryError, with what would lower it.

    when: says what was done. resolution: edge of the pictures in pixels, where it is known.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = asked(error)
        needed = "" if size is None else f": {size:,} bytes more were asked for"
        train = recipe.train
        edge = f" of {resolution} pixels" if resolution else ""
        line = f"out of memory {when()} (train.batch_size {train.batch_size}{edge}){needed}"
        advice = [f"  {one}" for one in lower_memory(recipe, resolution)]
        head = "; what lowers it, the cheapest first:" if advice else "; no setting lowers it more"
        raise OutOfMemoryError("\n".join([line + head, *advice]), size) from error
