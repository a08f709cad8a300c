"""Every picture equally often, and every latent beside its own words."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tunekit.data import Batch, Cache, EncodedDataset, images, preflight
from tunekit.data.images import to_pixels
from tunekit.errors import UserError
from tunekit.schema import Data

# A picture's red and green are its number, and so are the digits of its caption: what encode_image
# and encode_prompt see can be told from a batch.


def colour_of(number: int) -> tuple[int, int, int]:
    return (number % 16 * 16, number // 16 * 16, 77)


def number_in(latents: Tensor) -> int:
    red, green, _ = ((latents.mean((-1, -2)) + 1) * 127.5).round().int().tolist()
    return int(red // 16 + green // 16 * 16)


def encode_image(pixels: Tensor) -> Tensor:
    assert pixels.shape[:2] == (1, 3)
    assert pixels.dtype == torch.float32
    return torch.nn.functional.avg_pool2d(pixels, 4)


def encode_prompt(prompts: list[str]) -> dict[str, Tensor]:
    numbers = [int("".join(filter(str.isdigit, p)) or "-1") for p in prompts]
    return {"hidden": torch.tensor(numbers)[:, None].expand(-1, 5).float()}


def never(*_: Any) -> Any:
    raise AssertionError("encoded again")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that paints numbered pictures with numbered captions."""

    def make(numbers: list[int], name: str = "pictures", prefix: str = "") -> Path:
        path = tmp_path / name
        path.mkdir()
        for place, number in enumerate(numbers):
            size = (32, 32 + 8 * (number % 3))
            image = Image.new("RGB", size, colour_of(number))
            image.paste((*colour_of(number)[:2], 200), (0, 0, 8, 48))  # blue tells left from right
            image.save(path / f"{prefix}{place}.png")
            (path / f"{prefix}{place}.txt").write_text(f"zorp number {number}")
        return path

    return make


@pytest.fixture
def encode(tmp_path: Path, data: Callable[..., Data]) -> Callable[..., EncodedDataset]:
    """Return a function that checks and encodes a folder with the functions above."""

    def run(source: Any, seed: int = 0, changes: Any = None, **options: Any) -> EncodedDataset:
        section = data("x", **(changes or {}))
        section = Data.model_validate(
            section.model_dump(by_alias=True)
            | {"source": source if isinstance(source, tuple) else str(source)}
        )
        defaults: dict[str, Any] = {
            "encode_image": encode_image,
            "image_fingerprint": "vae",
            "encode_prompt": encode_prompt,
            "text_fingerprint": "text",
            "cache": Cache(tmp_path / "cache"),
        }
        wanted = section.resolutions or (16,)
        sheet = preflight(section, None if section.resolutions else 16, multiple=4)
        return EncodedDataset.encode(
            sheet.examples,
            section,
            **{"resolution": wanted, "seed": seed, "multiple": 4, **defaults, **options},
        )

    return run


def check_pairing(batch: Batch, dropout: bool = False) -> None:
    for row, caption in enumerate(batch.captions):
        number = number_in(batch.latents[row])
        said = batch.conditioning["hidden"][row, 0].int().item()
        if caption or not dropout:
            assert caption == f"zorp number {number}"
            assert said == number
        else:
            assert said == -1


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.latents, other.latents)
        and one.captions == other.captions
        and all(torch.equal(v, other.conditioning[k]) for k, v in one.conditioning.items())
    )


def test_names_are_those_of_the_pictures(folder: Any, encode: Any) -> None:
    dataset = encode(folder([3, 30, 200], prefix="p"))
    for step in range(6):
        batch = dataset.batch(step, 0, 2)
        numbers = [[3, 30, 200][int(name[1])] for name in batch.names]
        assert numbers == [number_in(row) for row in batch.latents]


# Visits


def test_every_picture_and_every_variant_is_seen_equally_often(folder: Any, encode: Any) -> None:
    """Pictures of three shapes: three buckets of two, and batches of three."""
    changes = {"resolution": 32, "buckets": {"step": 4, "min": 16}, "flip": True}
    dataset = encode(folder([3, 4, 5, 6, 7, 8]), 0, changes)
    assert len({item.bucket for item in dataset.items}) == 3
    row = dataset.visits(3).round
    assert (row.epochs, row.batches) == (3, 6)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(row.batches * 2):
        batch = dataset.batch(step, 0, 3)
        check_pairing(batch)
        for latents in batch.latents:
            seen[number_in(latents), int(latents[2, 0, 0] > latents[2, 0, -1])] += 1
    assert seen == {(number, side): 3 for number in range(3, 9) for side in (0, 1)}


def test_repeats_are_visits_an_epoch(folder: Any, encode: Any) -> None:
    sources = ({"path": str(folder([1, 2], "a")), "repeats": 3}, str(folder([3, 4], "b")))
    dataset = encode(sources)
    seen = Counter(number_in(row) for step in range(4) for row in dataset.batch(step, 0, 4).latents)
    assert seen == {1: 6, 2: 6, 3: 2, 4: 2}


def test_each_resolution_shows_every_picture(folder: Any, encode: Any) -> None:
    dataset = encode(folder([1, 2, 3]), changes={"resolution": [16, 24]})
    seen = Counter(
        (number_in(row), row.shape[-1])
        for step in range(4)
        for row in dataset.batch(step, 0, 3).latents
    )
    assert seen == {(number, edge): 2 for number in (1, 2, 3) for edge in (4, 6)}


