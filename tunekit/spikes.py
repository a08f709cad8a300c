"""Loss spikes: steps whose loss stands far above what their timesteps usually cost.

A loss hangs mostly on its timestep. So each picture's is divided by the median of those seen last
at timesteps near its own; a step's excess is the mean of the logarithms. It is a spike where it
stands out of the excesses before it by their median absolute deviation, which a few spikes do not
move (Leys et al. 2013, "Detecting outliers"), and is large in itself. Pure numbers; nothing is
judged before enough was seen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

PARTS = 10  # of the timesteps, of equal size
DEPTH, LEAST = 32, 8  # losses held for each part, and how many it takes to judge by
WINDOW, WARM = 100, 30  # steps' excesses held, and how many it takes to judge by
DEVIATIONS = 8.0  # of the usual excess, as standard deviations of a normal distribution
FACTOR = 3.0  # times the usual loss
_NORMAL = 1.4826  # standard deviation by median absolute deviation
_TINY = 1e-12


class Spikes:
    """What losses usually are, by timestep. timesteps: how many the schedule has."""

    def __init__(self, timesteps: int) -> None:
        self._timesteps = timesteps
        self._parts: list[deque[float]] = [deque(maxlen=DEPTH) for _ in range(PARTS)]
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def excess(self, losses: Sequence[float], timesteps: Sequence[int]) -> float | None:
        """Return the mean logarithm of what a step's pictures cost above the usual.

        losses: finite. None where less than half of the pictures can be judged.
        """
        logs = []
        for loss, timestep in zip(losses, timesteps, strict=True):
            part = self._parts[self._part(timestep)]
            if len(part) >= LEAST:
                logs.append(_log(loss) - median(part))
        return math.fsum(logs) / len(logs) if 2 * len(logs) > len(losses) else None

    def is_spike(self, excess: float | None) -> bool:
        """Return whether an excess stands out."""
        if excess is None or len(self._recent) < WARM:
            return False
        usual = median(self._recent)
        deviation = _NORMAL * median([abs(value - usual) for value in self._recent])
        return excess - usual > max(DEVIATIONS * deviation, math.log(FACTOR))

    def take(self, losses: Sequence[float], timesteps: Sequence[int], excess: float | None) -> None:
        """Remember a step and its excess, whether it was a spike or not."""
        for loss, timestep in zip(losses, timesteps, strict=True):
            self._parts[self._part(timestep)].append(_log(loss))
        if excess is not None:
            self._recent.append(excess)

    def state(self) -> dict[str, list[float]]:
        """Return all that is remembered."""
        parts = {f"part-{number}": list(part) for number, part in enumerate(self._parts)}
        return {**parts, "recent": list(self._recent)}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take up what `state` returned."""
        for number, part in enumerate(self._parts):
            part.clear()
            part.extend(state[f"part-{number}"])
        self._recent.clear()
        self._recent.extend(state["recent"])

    def _part(self, timestep: int) -> int:
        return min(PARTS - 1, timestep * PARTS // self._timesteps)


def _log(loss: float) -> float:
    return math.log(max(loss, _TINY))
