"""Checks of many pictures at once, on what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tunekit.data.checks import duplicates, origin_kind, seldom
from tunekit.data.measures import BLURRED, EDGES, SAME_BITS, Measures, measure
from tunekit.data.records import Example


def example(number: int) -> Example:
    name = f"{number:04}.png"
    return Example(Path(name), name, ("a",), "template", 64, 64, str(number), str(number))


def looks(count: int) -> list[Measures]:
    rng = np.random.default_rng(0)
    return [
        Measures(
            detail=(2.0,) * len(EDGES),
            hash=int(rng.integers(0, 2**63)),
            mirrored=int(rng.integers(0, 2**63)),
            greys=rng.integers(0, 256, 256, dtype=np.uint8).tobytes(),
            border=rng.integers(0, 256, 132, dtype=np.uint8).tobytes(),
            blank=False,
        )
        for _ in range(count)
    ]


def with_hash(look: Measures, hash_: int) -> Measures:
    return Measures(look.detail, hash_, look.mirrored, look.greys, look.border, look.blank)


def flipped(hash_: int, bits: Sequence[int]) -> int:
    for bit in bits:
        hash_ ^= 1 << bit
    return hash_


@pytest.mark.parametrize("other", [1, 63, 64, 199])
def test_a_pair_is_found_wherever_it_stands(other: int) -> None:
    measured = looks(200)
    measured[other] = with_hash(measured[other], flipped(measured[0].hash, range(SAME_BITS)))
    (found,) = duplicates([example(number) for number in range(200)], measured)
    assert found.names == ("0000.png", f"{other:04}.png")
    measured[other] = with_hash(measured[other], flipped(measured[0].hash, range(SAME_BITS + 2)))
    assert not duplicates([example(number) for number in range(200)], measured)


def test_pictures_that_hang_together_are_one_group() -> None:
    measured = looks(100)
    for number in (10, 90):  # each near to the one before, the last not to the first
        before = measured[number - 10 if number == 10 else 10].hash
        measured[number] = with_hash(measured[number], flipped(before, range(number % 7, 60, 7)))
    (found,) = duplicates([example(number) for number in range(100)], measured)
    assert found.names == ("0000.png", "0010.png", "0090.png")


def test_a_mirrored_hash_is_that_of_the_mirrored_picture() -> None:
    coarse = np.random.default_rng(3).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((120, 80), Image.Resampling.BICUBIC)
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert (measure(picture).mirrored ^ measure(mirror).hash).bit_count() <= 2
    assert (measure(picture).hash ^ measure(mirror).hash).bit_count() > SAME_BITS


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("contrast", [0.5, 1.0])
def test_detail_tells_blur_whatever_the_contrast(edge: int, contrast: float) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize((edge, edge), Image.Resampling.NEAREST)
    picture = picture.point(lambda value: round(128 + (value - 128) * contrast))
    sharp = measure(picture).detail_at(edge)
    soft = measure(picture.filter(ImageFilter.GaussianBlur(edge / 80 + 1.5))).detail_at(edge)
    assert sharp is not None
    assert soft is not None
    assert sharp > 2 * BLURRED
    assert soft < BLURRED


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (3, 3), (700, 5)])
def test_any_size_can_be_measured(size: tuple[int, int]) -> None:
    look = measure(Image.linear_gradient("L").resize(size).convert("RGB"))
    assert len(look.detail) == len(EDGES)
    assert len(look.greys) == 256


@pytest.mark.parametrize(
    ("origin", "kind"),
    [
        ("template", "the template"),
        ("metadata.jsonl:3", "metadata.jsonl"),
        ("sub/a:b.txt", ".txt files"),
        ("a.caption", ".caption files"),
        ("folder 10_zorp robot", "folder names"),
        ("shard-000.parquet:17", "shard-000.parquet"),
        ("someone/robots:train", "someone/robots:train"),
    ],
)
def test_where_captions_are_from(origin: str, kind: str) -> None:
    assert origin_kind(origin) == kind


def test_pictures_that_may_never_be_shown() -> None:
    (found,) = seldom([example(0), example(1)], [(0, 1), (1, 1)])
    assert found.names == ("0000.png",)
    assert not seldom([example(0)], [(1, 2)])