def test_a_batch_is_a_function_of_its_place_and_the_seed(folder: Any, encode: Any) -> None:
    path = folder(list(range(12)))
    changes = {"flip": True, "crop": "random", "captions": {"dropout": 0.3}}
    one, other = encode(path, 5, changes), encode(path, 6, changes)
    forward = [one.batch(step, 0, 5) for step in range(10)]
    again = [encode(path, 5, changes).batch(step, 0, 5) for step in reversed(range(10))]
    assert all(map(same, forward, reversed(again)))
    assert not all(same(batch, other.batch(i, 0, 5)) for i, batch in enumerate(forward))
    # Accumulation only cuts the same row of pictures otherwise.
    halves = [one.batches(5, 2)(step, micro) for step in range(5) for micro in range(2)]
    assert all(map(same, forward, halves))


def test_epochs_differ(folder: Any, encode: Any) -> None:
    dataset = encode(folder(list(range(8))))
    assert len({dataset.batch(step, 0, 8).names for step in range(6)}) == 6


def test_caption_dropout_has_its_rate(folder: Any, encode: Any) -> None:
    dataset = encode(folder(list(range(8))), changes={"captions": {"dropout": 0.25}})
    captions = [c for step in range(250) for c in dataset.batch(step, 0, 8).captions]
    assert 0.21 < captions.count("") / len(captions) < 0.29


# Variants


def test_half_of_the_visits_are_mirrored(folder: Any, encode: Any, tmp_path: Path) -> None:
    path = tmp_path / "two sides"
    path.mkdir()
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 8, 16))
    image.save(path / "a.png")
    dataset = encode(path, changes={"flip": True})
    plain = encode_image(to_pixels(image)[None])[0]
    seen = [dataset.batch(step, 0, 1).latents[0] for step in range(20)]
    mirrored = [torch.equal(latents, plain.flip(-1)) for latents in seen]
    assert sum(mirrored) == 10
    assert all(m or torch.equal(x, plain) for m, x in zip(mirrored, seen, strict=True))


# What is encoded, and what is found


def test_a_changed_thing_is_a_miss_and_nothing_else(
    folder: Any, encode: Any, tmp_path: Path
) -> None:
    path = folder([1, 2, 3])
    calls: Counter[str] = Counter()

    def image(pixels: Tensor) -> Tensor:
        calls["image"] += 1
        return encode_image(pixels)

    def prompt(prompts: list[str]) -> dict[str, Tensor]:
        calls["prompt"] += 1
        return encode_prompt(prompts)

    def made(**options: Any) -> tuple[int, int]:
        calls.clear()
        encode(path, encode_image=image, encode_prompt=prompt, **options)
        return calls["image"], calls["prompt"]

    assert made() == (3, 3)
    assert made() == made(seed=7) == (0, 0)
    assert made(image_fingerprint="other") == (3, 0)
    assert made(text_fingerprint="other") == (0, 3)
    assert made(changes={"flip": True}) == (3, 0)
    assert made(changes={"captions": {"dropout": 0.1}}) == (0, 1)
    (path / "0.txt").write_text("zorp number 1 waving")
    assert made() == (0, 1)
    Image.new("RGB", (32, 40), "white").save(path / "1.png")
    assert made() == (1, 0)
    (path / "2.png").rename(path / "9.png"), (path / "2.txt").rename(path / "9.txt")
    assert made() == (0, 0)


def test_a_picture_is_decoded_once_for_all_its_variants(
    folder: Any, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data import encode as module

    opened: list[Path] = []
    decode = images.decode

    def watch(path: Path, *background: str) -> Any:
        opened.append(path)
        return decode(path, *background)

    monkeypatch.setattr(module, "decode", watch)
    changes = {"flip": True, "crop": "random"}
    path = folder([1, 2])
    encode(path, changes=changes)
    assert len(opened) == 2
    encode(path, changes=changes)
    assert len(opened) == 2


def test_without_an_encoder_of_words_batches_carry_captions(folder: Any, encode: Any) -> None:
    batch = encode(folder([1, 2]), encode_prompt=None).batch(0, 0, 2)
    assert batch.conditioning == {}
    assert sorted(batch.captions) == ["zorp number 1", "zorp number 2"]


def test_progress(folder: Any, encode: Any) -> None:
    told: list[Any] = []

    @contextlib.contextmanager
    def stage(name: str, total: int) -> Iterator[Callable[[], None]]:
        told.append((name, total))
        yield lambda: told.append(name)

    encode(folder([1, 2]), stage=stage)
    assert told == [("encoding", 2), *["encoding"] * 2, ("captions", 2), *["captions"] * 2]


def test_a_picture_that_changed_since_it_was_checked(
    folder: Any, data: Any, tmp_path: Path
) -> None:
    path = folder([1])
    examples = preflight(data(path), 16).examples
    options: dict[str, Any] = {
        "resolution": 16,
        "seed": 0,
        "encode_image": encode_image,
        "image_fingerprint": "",
        "encode_prompt": None,
        "cache": Cache(tmp_path / "cache"),
    }
    Image.new("RGB", (32, 40), "white").save(path / "0.png")
    with pytest.raises(UserError, match=r"0\.png: changed since the run checked it"):
        EncodedDataset.encode(examples, data(path), **options)
    (path / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: was there at the start, now cannot be read"):
        EncodedDataset.encode(examples, data(path), **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused_and_not_kept(
    folder: Any, encode: Any, tmp_path: Path, bad: float
) -> None:
    path = folder([1])
    with pytest.raises(UserError, match=r"latents of 0\.png are not finite .* base\.dtype"):
        encode(path, encode_image=lambda pixels: encode_image(pixels) * bad)
    with pytest.raises(UserError, match=r'conditioning of "zorp number 1" are not finite'):
        encode(path, encode_prompt=lambda prompts: {"x": torch.full((1, 2), bad)})
    kept = {usage.kind: usage.entries for usage in Cache(tmp_path / "cache").usage()}
    assert kept == {"latents": 1}
    encode(path)
