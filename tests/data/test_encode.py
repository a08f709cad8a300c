"""What is encoded, when a picture is decoded again, and what is refused then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tunekit.data import Cache, masks, preflight
from tunekit.data.encode import Item, encode_pictures, encode_texts, training_view
from tunekit.data.images import to_pixels
from tunekit.data.records import Example
from tunekit.errors import UserError
from tunekit.schema import Data
from tunekit.schema_data import Mask


def encode_image(pixels: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 4)


def never(*_: Any) -> Any:
    raise AssertionError("encoded again")


@pytest.fixture
def checked(data: Callable[..., Data]) -> Callable[..., tuple[Data, tuple[Example, ...]]]:
    def check(source: Path, **changes: Any) -> tuple[Data, tuple[Example, ...]]:
        section = data(source, **{"resolution": 16, **changes})
        return section, preflight(section, multiple=4).examples

    return check


def encode(examples: Any, section: Data, cache: Path, image: Any = encode_image) -> list[Item]:
    kept = Cache(cache)
    items = encode_pictures(
        examples,
        section,
        resolutions=section.resolutions,
        multiple=4,
        encode_image=image,
        image_fingerprint="vae",
        cache=kept,
    )
    kept.flush()
    return items


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A wide picture, white where its mask is, which is on the left."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    image, mask = Image.new("RGB", (64, 32), "black"), Image.new("L", (64, 32))
    for one in (image, mask):
        one.paste("white" if one is image else 255, (4, 8, 20, 24))
    image.save(folder / "a.png")
    mask.save(folder / "a.mask.png")
    return folder


def test_smart_crops_follow_the_mask_and_need_no_second_decoding(
    masked: Path, checked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data import encode as module

    section, examples = checked(masked, crop="smart", mask={})
    encode(examples, section, tmp_path / "cache")
    monkeypatch.setattr(module, "decode", never)
    (item,) = encode(examples, section, tmp_path / "cache", never)
    assert item.masks[0] is not None
    weights = item.masks[0].read()["weights"]
    # The subject stands whole in the crop: 16 x 16 of 32 x 32 pixels.
    assert weights.mean().item() == pytest.approx(0.25)
    bright = item.latents[0].read()["latents"].mean(0, keepdim=True)
    torch.testing.assert_close((bright + 1) / 2, weights, atol=0.15, rtol=0)


def test_a_crop_without_its_mask_is_refused_by_name(
    masked: Path, checked: Any, tmp_path: Path
) -> None:
    section, examples = checked(masked, mask={}, crop="smart")
    corner = Image.new("L", (64, 32))
    corner.paste(255, (0, 0, 4, 4))
    corner.save(masked / "a.mask.png")
    # The preflight would refuse it as well: encoding leans on nobody.
    examples = [dataclasses.replace(examples[0], mask_pixels=masks.digest(corner))]

    def again(background: float) -> list[Item]:
        changes = {"crop": "center", "mask": Mask(background_weight=background)}
        return encode(examples, section.model_copy(update=changes), tmp_path / "cache")

    with pytest.raises(UserError, match=r"a\.png: its crop leaves out all .* data\.crop: smart"):
        again(0)
    # With a background there is something to learn, and nothing of that is taken for the other.
    (item,) = again(0.5)
    assert item.masks[0] is not None
    assert (item.masks[0].read()["weights"] == 0.5).all()
    with pytest.raises(UserError, match="its crop leaves out all"):
        again(0)


def test_a_mask_that_changed_or_went_since_it_was_checked(
    masked: Path, checked: Any, tmp_path: Path
) -> None:
    section, examples = checked(masked, mask={})
    Image.new("L", (64, 32), 255).save(masked / "a.mask.png")
    with pytest.raises(UserError, match=r"a\.mask\.png: changed since the run checked it"):
        encode(examples, section, tmp_path / "cache")
    (masked / "a.mask.png").unlink()
    with pytest.raises(UserError, match=r"a\.mask\.png: was there at the start, now cannot be"):
        encode(examples, section, tmp_path / "cache")


def test_the_alpha_channel_is_a_mask(tmp_path: Path, checked: Any) -> None:
    (tmp_path / "p").mkdir()
    image = Image.new("RGBA", (16, 16), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 16))
    image.save(tmp_path / "p" / "a.png")
    section, examples = checked(
        tmp_path / "p", mask={"source": "alpha"}, background="black", flip=True
    )
    (item,) = encode(examples, section, tmp_path / "cache")
    plain, flipped = (entry.read()["weights"] for entry in item.masks if entry)
    assert plain[0, 0].tolist() == [1, 1, 0, 0]
    assert flipped[0, 0].tolist() == [0, 0, 1, 1]
    red = item.latents[0].read()["latents"][0, 0].tolist()
    assert red == [1, 1, -1, -1], "what is seen through is the background's colour"


def test_another_background_is_another_picture(tmp_path: Path, checked: Any) -> None:
    (tmp_path / "p").mkdir()
    Image.new("RGBA", (16, 16), (0, 0, 255, 100)).save(tmp_path / "p" / "a.png")
    for background in ("white", "black"):
        section, examples = checked(tmp_path / "p", background=background)
        encode(examples, section, tmp_path / "cache")
    section, examples = checked(tmp_path / "p", background="white")
    encode(examples, section, tmp_path / "cache", never)


def test_a_picture_without_a_mask_counts_whole(masked: Path, checked: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(masked / "b.png")
    section, examples = checked(masked, mask={}, flip=True)
    items = encode(examples, section, tmp_path / "cache")
    assert [len([m for m in item.masks if m]) for item in items] == [2, 0]
    assert all(len(item.masks) == len(item.latents) == 2 for item in items)


def test_the_training_view_is_what_is_encoded(masked: Path, checked: Any, tmp_path: Path) -> None:
    for changes in ({}, {"crop": "smart"}, {"buckets": {"step": 4, "min": 16}, "resolution": 32}):
        section, examples = checked(masked, mask={}, **changes)
        seen: list[Tensor] = []
        encode(
            examples,
            section,
            tmp_path / str(len(changes)),
            lambda pixels, seen=seen: (seen.append(pixels), encode_image(pixels))[1],
        )
        view = training_view(examples[0], section, section.resolutions[0], 4)
        assert torch.equal(to_pixels(view), seen[0][0])


def test_texts_are_encoded_once_each(tmp_path: Path) -> None:
    asked: list[str] = []

    def prompt(prompts: list[str]) -> dict[str, Tensor]:
        asked.extend(prompts)
        return {"x": torch.full((1, 2), float(len(prompts[0])))}

    options: dict[str, Any] = {"text_fingerprint": "t", "cache": Cache(tmp_path)}
    found = encode_texts(["b", "aaa", "b", ""], encode_prompt=prompt, **options)
    assert asked == ["", "aaa", "b"]
    assert {text: entry.read()["x"].tolist() for text, entry in found.items()} == {
        "": [0, 0],
        "aaa": [3, 3],
        "b": [1, 1],
    }
    encode_texts(["b", "aaa"], encode_prompt=never, **options)
