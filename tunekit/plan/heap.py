"""What the machine's allocator makes of a row of allocations: how much memory a process then has.

Freed memory does not all go back to the system: it stays in the heap, in pieces that may not fit
what comes next. How much is a matter of the allocator and its version, so it is asked: the same
calls are made while a run is walked through, and what they give is never touched.
"""

from __future__ import annotations

import ctypes

# As torch asks for memory on the CPU (c10/core/impl/alloc_cpu.cpp).
_ALIGNMENT = 64
# Smaller ones hardly change what is held, and asking takes as long as there are pieces.
_WORTH_ASKING = 1 << 18


class _Told(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


class Heap:
    """The allocator of this process: takes and gives back, and knows the most that it held."""

    def __init__(self) -> None:
        """Raises AttributeError where the C library does not tell what it holds (not glibc)."""
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Told
        sizes = ctypes.c_size_t
        self._libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), sizes, sizes]
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._places: dict[int, ctypes.c_void_p] = {}
        self._first = self._held()
        self.most = 0

    @classmethod
    def here(cls) -> Heap | None:
        """Return the allocator, None where it cannot be asked."""
        try:
            return cls()
        except (AttributeError, OSError, TypeError):
            return None

    def begin(self) -> None:
        """Ask from here on for the most anew."""
        self.most = self._held() - self._first

    def take(self, key: int, size: int) -> None:
        """Allocate; where there is no room even for the promise, nothing is held."""
        place = ctypes.c_void_p()
        if self._libc.posix_memalign(ctypes.byref(place), _ALIGNMENT, max(size, 1)):
            return
        self._places[key] = place
        if size >= _WORTH_ASKING:
            self.most = max(self.most, self._held() - self._first)

    def give(self, key: int) -> None:
        """Free what was allocated under `key`."""
        if (place := self._places.pop(key, None)) is not None:
            self._libc.free(place)

    def _held(self) -> int:
        told = self._libc.mallinfo2()
        return int(told.arena + told.hblkhd)
