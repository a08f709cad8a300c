"""The scores: what was learned, what was kept, what was copied. Pure functions of unit vectors.

Every score stands between a floor (what the untouched base gets) and a ceiling (what real pictures
get), because a bare cosine says nothing: 0.7 can be perfect for one encoder and chance for another.
Rows are unit vectors from `tunekit.evaluation.embedders`; cosines are -1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_GAP = 1e-3  # of cosine: a share of less is a share of rounding and noise
POINTS = 100  # prompt fidelity is told in hundredths of cosine


@dataclass(frozen=True)
class Score:
    """One number with its floor and ceiling; `closed` is the share of the gap between them.

    `closed` is null where there is no ceiling, or where the gap is so small that a share of it
    would be noise.
    """

    score: float
    floor: float | None
    ceiling: float | None
    closed: float | None

    @classmethod
    def between(
        cls, score: float, floor: float, ceiling: float | None, gap: float = SMALLEST_GAP
    ) -> Score:
        """Place `score` between its floor and ceiling; `gap` is the smallest that counts."""
        return cls(score, floor, ceiling, share_closed(score, floor, ceiling, gap))


def share_closed(
    score: float, floor: float, ceiling: float | None, gap: float = SMALLEST_GAP
) -> float | None:
    """Return (score - floor) / (ceiling - floor): 0 is the untouched base, 1 a real picture.

    Below 0 and above 1 are possible and are reported as they are. None where there is no ceiling
    or it stands less than `gap` above the floor.
    """
    if ceiling is None or ceiling - floor < gap:
        return None
    return (score - floor) / (ceiling - floor)


def smallest_gap(floors: Sequence[float]) -> float:
    """Return the gap that a ceiling must stand above the floor for a share of it to mean something.

    Two standard errors of the floor over its pictures (and never less than SMALLEST_GAP): below
    that, the untouched base cannot be told from real pictures.
    """
    if len(floors) < 2:
        return SMALLEST_GAP
    centre = mean(floors)
    variance = math.fsum((value - centre) ** 2 for value in floors) / (len(floors) - 1)
    return max(SMALLEST_GAP, 2 * math.sqrt(variance / len(floors)))


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean, summed exactly so that the order cannot change it."""
    return math.fsum(values) / len(values)


def likeness(pictures: Tensor, references: Tensor) -> list[float]:
    """Return each picture's mean cosine to all references, [N, D] and [M, D] to N numbers.

    The subject fidelity of DreamBooth (Ruiz et al., CVPR 2023, section 4.2: the mean pairwise
    cosine of generated and real pictures; "DINO" and "CLIP-I" there, by encoder).
    """
    return [float(row) for row in (pictures @ references.T).double().mean(dim=1)]


def ceiling_of(references: Tensor, held_out: Tensor | None) -> tuple[float | None, str | None]:
    """Return what real pictures score against the references, and how that was found.

    With held-out pictures: their likeness ("held-out"). Without: the mean cosine between different
    training pictures ("training pictures"; "real images" in DreamBooth, table 1). A single training
    picture and nothing held out has no ceiling.
    """
    if held_out is not None:
        return mean(likeness(held_out, references)), "held-out"
    count = len(references)
    if count < 2:
        return None, None
    cosines = (references @ references.T).double()
    total = float(cosines.sum() - cosines.diagonal().sum())
    return total / (count * (count - 1)), "training pictures"


def fidelity(pictures: Tensor, texts: Tensor) -> list[float]:
    """Return the cosine of each picture and its text in points (x 100), [N, D] and [N, D].

    The prompt fidelity "CLIP-T" of DreamBooth (Ruiz et al., CVPR 2023, section 4.2), which is
    CLIPScore (Hessel et al., EMNLP 2021) without its factor 2.5 and without cutting at 0.
    """
    return [POINTS * float(value) for value in (pictures * texts).double().sum(dim=1)]


def chance_fidelity(pictures: Tensor, texts: Tensor, prompts: Sequence[int]) -> float | None:
    """Return the fidelity, in points, of pictures to the *other* prompts' texts.

    `prompts[i]` is the index of the prompt that row i was drawn from. What a model that ignores
    its prompts would score: the zero of the share kept. None where there is one prompt only.
    """
    cosines = (pictures @ texts.T).double()
    others = [
        float(cosines[row, column])
        for row in range(len(prompts))
        for column in range(len(prompts))
        if prompts[row] != prompts[column]
    ]
    return POINTS * mean(others) if others else None


def shift(with_adapter: Tensor, without: Tensor) -> list[float]:
    """Return 1 - cosine of pictures drawn from the same prompt and seed with and without adapter.

    0: the adapter left the picture alone. [N, D] twice to N numbers of 0 to 2.
    """
    return [1 - float(value) for value in (with_adapter * without).double().sum(dim=1)]


