"""Running out of memory: what was asked for, when, and which settings of the recipe lower it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tunekit.advice import lower_asked, lower_drawing, lower_memory
from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.advice import Advice
    from tunekit.recipe import Recipe

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?([KMGT]i?B|bytes)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# How a RuntimeError says it: the allocators of torch for GPUs and for the computer's memory, a file
# that is mapped, CUDA itself, C++, a thread whose stack has no room.
_THREAD = "can't start new thread"
_SIGNS = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory"),
    *("bad_alloc", _THREAD, "failed to map segment"),  # the last of a library that is loaded
)
_ONEDNN = "could not create a primitive"  # what it cannot compute at all has no descriptor


class OutOfMemoryError(UserError):
    """Memory ran out. asked: bytes that were asked for at once; None where nobody knows."""

    def __init__(self, message: str, asked: int | None) -> None:
        super().__init__(message)
        self.asked = asked


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device.

    Or one that it was raised for: libraries call what they had no room to read unreadable.
    """
    return any(map(_says_so, _chain(error)))


def _says_so(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))
        or (isinstance(error, RuntimeError) and text == _ONEDNN)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def asked(error: BaseException) -> int | None:
    """Return how many bytes were asked for; None where the error does not say."""
    for one in _chain(error):
        if found := _ASKED.search(str(one)):
            return int(float(found[1]) * _UNITS[found[2][0].lower()])
    return None


def told(
    when: Callable[[], str], recipe: Recipe, resolution: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Turn running out of memory into OutOfMemoryError, with what would lower it.

    when: says what was done. resolution: edge of the pictures in pixels, where it is known.
    """

    def explained(error: Exception) -> OutOfMemoryError:
        edge = f" of {resolution} pixels" if resolution else ""
        what = f"{when()} (train.batch_size {recipe.train.batch_size}{edge})"
        return _explained(error, what, "what lowers it", lower_memory(recipe, resolution))

    return _turning(explained)


def told_after(
    what: str, recipe: Recipe, resolution: int
) -> contextlib.AbstractContextManager[None]:
    """Do the same after the last step, whose checkpoint stands: nothing is to be trained again.

    what: was done. resolution: edge of the pictures that are drawn, in pixels.
    """

    def explained(error: Exception) -> OutOfMemoryError:
        head = (
            "the last step is saved, and with more memory free the same command with --resume goes "
            "on from there; what lowers it in a new run"
        )
        size = f"{what} (pictures of {resolution} pixels)"
        return _explained(error, size, head, lower_drawing(recipe, resolution))

    return _turning(explained)


def told_drawing(
    what: str, quantize: str | None, batch: int = 1, size: tuple[int, int] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Do the same where nothing trains, as in `tunekit generate`, with the options that lower it.

    what: was done. quantize, batch, size: as of `advice.lower_asked`.
    """

    def explained(error: Exception) -> OutOfMemoryError:
        return _explained(error, what, "what lowers it", lower_asked(quantize, batch, size))

    return _turning(explained)


@contextlib.contextmanager
def _turning(explained: Callable[[Exception], OutOfMemoryError]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, OSError, UserError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise explained(error) from error


def _explained(
    error: Exception, what: str, head: str, advice: Sequence[Advice]
) -> OutOfMemoryError:
    size = asked(error)
    needed = "" if size is None else f": {size:,} bytes more were asked for"
    end = f"{head}, the cheapest first:" if advice else f"{head}: no setting"
    threads = any(_THREAD in str(one) for one in _chain(error))  # nobody says for want of which
    lacks = "out of memory, or of threads that may be started," if threads else "out of memory"
    lines = [f"{lacks} {what}{needed}; {end}", *(f"  {one}" for one in advice)]
    return OutOfMemoryError("\n".join(lines), size)
