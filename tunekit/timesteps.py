"""Which timesteps are trained how often: distributions over 0..T-1 as tables of probabilities.

A timestep t stands for the place x = (t + 1/2) / T between picture (0) and noise (1). A table holds
the share of the continuous distribution that falls on each t, so ranges, biases and shifts compose.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Sampling = Literal["uniform", "logit_normal", "mode", "beta"]
Bias = Literal["early", "late"]
Array = npt.NDArray[np.float64]

MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Outside of these the map of `mode` is not monotone."""


def cumulative(places: Array, sampling: Sampling, first: float, second: float) -> Array:
    """Return the share of a distribution below each of `places`, 0..1.

    "uniform"; "logit_normal" with mean `first` and deviation `second` of the logit (Esser et al.
    2024, "Scaling Rectified Flow Transformers", eq. 19); "mode" with scale `first` (eq. 20);
    "beta" with a = `first` and b = `second`.
    """
    if sampling == "uniform":
        return places
    if sampling == "mode":
        return _mode_cumulative(places, first)
    from scipy import special

    shares: Array = (
        special.betainc(first, second, places)
        if sampling == "beta"
        else special.ndtr((special.logit(places) - first) / second)
    )
    return shares


def _mode_cumulative(places: Array, scale: float) -> Array:
    """Return P(f(u) <= x), u uniform, f(u) = 1 - u - s (cos(pi u / 2)^2 - 1 + u), which falls."""
    low, high = np.zeros_like(places), np.ones_like(places)
    for _ in range(60):  # halving: to the last digit
        u = (low + high) / 2
        above = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u) > places
        low, high = np.where(above, u, low), np.where(above, high, u)
    shares: Array = 1 - (low + high) / 2
    shares[places <= 0], shares[places >= 1] = 0, 1
    return shares


@lru_cache(maxsize=64)
def probabilities(
    count: int,
    sampling: Sampling = "uniform",
    parameters: tuple[float, float] = (0.0, 1.0),
    *,
    shift: float = 1.0,
    bias: tuple[Bias, float, float] | None = None,
    limits: tuple[int, int] | None = None,
) -> Array:
    """Return how often each timestep is drawn: [count] float64 that sums to 1, not to be written.

    `parameters`: see `cumulative`. `shift` s moves x to s x / (1 + (s - 1) x), above 1 towards the
    noise (Esser et al. 2024, eq. 23). `bias`: (end, multiplier, portion): that portion of the
    timesteps at the "early" (picture) or "late" (noise) end is drawn `multiplier` times as often.
    `limits`: the first and the last timestep drawn; what falls outside is left out, and the
    portion of a bias is one of what is inside. All 0 where nearly nothing falls inside.
    """
    edges = np.linspace(0, 1, count + 1)
    shares = np.diff(cumulative(edges / (shift - (shift - 1) * edges), sampling, *parameters))
    first, last = limits or (0, count - 1)
    assert 0 <= first <= last < count, (limits, count)
    shares[:first] = shares[last + 1 :] = 0
    if bias is not None:
        end, multiplier, portion = bias
        number = max(1, round(portion * (last - first + 1)))
        start = first if end == "early" else last + 1 - number
        shares[start : start + number] *= multiplier
    total = shares.sum()
    if total < 1e-9:
        shares[:] = 0  # nothing to speak of falls inside the limits
    else:
        shares /= total
    shares.setflags(write=False)
    return shares


def draw(tables: list[Array], generator: torch.Generator) -> Tensor:
    """Draw one timestep from each table: [len(tables)] int64 on the CPU.

    One uniform number each, in order: the first n of a longer list are the same.
    """
    import torch

    uniform = torch.rand(len(tables), generator=generator, dtype=torch.float64).numpy()
    drawn = [
        min(int(np.searchsorted(np.cumsum(table), u, side="right")), int(np.flatnonzero(table)[-1]))
        for table, u in zip(tables, uniform, strict=True)
    ]
    return torch.tensor(drawn, dtype=torch.int64)


def resolution_shift(cells: int, base: int) -> float:
    """Return the shift that keeps a larger picture as noisy to the eye: sqrt(cells / base).

    `cells`: latent cells (h * w) of the picture; `base`: those at which no shift is needed (Esser
    et al. 2024, section 5.3.2, eq. 23).
    """
    return math.sqrt(cells / base)
