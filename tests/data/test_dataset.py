"""Every picture equally often, and every latent beside its own words."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tunekit.data import Batch, Cache, EncodedDataset, Example, preflight
from tunekit.data.dataset import RANDOM_CROPS, crops
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


def example(number: int, width: int = 8, height: int = 8) -> Example:
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Example(
        Path(f"{number}.png"), f"{number}.png", str(number), "t", width, height, key, key
    )


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that paints numbered pictures with numbered captions."""

    def make(numbers: list[int], name: str = "pictures", prefix: str = "") -> Path:
        path = tmp_path / name
        path.mkdir()
        for place, number in enumerate(numbers):
            size = (32, 32 + 8 * (number % 3))
            Image.new("RGB", size, colour_of(number)).save(path / f"{prefix}{place}.png")
            (path / f"{prefix}{place}.txt").write_text(f"zorp number {number}")
        return path

    return make


@pytest.fixture
def encode(tmp_path: Path, data: Callable[..., Data]) -> Callable[..., EncodedDataset]:
    """Return a function that checks and encodes a folder with the functions above."""

    def run(source: Path, seed: int = 0, changes: Any = None, **options: Any) -> EncodedDataset:
        section = data(source, **(changes or {}))
        defaults: dict[str, Any] = {
            "encode_image": encode_image,
            "image_fingerprint": "vae",
            "encode_prompt": encode_prompt,
            "text_fingerprint": "text",
            "cache": Cache(tmp_path / "cache"),
        }
        examples = preflight(section, 16).examples
        return EncodedDataset.encode(
            examples, section, resolution=16, seed=seed, **{**defaults, **options}
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


# Pairing


@settings(max_examples=15, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 255), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**63 - 1),
    batch_size=st.integers(1, 7),
    crop=st.sampled_from(["center", "random"]),
    flip=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_latent_and_caption_belong_to_one_picture(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    seed: int,
    batch_size: int,
    crop: str,
    flip: bool,
    dropout: float,
) -> None:
    base = tmp_path_factory.mktemp("pairing")
    cache = Cache(base / "cache")
    sets = []
    # The same pictures twice: in reverse, under other names, and from the cache.
    for name, listed, image in (("a", numbers, encode_image), ("b", numbers[::-1], never)):
        (base / name).mkdir()
        for place, number in enumerate(listed):
            picture = Image.new("RGB", (32, 32 + 8 * (number % 3)), colour_of(number))
            picture.save(base / name / f"{name}{place}.png")
            (base / name / f"{name}{place}.txt").write_text(f"zorp number {number}")
        section = Data(
            **{"source": str(base / name), "trigger": "zorp", "class": "robot"},
            crop=crop,  # type: ignore[arg-type]
            flip=flip,
            caption_dropout=dropout,
        )
        sets.append(
            EncodedDataset.encode(
                preflight(section, 16).examples,
                section,
                resolution=16,
                seed=seed,
                encode_image=image,
                image_fingerprint="vae",
                encode_prompt=encode_prompt,
                cache=cache,
            )
        )
    for step in range(8):
        batches = [one.batch(step, 1, batch_size, 2) for one in sets]
        check_pairing(batches[0], dropout > 0)
        assert same(*batches)


def test_names_are_those_of_the_pictures(folder: Any, encode: Any) -> None:
    dataset = encode(folder([3, 30, 200], prefix="p"))
    for step in range(6):
        batch = dataset.batch(step, 0, 2)
        numbers = [[3, 30, 200][int(name[1])] for name in batch.names]
        assert numbers == [number_in(row) for row in batch.latents]


# Visits


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9),
    batch_size=st.integers(1, 20),
    micros=st.integers(1, 3),
    steps=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    variants=st.integers(1, 4),
)
def test_every_picture_and_every_variant_is_seen_equally_often(
    count: int, batch_size: int, micros: int, steps: int, seed: int, variants: int
) -> None:
    from tunekit.data.dataset import _Encoded

    encoded = [
        _Encoded(example(n), tuple(torch.full((1, 2, 2), 10.0 * n + v) for v in range(variants)))
        for n in range(count)
    ]
    dataset = EncodedDataset(encoded, {}, seed=seed, caption_dropout=0.0)
    batches = [
        dataset.batch(step, micro, batch_size, micros)
        for step in range(steps)
        for micro in range(micros)
    ]
    seen = [int(v) for batch in batches for v in batch.latents[:, 0, 0, 0].tolist()]
    assert len(seen) == batch_size * micros * steps
    visits = Counter(v // 10 for v in seen)
    assert max(visits.values()) - min(visits[n] for n in range(count)) <= 1
    assert all(number == int(c) for b, c in _numbered(batches) for number in [b])
    for n in range(count):
        of_one = Counter(v % 10 for v in seen if v // 10 == n)
        assert max(of_one.values(), default=0) - min(of_one[v] for v in range(variants)) <= 1
    for epoch in range(len(seen) // count):
        assert sorted(v // 10 for v in seen[epoch * count : (epoch + 1) * count]) == [*range(count)]


def _numbered(batches: list[Batch]) -> list[tuple[int, str]]:
    return [
        (int(row[0, 0, 0].item()) // 10, caption)
        for batch in batches
        for row, caption in zip(batch.latents, batch.captions, strict=True)
    ]


def test_a_batch_is_a_function_of_its_place_and_the_seed(folder: Any, encode: Any) -> None:
    path = folder(list(range(12)))
    changes = {"flip": True, "crop": "random", "caption_dropout": 0.3}
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
    dataset = encode(folder(list(range(8))), changes={"caption_dropout": 0.25})
    captions = [c for step in range(250) for c in dataset.batch(step, 0, 8).captions]
    assert 0.21 < captions.count("") / len(captions) < 0.29


# Variants


def test_random_crops_are_fixed_places_all_along_the_side() -> None:
    wide = crops(example(1, 800, 100), 64, "random")
    assert len(wide) == RANDOM_CROPS
    assert wide == crops(example(1, 800, 100), 64, "random")
    assert wide != crops(example(2, 800, 100), 64, "random")
    assert [plan.left * RANDOM_CROPS // 700 for plan in wide] == [0, 1, 2, 3]
    assert len(crops(example(1, 100, 100), 64, "random")) == 1
    assert crops(example(1, 300, 100), 64, "center")[0].left == 100


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
    assert made(changes={"caption_dropout": 0.1}) == (0, 1)
    (path / "0.txt").write_text("zorp number 1 waving")
    assert made() == (0, 1)
    Image.new("RGB", (32, 40), "white").save(path / "1.png")
    assert made() == (1, 0)
    (path / "2.png").rename(path / "9.png"), (path / "2.txt").rename(path / "9.txt")
    assert made() == (0, 0)


def test_a_picture_is_decoded_once_for_all_its_variants(
    folder: Any, encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data import dataset as module

    opened: list[Path] = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path: (opened.append(path), decode(path))[1])
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
    told: list[tuple[int, int]] = []
    encode(folder([1, 2]), progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]


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
    encode(path)
    assert len(list((tmp_path / "cache" / "conditioning").rglob("*.safetensors"))) == 1
