"""Pictures that keep the class alive: drawn once by the untouched base, or taken from a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from told import Told

from tunekit import families, prior, sheets
from tunekit.data import Cache
from tunekit.data.cache import cache_root
from tunekit.data.records import DataError, Example
from tunekit.families import Family
from tunekit.progress import Silent
from tunekit.schema import Base, Data, Train


@pytest.fixture(scope="module")
def base() -> Family:
    return families.load(Base(model="toybox"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def section(pictures: Path | str = "unused", **keys: Any) -> Data:
    values = {"count": 3, "prompts": ["a {class}", "a {class} in the snow"], "steps": 2, **keys}
    return Data(
        source=str(pictures), trigger="zorp", class_noun="robot", resolution=64, prior=values
    )


def drawn(data: Data, base: Family, told: Told | None = None) -> tuple[Example, ...]:
    return prior.drawn(data, base, 64, Cache(), told or Told()).examples


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_prompts_take_turns_and_each_picture_has_its_own_seed(base: Family) -> None:
    found = drawn(section(), base)
    assert [(e.caption, e.name[-1]) for e in found] == [
        ("a robot", "0"),
        ("a robot in the snow", "0"),
        ("a robot", "1"),
    ]
    assert len({pixels(e.path) for e in found}) == 3
    assert {(e.width, e.height) for e in found} == {(64, 64)}
    assert len({e.key for e in found}) == 3


def test_what_is_there_is_not_drawn_again(base: Family) -> None:
    first = drawn(section(), base)
    inodes = {e.path: e.path.stat().st_ino for e in first}
    first[1].path.unlink()  # a run that was stopped
    told = Told()
    again = drawn(section(count=4), base, told)
    assert any("2 of 4 pictures" in note for note in told.notes), told.notes
    assert [e.key for e in again[:3]] == [e.key for e in first]
    for kept in (again[0], again[2]):
        assert kept.path.stat().st_ino == inodes[kept.path]


def test_use_keeps_pictures_from_being_pruned(base: Family) -> None:
    used, other = drawn(section(count=2), base)
    for one in (used, other):
        os.utime(one.path, (1, 1))
    drawn(section(count=1), base)
    Cache().prune(older_than_seconds=3600)
    assert used.path.exists()
    assert not other.path.exists()


def test_other_settings_and_another_base_are_other_pictures(
    base: Family, tiny_folder: Any, tmp_path: Path
) -> None:
    (one,) = drawn(section(count=1), base)
    for changed in ({"steps": 3}, {"guidance_scale": 1.0}):
        assert drawn(section(count=1, **changed), base)[0].path != one.path
    tiny = families.load(Base(model=str(tiny_folder("sd"))))
    (small,) = drawn(section(count=1), tiny)
    assert small.path != one.path
    # Where a base lies does not matter; a setting of one of its parts does.
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder("sd"), moved)
    assert drawn(section(count=1), families.load(Base(model=str(moved))))[0].path == small.path
    config = moved / "vae" / "config.json"
    factor = families.load(Base(model=str(moved))).vae.config.scaling_factor
    text = config.read_text()
    changed_text = text.replace(f'"scaling_factor": {factor}', f'"scaling_factor": {factor * 2}')
    assert changed_text != text
    config.write_text(changed_text)
    assert drawn(section(count=1), families.load(Base(model=str(moved))))[0].path != small.path


@pytest.mark.parametrize("damage", ["cut", "another picture"])
def test_a_picture_that_is_not_what_was_drawn_is_said_and_drawn_again(
    base: Family, damage: str
) -> None:
    (first,) = drawn(section(count=1), base)
    whole = pixels(first.path)
    if damage == "cut":
        first.path.write_bytes(first.path.read_bytes()[:100])
    else:
        Image.new("RGB", (64, 64), "red").save(first.path)
    told = Told()
    (again,) = drawn(section(count=1), base, told)
    assert any(str(first.path) in note and "again" in note for note in told.notes), told.notes
    assert pixels(again.path) == whole


def folder_of(root: Path, captions: list[str], size: int = 80, first: int = 0) -> Path:
    root.mkdir()
    for number, caption in enumerate(captions):
        shade = (40 * (number + first) + 5, 90, 10 + 9 * number)
        Image.new("RGB", (size, size), shade).save(root / f"{number}.png")
        if caption:
            (root / f"{number}.txt").write_text(caption)
    return root


def look(data: Data) -> sheets.Sheets:
    return sheets.look(data, Train(steps=4), families.describe(Base(model="toybox")), Silent())


def test_a_folder_is_taken_instead(tmp_path: Path) -> None:
    train = folder_of(tmp_path / "train", ["a zorp robot"], first=5)
    folder = folder_of(tmp_path / "class", ["", "", "a tin robot"])
    seen = look(section(train, source=str(folder), count=9))
    seen.check()
    assert any("count is 9" in f.text and "holds 3" in f.text for f in seen.findings)
    assert seen.prior is not None
    used = prior.taken(seen.prior, section(count=9)).examples
    by_name = {e.name: e.captions for e in used}
    assert by_name["0.png"] == ("a robot", "a robot in the snow")
    assert by_name["2.png"] == ("a tin robot",)
    assert len(prior.taken(seen.prior, section(count=2)).examples) == 2
    assert not (cache_root() / prior.KIND).exists()


def test_all_faults_of_all_folders_are_told_at_once(tmp_path: Path) -> None:
    train = folder_of(tmp_path / "train", ["a zorp robot", "a zorp robot"], first=5)
    (train / "0.png").write_bytes(b"")
    held = folder_of(tmp_path / "held", ["a zorp robot"])
    (held / "broken.png").write_bytes(b"nothing")
    folder = folder_of(tmp_path / "class", ["a robot", "a zorp robot"], size=40)
    data = section(train, source=str(folder)).model_copy(update={"holdout": str(held)})
    with pytest.raises(DataError) as caught:
        look(data).check()
    line = str(caught.value)
    for part in ("0.png: ", "broken.png: held out: ", "of the class", 'says "zorp"', "smaller"):
        assert part in line, part


def test_pictures_of_the_subject_do_not_keep_the_class(tmp_path: Path) -> None:
    train = folder_of(tmp_path / "train", ["a zorp robot", ""])
    folder = folder_of(tmp_path / "class", ["a robot"])
    with pytest.raises(DataError, match=r"0\.png \(0\.png\).*training pictures as well"):
        look(section(train, source=str(folder))).check()
