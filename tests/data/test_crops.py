"""Where pictures are cut."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tunekit.data.buckets import Fit, plan
from tunekit.data.crops import RANDOM_CROPS, best_place, fits
from tunekit.schema_data import Data


def section(crop: str) -> Data:
    return Data.model_validate({"source": "x", "trigger": "zorp", "class": "robot", "crop": crop})


def never(middle: Fit) -> float:
    raise AssertionError("nobody asked for a smart crop")


def at(width: int, height: int, crop: str, pixels: str = "a") -> list[Fit]:
    return fits(width, height, pixels, 64, section(crop), 8, never)


def test_random_crops_are_fixed_places_all_along_the_side() -> None:
    wide = at(800, 100, "random")
    assert len(wide) == RANDOM_CROPS
    assert wide == at(800, 100, "random")
    assert wide != at(800, 100, "random", "b")
    assert [fit.left * RANDOM_CROPS // 700 for fit in wide] == [0, 1, 2, 3]
    assert len(at(100, 100, "random")) == 1
    assert [fit.left for fit in at(300, 100, "center")] == [100]


def smart(image: Image.Image, mask: Image.Image | None = None) -> Fit:
    found = fits(
        *image.size, "a", 64, section("smart"), 8, lambda fit: best_place(image, mask, fit)
    )
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("where", [0, 130, 300])
def test_a_smart_crop_holds_the_mask(where: int, turned: bool) -> None:
    image, mask = Image.new("RGB", (400, 100)), Image.new("L", (400, 100))
    mask.paste(255, (where, 20, where + 60, 80))
    image.paste("white", (170, 0, 180, 100))  # the detail is elsewhere and does not count
    if turned:
        image, mask = (
            image.transpose(Image.Transpose.TRANSPOSE),
            mask.transpose(Image.Transpose.TRANSPOSE),
        )
    fit = smart(image, mask)
    start, stop = (fit.top, fit.bottom) if turned else (fit.left, fit.right)
    assert start <= where < where + 60 <= stop
    if where == 130:
        assert (start + stop) / 2 == where + 30


@pytest.mark.parametrize("where", [0, 90, 290])
def test_without_a_mask_it_holds_the_detail(where: int) -> None:
    values = np.full((100, 400, 3), 90, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    values[20:80, where : where + 80] = noise
    fit = smart(Image.fromarray(values))
    assert fit.left <= where + 1
    assert where + 79 <= fit.right


def test_a_blank_picture_is_cut_in_the_middle() -> None:
    assert smart(Image.new("RGB", (400, 100), "red")) == plan(400, 100, 64, section("center"), 8)
    assert smart(Image.new("RGB", (2000, 300), "red")).left == 850


def test_a_square_picture_needs_no_place() -> None:
    assert fits(100, 100, "a", 64, section("smart"), 8, never)[0].box == (0, 0, 100, 100)
