"""Every picture in one bucket, of its own shape as nearly as can be, and never enlarged unasked."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunekit.data.buckets import MOST_ENLARGED, Fit, cover, faults, plan, sizes
from tunekit.errors import UserError
from tunekit.schema_data import Buckets, Data

EDGES = st.integers(1, 6000)
BUCKETS = st.sampled_from(
    [None, Buckets(), Buckets(step=8), Buckets(step=64, min=256, max=1024), Buckets(min=64, step=1)]
)


def section(buckets: Buckets | None = None, **changes: object) -> Data:
    return Data.model_validate(
        {"source": "x", "trigger": "zorp", "class": "robot", "buckets": buckets, **changes}
    )


def off(fit: Fit, width: int, height: int) -> float:
    return abs(math.log(fit.width / fit.height) - math.log(width / height))


def test_without_buckets_there_is_the_square() -> None:
    assert sizes(512, None, 8) == ((512, 512),)
    assert plan(700, 900, 512, section(), 8) == Fit(0, 100, 700, 800, 512, 512)
    assert plan(700, 900, 512, section(), 8, place=0).top == 0


@given(
    resolution=st.integers(64, 2048),
    step=st.sampled_from([8, 16, 64, 100]),
    multiple=st.sampled_from([8, 16, 32]),
)
def test_buckets_have_about_the_area_of_the_square(
    resolution: int, step: int, multiple: int
) -> None:
    unit = math.lcm(step, multiple)
    assume(unit <= resolution / 2)  # else there may be none; see below
    found = sizes(resolution, Buckets(step=step), multiple)
    assert len(set(found)) == len(found)
    for width, height in found:
        assert width % unit == height % unit == 0
        assert resolution // 2 <= min(width, height)
        assert max(width, height) <= resolution * 2
        assert width * height <= resolution**2
        # One step more along an edge would be too much, or longer than allowed.
        assert any(
            long + unit > resolution * 2 or (long + unit) * other > resolution**2
            for long, other in ((width, height), (height, width))
        )
    assert {(height, width) for width, height in found} == set(found)


@given(width=EDGES, height=EDGES, buckets=BUCKETS, upscale=st.booleans(), place=st.floats(0, 1))
def test_every_picture_lands_in_exactly_one_bucket_or_is_refused(
    width: int, height: int, buckets: Buckets | None, upscale: bool, place: float
) -> None:
    data = section(buckets, upscale=upscale)
    if said := faults(width, height, 512, data, 8):
        assert said.startswith(f"{width}x{height} ")
        assert "take a larger picture" in said
        with pytest.raises(UserError, match=f"{width}x{height}"):
            plan(width, height, 512, data, 8)
        return
    fit = plan(width, height, 512, data, 8, place)
    assert 0 <= fit.left < fit.right <= width
    assert 0 <= fit.top < fit.bottom <= height
    # Only one axis is cut: the box is as large as its shape allows.
    assert fit.right - fit.left == width or fit.bottom - fit.top == height
    assert fit.width * fit.height <= 512**2
    assert fit.width % 8 == fit.height % 8 == 0
    assert fit.scale <= (MOST_ENLARGED if upscale else 1)
    centre = plan(width, height, 512, data, 8)
    assert (centre.width, centre.height) == (fit.width, fit.height)
    # The box has the bucket's aspect but for less than a pixel.
    wide, high = fit.right - fit.left, fit.bottom - fit.top
    assert abs(wide * fit.height - high * fit.width) <= max(fit.width, fit.height)


@given(width=st.integers(1024, 6000), height=st.integers(1024, 6000))
def test_a_large_picture_gets_the_bucket_of_the_nearest_aspect(width: int, height: int) -> None:
    data = section(Buckets())
    fit = plan(width, height, 512, data, 8)
    every = sizes(512, data.buckets, 8)
    assert (fit.width, fit.height) in every
    nearest = min(off(cover(width, height, size), width, height) for size in every)
    assert off(fit, width, height) == pytest.approx(nearest, abs=1e-8)


def test_a_tie_goes_to_the_larger_and_then_to_the_wider() -> None:
    # The square picture has no square bucket here, and two that are equally far.
    data = section(Buckets(min=320, max=768, step=192))
    assert sizes(512, data.buckets, 8) == ((384, 576), (576, 384))
    fit = plan(2000, 2000, 512, data, 8)
    assert (fit.width, fit.height) == (576, 384)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((511, 511), (448, 448)),  # not 512, which would enlarge it
        ((512, 511), (448, 448)),  # not 512x448, which would cut an eighth off
        ((600, 440), (512, 384)),
        ((300, 400), (256, 320)),
        ((300, 5000), (256, 1024)),
    ],
)
def test_a_smaller_picture_gets_a_smaller_bucket(
    size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    fit = plan(*size, 512, section(Buckets()), 8)
    assert (fit.width, fit.height) == bucket
    assert fit.scale <= 1
    larger = plan(*size, 512, section(Buckets(), upscale=True), 8)
    assert larger.width * larger.height > fit.width * fit.height or size == (300, 5000)


def test_what_is_too_small_is_refused_with_what_to_do() -> None:
    said = faults(200, 300, 512, section(Buckets()), 8)
    assert said is not None
    assert "smallest bucket, whose edges are 256 pixels" in said
    assert all(key in said for key in ("data.buckets.min", "data.upscale: true"))
    said = faults(500, 600, 512, section(), 8)
    assert said is not None
    assert "smaller than the resolution of 512" in said
    assert all(key in said for key in ("data.resolution", "data.buckets", "data.upscale: true"))
    said = faults(1, 1, 512, section(upscale=True), 8)
    assert said is not None
    assert "enlarged more than 8 times" in said
    assert faults(64, 64, 512, section(upscale=True), 8) is None


def test_impossible_buckets_are_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.buckets: .* 32 to 128 .* steps of 192 .* 64x64"):
        sizes(64, Buckets(step=64), 24)


def test_why_buckets_are_impossible_is_told_with_what_was_typed() -> None:
    def says(**keys: Any) -> str:
        with pytest.raises(UserError) as caught:
            sizes(64, Buckets(**keys), 8)
        return str(caught.value)

    said = says(step=100)
    assert "steps of 200 (data.buckets.step: 100; edges are multiples of 8 as well)" in said
    assert "in steps of 512 and no" in says(step=512)
    said = says(min=500)
    assert "shortest edge (500 pixels) is longer than the longest (128, twice the reso" in said
    assert "shortest edge (32 pixels, half the resolution of 64) is longer" in says(max=16)
    with pytest.raises(ValidationError, match="256 is less than min, 512"):
        Buckets(min=512, max=256)


def test_a_picture_of_its_buckets_size_is_not_touched() -> None:
    fit = plan(640, 384, 512, section(Buckets()), 8)
    assert fit == Fit(0, 0, 640, 384, 640, 384)
    assert (fit.scale, fit.cut(640, 384)) == (1, 0)
    assert plan(512, 1024, 512, section(), 8).cut(512, 1024) == 0.5