def seed_spread(pictures: Tensor) -> float | None:
    """Return the mean distance (1 - cosine) between pictures of one prompt and different seeds.

    The yardstick for `shift`: how far apart the base's own pictures of the prompt are. It is also
    DreamBooth's diversity (Ruiz et al., CVPR 2023, section 4.3, there by LPIPS). None for one row.
    """
    count = len(pictures)
    if count < 2:
        return None
    cosines = (pictures @ pictures.T).double()
    return 1 - float(cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))


def diversity(pictures: Tensor, base: Tensor) -> float | None:
    """Return how much pictures of one prompt differ among themselves, as a share of the base's.

    [N, D] with the adapter and [M, D] without, of one prompt and different seeds: 1 is the base's
    own diversity, 0 the same picture for every seed, which is where a class ends that training
    without pictures of it wears down (Ruiz et al., CVPR 2023, section 4.3: the diversity that the
    prior preserves). None for fewer than two rows on a side, or a base that draws one picture.
    """
    after, before = seed_spread(pictures), seed_spread(base)
    if after is None or before is None or before < SMALLEST_GAP:
        return None
    return after / before


def nearest(pictures: Tensor, references: Tensor) -> list[tuple[int, float]]:
    """Return (index, cosine) of the nearest training picture of each picture.

    In a whole-picture embedding, a signal of memorisation: Somepalli et al., "Diffusion Art or
    Digital Forgery?" (CVPR 2023).
    """
    best = (pictures @ references.T).double().max(dim=1)
    return [(int(i), float(v)) for i, v in zip(best.indices, best.values, strict=True)]


TILES, EDGE = 4, 32


def tile_distance(pictures: Tensor, references: Tensor) -> Tensor:
    """Return how far pictures are apart where they differ most: [N, M].

    pictures: [N, 3, 32, 32], references: [M, 3, 32, 32], values 0 to 1 (`measure.small_pixels`).
    The root mean square difference of pixels (0 to 1) in the worst of 4 x 4 tiles: the patched
    distance by which Carlini et al. (USENIX Security 2023, section 4) find memorised pictures. The
    maximum over tiles keeps two pictures with the same sky from counting as the same picture.
    """
    difference = (pictures[:, None].double() - references[None].double()) ** 2
    side = EDGE // TILES
    tiles = difference.reshape(len(pictures), len(references), 3, TILES, side, TILES, side)
    return tiles.mean(dim=(2, 4, 6)).sqrt().amax(dim=(2, 3))


def closest_real_pair(references: Tensor, held_out: Tensor | None) -> float | None:
    """Return the smallest tile distance between two different real pictures of the subject.

    Among the training pictures and from held-out ones to them; pictures that are the same pixel for
    pixel (duplicates in the data) do not count. None where there is no pair.
    """
    found = tile_distance(references, references).flatten()
    if held_out is not None:
        import torch

        found = torch.cat([found, tile_distance(held_out, references).flatten()])
    found = found[found > 1e-9]
    return float(found.min()) if len(found) else None


def copies(
    pictures: Tensor, references: Tensor, closest: float | None
) -> list[tuple[int, float, bool]]:
    """Return (index, tile distance, copied) of the training picture each picture is closest to.

    A picture is taken for a copy when it is less than half as far from a training picture as any
    two different real pictures are from each other (`closest`, see `closest_real_pair`).
    """
    best = tile_distance(pictures, references).min(dim=1)
    return [
        (int(index), float(distance), closest is not None and float(distance) < closest / 2)
        for index, distance in zip(best.indices, best.values, strict=True)
    ]


def interval(
    scores: Sequence[float],
    floors: Sequence[float],
    ceiling: float | None,
    prompts: Sequence[int],
    seed: int,
    rounds: int = 2000,
) -> tuple[float, float] | None:
    """Return the 95 % interval of the share closed, had other prompts and seeds been drawn.

    A bootstrap (Efron, Annals of Statistics 1979) over prompts, because pictures of one prompt
    resemble each other; its random numbers come from `seed`. None for fewer than 3 prompts.
    """
    import torch

    from tunekit.seeding import generator

    names = sorted(set(prompts))
    if len(names) < 3:
        return None
    per_prompt = [
        [
            mean([value for value, prompt in zip(values, prompts, strict=True) if prompt == name])
            for name in names
        ]
        for values in (scores, floors)
    ]
    table = torch.tensor(per_prompt, dtype=torch.float64)
    draws = torch.randint(
        len(names), (rounds, len(names)), generator=generator(seed, "score interval")
    )
    score, floor = table[:, draws].mean(dim=2)
    if ceiling is None or bool((ceiling - floor < SMALLEST_GAP).any()):
        return None
    shares = ((score - floor) / (ceiling - floor)).sort().values
    return float(shares[int(0.025 * rounds)]), float(shares[int(0.975 * rounds) - 1])
