"""The best change of a lower rank: singular values, which of them are kept, and what that loses.

Eckart and Young 1936: of all matrices of rank r, the r largest singular values with their vectors
are the nearest to a matrix in the Frobenius norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """How much is kept. rank: at most so many singular values. energy: the fewest that hold this
    share of the squared norm, 0 to 1. Both: the fewer. Neither: all that are no rounding."""

    rank: int | None = None
    energy: float | None = None

    @classmethod
    def of(cls, rank: int | None, energy: float | None, share: float | None = None) -> Keep:
        """Check what a user asks for. share: of the Frobenius norm, whose square is the energy."""
        if rank is not None and not 1 <= rank <= 4096:
            raise UserError(f"--rank: {rank} is not in 1 to 4096")
        if energy is not None and share is not None:
            raise UserError("--energy and --frobenius: both say how much is kept; give one")
        for option, value in (("--energy", energy), ("--frobenius", share)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{option}: {value:g} is no share: above 0, at most 1")
        return cls(rank, share**2 if share is not None else energy)

    def count(self, values: Tensor) -> int:
        """Return how many of the singular values (falling) are kept, at least one."""
        squares = values.double() ** 2
        count = max(1, int((values > 0).sum()))
        if self.energy is not None:
            reached = squares.cumsum(0) >= self.energy * squares.sum() * (1 - 1e-12)
            count = min(count, int(reached.nonzero()[0]) + 1 if bool(reached.any()) else count)
        return count if self.rank is None else min(count, self.rank)


@dataclass(frozen=True, eq=False)
class Cut:
    """A change as up @ down: [out, r] and [r, in], or the kernels [out, r, 1, 1] and [r, in, h, w].

    norm: Frobenius norm of the whole change. lost: that of what was cut off.
    """

    up: Tensor
    down: Tensor
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        """How many singular values were kept."""
        return len(self.down)

    @property
    def kept(self) -> float:
        """Share of the squared norm that is kept."""
        return 1 - (self.lost / self.norm) ** 2 if self.norm else 1.0


def cut_matrix(change: Tensor, keep: Keep) -> Cut:
    """Cut a weight's change, [out, in] or a kernel [out, in, h, w], down to what is kept."""
    import torch

    flat = change.detach().float().flatten(1)
    up, values, down = torch.linalg.svd(flat, full_matrices=False)
    return _cut(up, values, down, change.shape, keep)


def cut_factors(up: Tensor, down: Tensor, keep: Keep) -> Cut:
    """Cut up @ down (as in `Cut`, scale included), without ever making the whole matrix of it."""
    import torch

    left, small_left = torch.linalg.qr(up.detach().double().flatten(1))
    right, small_right = torch.linalg.qr(down.detach().double().flatten(1).T)
    inner, values, outer = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    shape = (up.shape[0], *down.shape[1:])
    return _cut(left @ inner, values, outer @ right.T, shape, keep)


def product_norm(up: Tensor, down: Tensor) -> float:
    """Return the Frobenius norm of up @ down (as in `Cut`), in double precision and little room."""
    import torch

    left = torch.linalg.qr(up.detach().double().flatten(1), mode="r").R
    right = torch.linalg.qr(down.detach().double().flatten(1).T, mode="r").R
    return float(torch.linalg.matrix_norm(left @ right.T))


def _cut(up: Tensor, values: Tensor, down: Tensor, shape: tuple[int, ...], keep: Keep) -> Cut:
    import torch

    # What is below is the rounding of zero (numpy's and torch's own bound for a matrix's rank).
    noise = float(values[0]) * max(shape[0], math.prod(shape[1:])) * torch.finfo(values.dtype).eps
    values = torch.where(values > noise, values, 0)
    count = keep.count(values)
    roots = values[:count].sqrt()
    one, two = up[:, :count] * roots, roots[:, None] * down[:count]
    kernel = shape[2:]
    return Cut(
        one.float().reshape(shape[0], count, *[1] * len(kernel)),
        two.float().reshape(count, *shape[1:]),
        float(values.double().norm()),
        float(values[count:].double().norm()),
    )
