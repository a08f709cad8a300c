"""Scores worked out by hand on small vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tunekit.evaluation import scores
from tunekit.evaluation.scores import Score


def at(*degrees: float) -> Tensor:
    """Return unit vectors in the plane."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def test_likeness_is_the_mean_cosine_to_all_references() -> None:
    found = scores.likeness(at(0, 90), at(0, 60))
    assert found == pytest.approx([(1 + 0.5) / 2, (0 + cosine(30)) / 2], abs=1e-6)


def test_the_ceiling_comes_from_held_out_pictures_where_there_are_any() -> None:
    value, source = scores.ceiling_of(at(0, 60), at(30))
    assert source == "held-out"
    assert value == pytest.approx(cosine(30), abs=1e-6)


def test_without_held_out_pictures_the_training_ones_judge_each_other() -> None:
    value, source = scores.ceiling_of(at(0, 60, 120), None)
    assert source == "training pictures"
    assert value == pytest.approx((0.5 + 0.5 - 0.5) / 3, abs=1e-6)  # never a picture with itself
    assert scores.ceiling_of(at(0), None) == (None, None)


@pytest.mark.parametrize(
    ("score", "floor", "ceiling", "share"),
    [
        (0.5, 0.5, 0.9, 0.0),
        (0.9, 0.5, 0.9, 1.0),
        (0.7, 0.5, 0.9, 0.5),
        (1.0, 0.5, 0.9, 1.25),  # better than real pictures is told, not cut
        (0.3, 0.5, 0.9, -0.5),
        (0.7, 0.5, None, None),
        (0.7, 0.5, 0.5005, None),  # no gap to close
        (0.7, 0.9, 0.5, None),
    ],
)
def test_share_closed(
    score: float, floor: float, ceiling: float | None, share: float | None
) -> None:
    assert scores.share_closed(score, floor, ceiling) == pytest.approx(share)
    assert Score.between(score, floor, ceiling).closed == pytest.approx(share)


def test_a_gap_within_the_noise_of_the_floor_counts_as_none() -> None:
    assert scores.smallest_gap([0.5]) == scores.SMALLEST_GAP
    assert scores.smallest_gap([0.5] * 9) == scores.SMALLEST_GAP
    spread = scores.smallest_gap([0.4, 0.6, 0.4, 0.6])
    assert spread == pytest.approx(2 * math.sqrt(0.04 / 3) / 2)


def test_fidelity_is_told_in_points() -> None:
    assert scores.fidelity(at(0, 0), at(0, 60)) == pytest.approx([100, 50], abs=1e-4)


def test_chance_is_the_fidelity_to_other_prompts() -> None:
    pictures, texts = at(0, 0, 90), at(0, 0, 60)
    chance = scores.chance_fidelity(pictures, texts, [0, 0, 1])
    assert chance == pytest.approx(100 * (0.5 + 0.5 + 0 + 0) / 4, abs=1e-4)
    assert scores.chance_fidelity(pictures, texts, [0, 0, 0]) is None


def test_shift_and_its_yardstick() -> None:
    assert scores.shift(at(0, 10), at(0, 70)) == pytest.approx([0, 0.5], abs=1e-6)
    assert scores.seed_spread(at(0, 60)) == pytest.approx(0.5, abs=1e-6)
    assert scores.seed_spread(at(0)) is None


def test_diversity_is_a_share_of_the_base_s_own() -> None:
    base = at(0, 60)  # half a cosine apart
    assert scores.diversity(base, base) == pytest.approx(1)
    assert scores.diversity(at(0, 90), base) == pytest.approx(2, abs=1e-5)  # more is told, not cut
    assert scores.diversity(at(10, 10, 10), base) == pytest.approx(0, abs=1e-5)
    some = scores.diversity(at(0, 60, 0), base)  # of three pairs, one is alike
    assert some == pytest.approx(2 / 3, abs=1e-5)
    assert scores.diversity(at(0), base) is None
    assert scores.diversity(base, at(0)) is None
    assert scores.diversity(base, at(5, 5)) is None  # a base that draws one picture has none


def test_nearest_training_picture() -> None:
    (index, similarity), (other, _) = scores.nearest(at(50, 5), at(0, 60, 90))
    assert (index, other) == (1, 0)
    assert similarity == pytest.approx(cosine(10), abs=1e-6)


def test_tile_distance_looks_at_the_worst_tile() -> None:
    flat = torch.zeros(1, 3, 32, 32)
    dotted = flat.clone()
    dotted[..., 8:16, 24:32] = 0.5  # exactly one tile
    spread = flat + 0.5 / 16
    assert scores.tile_distance(flat, flat).item() == 0
    assert scores.tile_distance(dotted, flat).item() == pytest.approx(0.5)
    assert scores.tile_distance(spread, flat).item() == pytest.approx(0.5 / 16)
    assert scores.tile_distance(torch.cat([flat, dotted]), spread).shape == (2, 1)


def test_copies_are_much_closer_than_two_real_pictures_ever_are() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(4, 3, 32, 32, generator=generator)
    closest = scores.closest_real_pair(real, None)
    assert closest is not None
    noise = 0.05 * torch.rand(3, 32, 32, generator=generator)
    fresh = torch.rand(3, 32, 32, generator=generator)
    found = scores.copies(torch.stack([real[2] + noise, fresh]), real, closest)
    assert [copied for _, _, copied in found] == [True, False]
    assert found[0][0] == 2


def test_the_same_picture_twice_in_the_data_is_no_yardstick() -> None:
    real = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    doubled = torch.cat([real, real[:1]])
    assert scores.closest_real_pair(doubled, None) == scores.closest_real_pair(real, None)
    assert scores.closest_real_pair(real[:1], None) is None
    assert scores.copies(real[:1], real[:1], None) == [(0, 0.0, False)]


def test_interval_holds_the_share_and_is_the_same_every_time() -> None:
    prompts = [0, 0, 1, 1, 2, 2, 3, 3]
    told = [0.7, 0.8, 0.75, 0.7, 0.8, 0.9, 0.6, 0.7]
    floor = [0.2, 0.3, 0.25, 0.2, 0.3, 0.2, 0.2, 0.25]
    share = scores.share_closed(scores.mean(told), scores.mean(floor), 0.9)
    assert share is not None
    bounds = scores.interval(told, floor, 0.9, prompts, seed=1)
    assert bounds is not None
    assert bounds[0] < share < bounds[1]
    assert bounds == scores.interval(told, floor, 0.9, prompts, seed=1)
    assert scores.interval(told, floor, None, prompts, seed=1) is None
    assert scores.interval(told[:4], floor[:4], 0.9, prompts[:4], seed=1) is None
