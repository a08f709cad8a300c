"""The forward passes of a step: which pictures each sees, at which timesteps, with which noise.

All of it is drawn for the whole step, picture by picture, so that a batch in parts, or shared out
over several processes, sees the same numbers as the batch in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunekit import seeding
from tunekit.guards import Seen

if TYPE_CHECKING:
    from tunekit.data.dataset import Batch
    from tunekit.objective import Goal
    from tunekit.ranks import Ranks
    from tunekit.schema import Train

Batches = Callable[[int, int], "Batch | Sequence[Batch]"]
"""(step, micro) -> the pictures of that micro-batch, of several processes this one's, beside which
may stand batches of the class (`Batch.prior`); both count from 0."""


@dataclass(frozen=True)
class Pass:
    """One forward pass. first: its first picture's place among the step's of its kind (subject or
    prior). total: how many of its kind this process sees in the step. timesteps: [B]."""

    batch: Batch
    step: int
    micro: int
    first: int
    total: int
    timesteps: Tensor

    @property
    def kind(self) -> str:
        """Put before a purpose: pictures of the class never change the subject's draws."""
        return "prior " if self.batch.prior else ""

    def seen(self) -> list[Seen]:
        """Return its pictures as a guard tells of them."""
        batch, timesteps = self.batch, self.timesteps.tolist()
        return list(map(Seen, batch.names, batch.captions, timesteps))

    def noise(self, goal: Goal, seed: int) -> tuple[Tensor, Tensor]:
        """Return what is asked for and what the denoiser sees, each [B, C, h, w] on the CPU.

        Drawn picture by picture: the same whatever the batch and the device.
        """
        shape = tuple(self.batch.latents.shape[1:])
        draws = [
            goal.noise(
                shape,
                seeding.generator(seed, f"{self.kind}noise/{self.first + i}", self.step),
            )
            for i in range(len(self.batch.names))
        ]
        asked, seen = (torch.stack(part) for part in zip(*draws, strict=True))
        return asked, seen


def passes_of(step: int, batches: Batches, settings: Train, goal: Goal, ranks: Ranks) -> list[Pass]:
    """Ask for a step's batches and give each its share of the step's timesteps."""
    asked: list[tuple[int, Batch]] = []
    for micro in range(settings.gradient_accumulation):
        given = batches(step, micro)
        parts = given if isinstance(given, Sequence) else [given]
        asked += [(micro, batch) for batch in parts]
    cells: dict[bool, list[int]] = {False: [], True: []}
    for _, batch in asked:
        # The other processes' pictures of a batch are as many, and of the same shape.
        count = len(batch.names) * ranks.count
        cells[batch.prior] += [batch.latents[0, 0].numel()] * count
    assert cells[False], "a step without pictures of the subject"
    drawn = {
        prior: goal.timesteps(cells[prior], seeding.generator(settings.seed, purpose, step))
        for prior, purpose in ((False, "timesteps"), (True, "prior timesteps"))
    }
    seen = {False: 0, True: 0}
    passes = []
    for micro, batch in asked:
        count = len(batch.names)
        first = seen[batch.prior] + ranks.rank * count
        seen[batch.prior] += ranks.count * count
        total = len(cells[batch.prior]) // ranks.count
        own = drawn[batch.prior][first : first + count]
        passes.append(Pass(batch, step, micro, first, total, own))
    return passes
