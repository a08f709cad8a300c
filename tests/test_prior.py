"""Pictures that keep the class alive: drawn once by the untouched base, or taken from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from told import Told

from tunekit import families, prior
from tunekit.data import cache
from tunekit.errors import UserError
from tunekit.families import Family
from tunekit.schema import Base, Data


@pytest.fixture(scope="module")
def base() -> Family:
    return families.load(Base(model="toybox"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def section(**keys: Any) -> Data:
    values = {"count": 3, "prompts": ["a {class}", "a {class} in the snow"], "steps": 2, **keys}
    return Data(source="unused", trigger="zorp", class_noun="robot", prior=values)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_prompts_take_turns_and_each_picture_has_its_own_seed(base: Family) -> None:
    found = prior.examples(section(), base, 64, Told())
    assert [(e.caption, e.name[-1]) for e in found] == [
        ("a robot", "0"),
        ("a robot in the snow", "0"),
        ("a robot", "1"),
    ]
    assert len({pixels(e.path) for e in found}) == 3
    assert {(e.width, e.height) for e in found} == {(64, 64)}
    assert len({e.key for e in found}) == 3


def test_what_is_there_is_not_drawn_again(base: Family) -> None:
    first = prior.examples(section(), base, 64, Told())
    written = {e.path: e.path.stat().st_mtime_ns for e in first}
    first[1].path.unlink()  # a run that was stopped
    told = Told()
    again = prior.examples(section(count=4), base, 64, told)
    assert any("2 of 4 pictures" in note for note in told.notes), told.notes
    assert [e.key for e in again[:3]] == [e.key for e in first]
    assert again[0].path.stat().st_mtime_ns == written[again[0].path]
    assert again[2].path.stat().st_mtime_ns == written[again[2].path]


def test_other_settings_and_another_base_are_other_pictures(base: Family, tiny_folder: Any) -> None:
    one = prior.examples(section(count=1), base, 64, Told())[0]
    for changed in ({"steps": 3}, {"guidance_scale": 1.0}):
        other = prior.examples(section(count=1, **changed), base, 64, Told())[0]
        assert other.path != one.path
    tiny = families.load(Base(model=str(tiny_folder("sd"))))
    assert prior.examples(section(count=1), tiny, 64, Told())[0].path != one.path


def test_a_broken_picture_in_the_cache_is_said_and_drawn_again(base: Family) -> None:
    first = prior.examples(section(count=1), base, 64, Told())[0]
    whole = pixels(first.path)
    first.path.write_bytes(first.path.read_bytes()[:100])
    told = Told()
    again = prior.examples(section(count=1), base, 64, told)[0]
    assert any(str(first.path) in note and "again" in note for note in told.notes), told.notes
    assert pixels(again.path) == whole


def folder_of(root: Path, captions: list[str]) -> Path:
    root.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (80, 80), (40 * number, 90, 10)).save(root / f"{number}.png")
        if caption:
            (root / f"{number}.txt").write_text(caption)
    return root


def test_a_folder_is_taken_instead(base: Family, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "class", ["", "", "a tin robot"])
    told = Told()
    found = prior.examples(section(source=str(folder), count=9), base, 64, told)
    assert {e.path.parent for e in found} == {folder}
    assert any("3 of the 3" in note and "asks for 9" in note for note in told.notes), told.notes
    by_name = {e.name: e.captions for e in found}
    assert by_name["0.png"] == ("a robot", "a robot in the snow")
    assert by_name["2.png"] == ("a tin robot",)
    assert len(prior.examples(section(source=str(folder), count=2), base, 64, Told())) == 2
    assert not (cache.cache_root() / prior.KIND).exists()


def test_pictures_that_say_the_trigger_do_not_keep_the_class(base: Family, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "class", ["a robot", "a zorp robot"])
    with pytest.raises(UserError, match=r'1\.png say "zorp"'):
        prior.examples(section(source=str(folder)), base, 64, Told())
