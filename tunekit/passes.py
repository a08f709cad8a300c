"""The forward passes of a step: which pictures each sees, at which timesteps, with which noise.

All of it is drawn for the whole step, picture by picture, so that a batch in parts, or shared out
over several processes, sees the same numbers as the batch in one piece. Pictures of the class go
through the denoiser with those of the subject where their shapes are one: a pass of four costs less
than two of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
class Part:
    """The pictures of one kind, subject or prior, in a forward pass. first: its first picture's
    place among the step's of its kind. total: how many of its kind this process sees in the step.
    timesteps: [B]."""

    batch: Batch
    step: int
    micro: int
    first: int
    total: int
    timesteps: Tensor

    @property
    def kind(self) -> str:
        """Put before a purpose: pictures of the class never change the subject's noise."""
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

    def fits(self, other: Part) -> bool:
        """Return whether both are of one micro-batch and one shape, and so make one pass."""
        return self.micro == other.micro and _shapes(self.batch) == _shapes(other.batch)


@dataclass(frozen=True)
class Pass:
    """One forward pass: the pictures of its parts, one after the other."""

    parts: tuple[Part, ...]

    @property
    def kind(self) -> str:
        """Put before the purpose of what layers draw."""
        return self.parts[0].kind

    @property
    def timesteps(self) -> Tensor:
        """[B] int64 of all its pictures."""
        return torch.cat([part.timesteps for part in self.parts])

    def joined(self) -> Batch:
        """Return all its pictures as one batch; weights and masks that one part lacks are 1."""
        batches = [part.batch for part in self.parts]
        if len(batches) == 1:
            return batches[0]
        cells = [batch.latents[:, :1] for batch in batches]
        return replace(
            batches[0],
            latents=torch.cat([batch.latents for batch in batches]),
            conditioning={
                name: torch.cat([batch.conditioning[name] for batch in batches])
                for name in batches[0].conditioning
            },
            names=tuple(name for batch in batches for name in batch.names),
            captions=tuple(caption for batch in batches for caption in batch.captions),
            weights=_one_where_none([b.weights for b in batches], [c[:, 0, 0, 0] for c in cells]),
            mask=_one_where_none([batch.mask for batch in batches], cells),
            sizes=_one_where_none([batch.sizes for batch in batches], cells),
        )

    def noise(self, goal: Goal, seed: int) -> tuple[Tensor, Tensor]:
        """Return what is asked for and what the denoiser sees of all its pictures."""
        draws = [part.noise(goal, seed) for part in self.parts]
        asked, seen = (torch.cat(each) for each in zip(*draws, strict=True))
        return asked, seen

    def split(self, each: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Go through its parts, each with its rows of a tensor of all pictures, [B, ...]."""
        counts = [len(part.batch.names) for part in self.parts]
        return zip(self.parts, torch.split(each, counts), strict=True)


def _one_where_none(given: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    """Return what is given of each part in one; None where none has any."""
    if all(one is None for one in given):
        return None
    pairs = zip(given, like, strict=True)
    return torch.cat(
        [torch.ones_like(other).float() if one is None else one for one, other in pairs]
    )


def _shapes(batch: Batch) -> tuple[object, ...]:
    """Return what must be equal for two batches to stand in one."""
    told = {name: (value.shape[1:], value.dtype) for name, value in batch.conditioning.items()}
    return batch.latents.shape[1:], batch.latents.dtype, told, batch.sizes is None


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
    passes: list[Pass] = []
    for micro, batch in asked:
        count = len(batch.names)
        first = seen[batch.prior] + ranks.rank * count
        seen[batch.prior] += ranks.count * count
        total = len(cells[batch.prior]) // ranks.count
        own = drawn[batch.prior][first : first + count]
        part = Part(batch, step, micro, first, total, own)
        if passes and passes[-1].parts[-1].fits(part):
            passes[-1] = Pass((*passes[-1].parts, part))
        else:
            passes.append(Pass((part,)))
    return passes
