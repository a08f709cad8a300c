"""What the loss counts is what the mask shows, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tunekit.data import masks
from tunekit.data.buckets import Fit, cover
from tunekit.data.images import PictureError, decode
from tunekit.schema_data import Mask


def drawn(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=np.uint8))


def whole(mask: Image.Image) -> Fit:
    return Fit(0, 0, mask.width, mask.height, mask.width * 8, mask.height * 8)


def test_a_cell_is_the_mean_of_the_pixels_it_stands_for() -> None:
    mask = drawn([[255, 0, 255, 255], [0, 0, 255, 255], [51, 51, 0, 0], [51, 51, 0, 102]])
    found = masks.weights(mask, whole(mask), (2, 2), background=0)
    assert found.shape == (1, 2, 2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0], [[0.25, 1], [0.2, 0.1]], rtol=1e-6)


def test_parts_of_pixels_count_as_parts() -> None:
    mask = drawn([[255, 0, 0]])  # a cell of the two is one pixel and a half wide
    found = masks.weights(mask, whole(mask), (2, 1), background=0)
    np.testing.assert_allclose(found[0], [[2 / 3, 0]], rtol=1e-6)
    mask = drawn([[255, 0], [0, 0]])  # a picture may be smaller than the latents
    found = masks.weights(mask, whole(mask), (4, 2), background=0)
    np.testing.assert_allclose(found[0], [[1, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(("background", "black"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_the_background_has_its_weight(background: float, black: float) -> None:
    mask = drawn([[255, 0]])
    found = masks.weights(mask, whole(mask), (2, 1), background)
    np.testing.assert_allclose(found[0], [[1, black]])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_the_weights_keep_the_mean_of_the_crop(data: st.DataObject, size: tuple[int, int]) -> None:
    seed = data.draw(st.integers(0, 99))
    values = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    bucket = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    fit = cover(*size, bucket, data.draw(st.floats(0, 1)))
    found = masks.weights(Image.fromarray(values), fit, bucket, background=0)
    inside = values[fit.top : fit.bottom, fit.left : fit.right]
    assert found.mean().item() == pytest.approx(inside.mean() / 255, abs=1e-5)
    assert 0 <= found.min().item() <= found.max().item() <= 1


def test_white_is_exactly_one() -> None:
    mask = Image.new("L", (37, 23), 255)
    assert (masks.weights(mask, cover(37, 23, (5, 3)), (5, 3), 0) == 1).all()


def test_a_mask_is_read_from_its_file_or_from_the_alpha(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1), "white").save(tmp_path / "mask.png")
    cut_out = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    cut_out.putpixel((1, 0), (255, 255, 255, 255))
    cut_out.save(tmp_path / "cut.png")
    picture = decode(tmp_path / "cut.png")
    files, alpha = Mask(), Mask(source="alpha")
    found = masks.of(files, picture, tmp_path / "mask.png")
    assert found is not None
    assert list(found.tobytes()) == [255, 255]
    for mask in (masks.of(alpha, picture, None), masks.read(tmp_path / "cut.png")):
        assert mask is not None
        assert list(mask.tobytes()) == [0, 255]
    assert masks.of(files, picture, None) is None
    with pytest.raises(PictureError, match="No such file"):
        masks.of(files, picture, tmp_path / "gone.png")


def test_digests_tell_masks_apart() -> None:
    one = drawn([[0, 255]])
    assert masks.digest(one) == masks.digest(drawn([[0, 255]]))
    assert masks.digest(one) != masks.digest(drawn([[0], [255]])) != masks.digest(one.rotate(180))
    assert masks.coverage(one) == 0.5


def test_what_cannot_be_used_is_told_with_what_to_do() -> None:
    mask = drawn([[0, 255]])
    assert masks.check(mask, 2, 1, Mask()) is None
    assert masks.check(mask, 4, 2, Mask()) == (
        "its mask is 2x1, the picture 4x2: save the mask at the picture's size"
    )
    black = drawn([[0, 0]])
    assert "black everywhere" in str(masks.check(black, 2, 1, Mask()))
    assert "alpha channel is transparent" in str(masks.check(black, 2, 1, Mask(source="alpha")))
    left = [Fit(0, 0, 1, 1, 8, 8)]
    assert "data.crop: smart" in str(masks.check(mask, 2, 1, Mask(), left))
    assert masks.check(mask, 2, 1, Mask(background_weight=0.1), left) is None
