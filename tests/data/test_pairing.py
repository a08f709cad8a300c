"""Whatever is shuffled, dropped, renamed or split: latent, mask and words are of one picture.

Every picture carries its number where nothing can lose it: in its colour, in the colour of its mask
(a shade of its own), and in its captions. The encoders are stubs that keep these numbers, so they
can be read back from every batch.
"""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tunekit.data import Batch, Cache, EncodedDataset, preflight
from tunekit.schema import Data

SHAPES = [(32, 32), (32, 40), (48, 32), (40, 56), (32, 96)]
TAGS = ("standing", "outdoors", "red hat", "at night")
BLUE = 200  # of the left half, 40 on the right: which way round a latent is


def paint(folder: Path, numbers: list[int], prefix: str = "p", masked: bool = True) -> Path:
    """Save pictures, masks and captions that all say their number."""
    folder.mkdir()
    for place, number in enumerate(numbers):
        size = SHAPES[number % len(SHAPES)]
        image = Image.new("RGB", size, (number % 16 * 16, number // 16 * 16, 40))
        left = image.copy()
        left.paste((number % 16 * 16, number // 16 * 16, BLUE), (0, 0, size[0] // 2, size[1]))
        left.save(folder / f"{prefix}{place}.png")
        mask = Image.new("L", size, shade(number))
        mask.paste(shade(number) // 2, (0, 0, size[0] // 2, size[1]))  # as the blue
        if masked:
            mask.save(folder / f"{prefix}{place}.mask.png")
        tags = ", ".join((f"zorp number {number}", *TAGS[: number % 5]))
        (folder / f"{prefix}{place}.txt").write_text(tags)
    return folder


def shade(number: int) -> int:
    return 56 + 2 * (number % 100)


def encode_image(pixels: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 4)


def encode_prompt(prompts: list[str]) -> dict[str, Tensor]:
    """Return the number a text says, and all of the text as numbers."""
    codes = torch.zeros(len(prompts), 120)
    for row, prompt in enumerate(prompts):
        codes[row, : len(prompt)] = torch.tensor([float(ord(letter)) for letter in prompt[:120]])
    return {"codes": codes}


def said(codes: Tensor) -> str:
    return "".join(chr(int(code)) for code in codes.tolist() if code)


def never(*_: Any) -> Any:
    raise AssertionError("encoded again")


def number_in(latents: Tensor) -> int:
    red, green, _ = ((latents.mean((-1, -2)) + 1) * 127.5).round().int().tolist()
    return int(round(red / 16) + round(green / 16) * 16)


def mirrored(latents: Tensor) -> bool | None:
    """Return whether blue is on the right; None where a crop shows no blue."""
    left, right = latents[2, :, 0].mean(), latents[2, :, -1].mean()
    return None if abs(left - right) < 0.1 else bool(left < right)


def check(batch: Batch, masked: bool = True, extra: str = "") -> None:
    """Assert that each row's parts are of one picture."""
    assert len({tuple(row.shape) for row in batch.latents}) == 1
    for row, words in enumerate(batch.captions):
        number = number_in(batch.latents[row])
        if words:
            tags = [tag.strip() for tag in words.split(",")]
            assert tags[0] == f"zorp number {number}"
            assert set(tags[1:]) <= {*TAGS[: number % 5], *filter(None, [extra.strip(", ")])}
        assert said(batch.conditioning["codes"][row]) == words
        if not masked:
            assert batch.mask is None
            continue
        assert batch.mask is not None
        weights = batch.mask[row, 0]
        assert weights.shape == batch.latents.shape[-2:]
        # The right half's shade is the picture's number; which side it is on, the latent says.
        assert weights.max().item() * 255 == pytest.approx(shade(number), abs=1)
        flipped = mirrored(batch.latents[row])
        if flipped is not None:
            assert bool(weights[:, 0].mean() > weights[:, -1].mean()) is flipped


def make(folder: Path, cache: Path, changes: dict[str, Any], **options: Any) -> EncodedDataset:
    values = {"source": str(folder), "trigger": "zorp", "class": "robot", "resolution": 32}
    section = Data.model_validate(values | {"mask": {}} | changes)
    sheet = preflight(section, multiple=4)
    defaults: dict[str, Any] = {
        "resolution": section.resolutions,
        "multiple": 4,
        "seed": 3,
        "encode_image": encode_image,
        "image_fingerprint": "vae",
        "encode_prompt": encode_prompt,
        "cache": Cache(cache),
        "batch_size": 3,
        "batches": 200,
    }
    return EncodedDataset.encode(sheet.examples, section, **defaults | options)


def same(one: Batch, other: Batch) -> bool:
    assert (one.mask is None) == (other.mask is None)
    return (
        torch.equal(one.latents, other.latents)
        and one.captions == other.captions
        and (one.mask is None or torch.equal(one.mask, cast("Tensor", other.mask)))
        and all(torch.equal(v, other.conditioning[k]) for k, v in one.conditioning.items())
    )


CHANGES = st.fixed_dictionaries(
    {
        "crop": st.sampled_from(["center", "random", "smart"]),
        "flip": st.booleans(),
        "buckets": st.sampled_from([None, {"step": 4, "min": 16}]),
        "resolution": st.sampled_from([32, [32, 24]]),
        "captions": st.fixed_dictionaries(
            {
                "shuffle": st.booleans(),
                "dropout": st.sampled_from([0.0, 0.4]),
                "tag_dropout": st.sampled_from([0.0, 0.3]),
            }
        ),
    }
)


def settled(changes: dict[str, Any]) -> dict[str, Any]:
    """Keep the first tag, which carries the number, where tags may go."""
    words = dict(changes["captions"])
    if words["shuffle"] or words["tag_dropout"]:
        words["keep_tokens"] = 1
    return changes | {"captions": words}


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 99), min_size=1, max_size=7, unique=True),
    changes=CHANGES.map(settled),
    seed=st.integers(0, 2**63 - 1),
    batch_size=st.integers(1, 4),
    masked=st.booleans(),
)
def test_every_part_of_a_row_is_of_one_picture(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    changes: dict[str, Any],
    seed: int,
    batch_size: int,
    masked: bool,
) -> None:
    base = tmp_path_factory.mktemp("pairing")
    changes = changes | ({} if masked else {"mask": None})
    options = {"seed": seed, "batch_size": batch_size, "batches": 12}
    one = make(paint(base / "one", numbers, masked=masked), base / "cache", changes, **options)
    # The same pictures under other names and in another order: nothing is encoded again.
    mixed = random.Random(seed).sample(numbers, len(numbers))
    again = paint(base / "again", mixed, "other ", masked=masked)
    other = make(again, base / "cache", changes, **options, encode_image=never)
    for step in range(6):
        for micro in range(2):
            batch = one.batch(step, micro, batch_size, 2)
            assert len(batch.names) == batch_size
            check(batch, masked)
            assert same(batch, other.batch(step, micro, batch_size, 2))


EVERYTHING = {
    "crop": "random",
    "flip": True,
    "buckets": {"step": 4, "min": 16},
    "captions": {"shuffle": True, "keep_tokens": 1, "dropout": 0.2, "tag_dropout": 0.2},
}


@pytest.fixture
def dataset(tmp_path: Path) -> EncodedDataset:
    return make(paint(tmp_path / "p", list(range(11))), tmp_path / "cache", EVERYTHING)


class Steps(torch.utils.data.Dataset[Batch]):
    """The steps of a run, for torch's worker processes."""

    def __init__(self, dataset: EncodedDataset, count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Batch:
        return self.dataset.batch(step, 0, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(dataset: EncodedDataset, workers: int) -> None:
    # A worker process gets a copy, by whatever way its system starts it.
    copy = pickle.loads(pickle.dumps(dataset))
    loader = DataLoader(Steps(copy, 40), batch_size=None, num_workers=workers)
    for step, batch in enumerate(loader):
        check(batch)
        assert same(batch, dataset.batch(step, 0, 3))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_batches_of_one_process(dataset: EncodedDataset, ranks: int) -> None:
    size = 2 * ranks
    for step in range(6):
        for micro in range(2):
            alone = dataset.batch(step, micro, size, 2)
            parts = [dataset.batch(step, micro, size, 2, rank, ranks) for rank in range(ranks)]
            for rank, part in enumerate(parts):
                check(part)
                own = dataclasses.replace(alone, **{
                    field.name: rows_of(getattr(alone, field.name), slice(2 * rank, 2 * rank + 2))
                    for field in dataclasses.fields(alone)
                })  # fmt: skip
                assert same(part, own)


def rows_of(value: Any, rows: slice) -> Any:
    """Return some rows of a part of a batch."""
    if isinstance(value, dict):
        return {name: rows_of(part, rows) for name, part in value.items()}
    return value if value is None or isinstance(value, bool) else value[rows]


def test_any_order_of_asking_gives_the_same(dataset: EncodedDataset) -> None:
    forward = [dataset.batch(step, 0, 3) for step in range(30)]
    steps = random.Random(0).sample(range(30), 30)
    assert all(same(dataset.batch(step, 0, 3), forward[step]) for step in steps)


def test_all_are_seen_equally_often_over_a_round(dataset: EncodedDataset) -> None:
    row = dataset.visits(3).round
    batches = [dataset.batch(step, 0, 3) for step in range(row.batches)]
    seen = Counter(number_in(latents) for batch in batches for latents in batch.latents)
    assert seen == dict.fromkeys(range(11), row.epochs)


def test_changed_captions_stay_with_their_pictures(tmp_path: Path) -> None:
    folder = paint(tmp_path / "p", list(range(8)))
    make(folder, tmp_path / "cache", EVERYTHING)
    for text in folder.glob("*.txt"):
        text.write_text(text.read_text() + ", waving")
    changed = make(folder, tmp_path / "cache", EVERYTHING, encode_image=never)
    seen = False
    for step in range(40):
        batch = changed.batch(step, 0, 3)
        check(batch, extra="waving")
        seen |= any("waving" in words for words in batch.captions)
    assert seen


def test_changed_masks_stay_with_their_pictures(tmp_path: Path) -> None:
    folder = paint(tmp_path / "p", [10, 20, 30])
    make(folder, tmp_path / "cache", EVERYTHING)
    # The masks of the first and the second change places, and so do the shades.
    (folder / "p0.mask.png").rename(folder / "x.png")
    (folder / "p1.mask.png").rename(folder / "p0.mask.png")
    (folder / "x.png").rename(folder / "p1.mask.png")
    changed = make(folder, tmp_path / "cache", EVERYTHING, encode_image=never)
    wanted = {10: shade(20), 20: shade(10), 30: shade(30)}
    for step in range(12):
        batch = changed.batch(step, 0, 3)
        assert batch.mask is not None
        for latents, weights in zip(batch.latents, batch.mask, strict=True):
            found = weights.max().item() * 255
            assert found == pytest.approx(wanted[number_in(latents)], abs=1)


def test_what_was_shuffled_is_different_words_at_each_visit(tmp_path: Path) -> None:
    folder = paint(tmp_path / "p", [4])
    dataset = make(folder, tmp_path / "cache", EVERYTHING)
    texts = {dataset.batch(step, 0, 3).captions[0] for step in range(30)}
    assert len(texts) > 10


def test_the_picture_and_not_the_file_decides(tmp_path: Path) -> None:
    """A picture renamed to another's name brings its own latents and its own words."""
    folder = paint(tmp_path / "p", [1, 2, 3])
    make(folder, tmp_path / "cache", {})
    for ending in (".png", ".mask.png", ".txt"):
        (folder / f"p0{ending}").rename(folder / f"x{ending}")
        (folder / f"p1{ending}").rename(folder / f"p0{ending}")
        (folder / f"x{ending}").rename(folder / f"p1{ending}")
    renamed = make(folder, tmp_path / "cache", {}, encode_image=never, encode_prompt=never)
    for step in range(6):
        check(renamed.batch(step, 0, 2))
