"""`tunekit inspect`: what a recipe or a folder is told before it is trained."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from told import Told, Typed

from tunekit.data.cache import Cache
from tunekit.data.records import DataError
from tunekit.errors import UserError
from tunekit.inspection import Inspection, inspect
from tunekit.recipe_source import RecipeError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a picture of blocks; equal seeds are equal pictures."""

    def save(name: str, seed: int, size: tuple[int, int] = (96, 96), text: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(values).resize(size, Image.Resampling.NEAREST).save(path)
        if text:
            path.with_suffix(".txt").write_text(text)
        return path

    return save


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe for tmp_path/train with more lines for its data."""

    def write(data: str = "", train: str = "steps: 30\n  batch_size: 2") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "name: x\nbase:\n  model: toybox\ndata:\n  source: train\n  trigger: zorp\n"
            f"  class: robot\n{data}\nadapter:\n  kind: lora\ntrain:\n  {train}\n"
        )
        return path

    return write


def codes(found: Inspection, severity: str = "error") -> list[str]:
    return [finding.code for finding in found.findings if finding.severity == severity]


def test_a_recipe_without_faults(paint: Any, recipe: Any) -> None:
    for number in range(4):
        paint(f"train/{number}.png", number, text=f"a zorp robot, number {number}")
    found = inspect(recipe())
    assert found.ok
    assert (found.sheet.resolution, found.sheet.multiple) == (64, 8)
    assert found.plan is not None
    assert (found.plan.epochs, found.plan.visits) == (15, ((15, 15),) * 4)
    lines = found.lines()
    assert "30 steps of 2: 15 epochs, each picture shown 15 times" in lines
    assert any(line.startswith("0.png") and "a zorp robot, number 0" in line for line in lines)
    assert lines[-1] == "training takes this; nothing to object to"


def test_errors_are_shown_beside_warnings_and_all_pictures_that_can_be(
    paint: Any, recipe: Any, tmp_path: Path
) -> None:
    paint("train/a.png", 1, text="a zorp robot")
    paint("train/b.png", 1, text="a zorp robot at home")
    paint("train/small.png", 2, (20, 20))
    (tmp_path / "train" / "cut.png").write_bytes(b"\x89PNG")
    found = inspect(recipe())
    assert not found.ok
    assert sorted(codes(found)) == ["broken", "too-small"]
    assert {"duplicate", "missing-caption"} <= set(codes(found, "warning"))
    assert found.plan is None
    text = "\n".join(found.lines())
    assert "  cut.png: " in text
    assert "training refuses this: 2 errors to mend" in text
    assert "small.png  20x20  refused" in text.replace("    ", "  ")


def test_impossible_buckets_are_a_finding_and_all_else_is_shown(
    paint: Any, recipe: Any, tmp_path: Path
) -> None:
    paint("train/a.png", 1, text="a zorp robot")
    Image.new("L", (96, 96), 255).save(tmp_path / "train" / "a.mask.png")
    for override in ("data.buckets.step=100", "data.buckets.min=500"):
        found = inspect(recipe("  mask: {}\n"), [override])
        assert codes(found) == ["buckets"]
        (picture,) = json.loads(json.dumps(found.as_dict()))["pictures"]
        assert (picture["trained"], picture["visits"]) == ([], None)
        assert any("refused" in line for line in found.lines())
        assert "made about 64x64" in found.lines()[0]
        found.save(tmp_path / "page.html")
        assert "data.buckets: " in (tmp_path / "page.html").read_text()


def test_names_and_captions_drive_no_terminal(paint: Any, recipe: Any) -> None:
    paint("train/a\x1b[2J\n.png", 1, text="robot \x1b]0;mine\x07, \u202eyako")
    paint("train/small\x1b.png", 2, (20, 20), text="a zorp robot\rno")
    found = inspect(recipe())
    lines = found.lines()
    assert codes(found) == ["too-small"]
    assert not any(set(line) & set("\x1b\x07\n\r\u202e") for line in lines)
    row = next(line for line in lines if line.startswith(r"a\x1b[2J\n.png  "))
    assert row.endswith(r"robot \x1b]0;mine\x07, \u202eyako")
    assert found.as_dict()["pictures"][0]["name"] == "a\x1b[2J\n.png"
    with pytest.raises(DataError) as refused:
        found.sheet.check()
    assert r"small\x1b.png: 20x20" in str(refused.value)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("word", ["true", "12", "null", '"q"', "a: b", "zo\N{CAT FACE}rp"])
def test_a_word_is_a_word_whatever_yaml_would_make_of_it(
    paint: Any, recipe: Any, word: str
) -> None:
    paint("train/a.png", 1, text="a zorp robot")
    found = inspect(recipe(), trigger=word, resolution=32)
    assert (found.sheet.data.trigger, found.sheet.resolution) == (word, 32)


def test_the_json_holds_everything(paint: Any, recipe: Any) -> None:
    paint("train/a.png", 1, (200, 100), text="a zorp robot")
    told = json.loads(json.dumps(inspect(recipe(), ["data.crop=random"]).as_dict()))
    (picture,) = told["pictures"]
    assert (picture["width"], picture["height"], picture["captions"]) == (
        200,
        100,
        ["a zorp robot"],
    )
    (trained,) = picture["trained"]
    assert trained["bucket"] == [64, 64]
    assert len(trained["crops"]) == 4
    assert all(box[3] - box[1] == 100 for box in trained["crops"])
    assert (trained["scale"], trained["cut"]) == (0.64, 0.5)
    assert picture["visits"] == [60, 60]
    assert told["training"] == {"steps": 30, "pictures_a_step": 2, "epochs": 60}
    assert told["ok"] is True
    assert {"severity", "code", "text", "names", "advice"} == set(told["findings"][0])


def test_captions_are_held_to_what_the_base_reads(paint: Any, recipe: Any) -> None:
    paint("train/a.png", 1, text=f"a zorp robot {'very ' * 100}happy")
    found = inspect(recipe())
    (cut,) = [f for f in found.findings if f.code == "long-caption"]
    assert cut.names[0].startswith('a.png ("very')
    assert cut.names[0].endswith('happy")')


def test_a_base_that_cannot_be_described_is_a_warning(paint: Any, recipe: Any) -> None:
    paint("train/a.png", 1, (600, 600), text="a zorp robot")
    found = inspect(recipe(), ["base.model=nobody/has-this"])
    assert found.ok
    assert "base" in codes(found, "warning")
    assert found.sheet.resolution == 512


def test_held_out_pictures_are_looked_at(paint: Any, recipe: Any) -> None:
    paint("train/a.png", 1, text="a zorp robot")
    paint("held/a.png", 1, text="words nobody trains on")
    paint("held/b.png", 2)
    found = inspect(recipe("  holdout: held"))
    assert codes(found) == ["held-out-shared"]
    assert "no-trigger" not in codes(found, "warning")
    told = found.as_dict()["held_out"]
    assert [picture["name"] for picture in told["pictures"]] == ["a.png", "b.png"]
    assert "Held out: never trained on" in found.html()


def test_a_run_that_is_too_short_for_its_pictures(paint: Any, recipe: Any) -> None:
    for number in range(5):
        paint(f"train/{number}.png", number, text="a zorp robot")
    found = inspect(recipe(train="steps: 1"))
    (unseen,) = [f for f in found.findings if f.code == "unseen"]
    assert (unseen.severity, unseen.advice) == ("warning", "raise train.steps")
    assert "0 to 1 times" in "\n".join(found.lines())


def test_repeats_and_several_resolutions_are_counted(paint: Any, recipe: Any) -> None:
    paint("train/1_zorp robot/a.png", 1), paint("train/3_zorp robot/b.png", 2)
    found = inspect(recipe("  resolution: [32, 64]"), ["train.steps=8", "train.batch_size=4"])
    assert found.plan is not None
    assert found.plan.epochs == 4
    assert found.plan.visits == ((8, 8), (24, 24))


# A folder


def test_a_folder_needs_no_recipe_and_says_what_it_assumed(paint: Any, tmp_path: Path) -> None:
    paint("some pictures/a.png", 1, (600, 600), text="a dog")
    paint("some pictures/b.png", 2, (600, 600))
    found = inspect(tmp_path / "some pictures")
    assert found.ok
    assert found.sheet.resolutions == (512,)
    assert not {"no-trigger", "no-class"} & set(codes(found, "warning"))
    assert [e.caption for e in found.sheet.examples] == ["a dog", "a {trigger} {class}"]
    said = "\n".join(found.lines())
    assert "no resolution given: looked at for 512 pixels" in said
    assert "no trigger and no class given: whether captions say them is not checked" in said
    said = "\n".join(inspect(tmp_path / "some pictures", class_noun="robot").lines())
    assert "no trigger given: whether captions say it is not checked" in said


def test_options_and_overrides_of_a_folder(paint: Any, tmp_path: Path) -> None:
    paint("p/a.png", 1, (200, 100), text="a dog")
    folder = tmp_path / "p"
    found = inspect(folder, trigger="sks", class_noun="dog", resolution=64)
    assert codes(found, "warning") == ["no-trigger", "much-cut"]
    assert [f.text for f in found.findings if f.code == "assumed"] == [
        "no base given: captions are not held to what its text encoder reads"
    ]
    other = inspect(folder, ["data.buckets.step=8", "data.trigger=a dog"], resolution=64)
    assert not codes(other, "warning")
    assert other.sheet.in_buckets(64) == {(88, 40): 1}
    assert "no class given" in "\n".join(other.lines())


@pytest.mark.parametrize(
    ("overrides", "options", "says"),
    [
        (["train.steps=3"], {}, "train: a folder has keys of data only; inspect a recipe"),
        (["data.croop=smart"], {}, r'data\.croop.*did you mean "crop"'),
        ([], {"resolution": 3}, r"data\.resolution"),
        ([], {"trigger": "{x}"}, r"data\.trigger"),
        (["data.crop"], {}, "is not KEY=VALUE"),
    ],
)
def test_wrong_options_of_a_folder_are_refused(
    paint: Any, tmp_path: Path, overrides: list[str], options: Any, says: str
) -> None:
    paint("p/a.png", 1)
    with pytest.raises(UserError, match=says):
        inspect(tmp_path / "p", overrides, **options)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such recipe or folder of pictures"):
        inspect(tmp_path / "nothing")
    with pytest.raises(RecipeError):
        inspect(tmp_path / "nothing.yaml")
    (tmp_path / "empty").mkdir()
    found = inspect(tmp_path / "empty")
    assert not found.ok
    assert "no pictures here (it is empty)" in "\n".join(found.lines())
    assert "0 pictures, 1 error" in found.html()


def test_many_pictures_are_counted_in_the_terminal_and_whole_in_the_json(
    paint: Any, tmp_path: Path
) -> None:
    for number in range(65):
        paint(f"p/{number:02}.png", number)
    found = inspect(tmp_path / "p", resolution=64)
    assert "and 5 more pictures; --json and --html list them" in found.lines()
    assert len(found.as_dict()["pictures"]) == 65


def test_the_page_is_saved_whole_and_only_as_a_page(paint: Any, tmp_path: Path) -> None:
    paint("p/a.png", 1)
    found = inspect(tmp_path / "p", resolution=64)
    found.save(tmp_path / "new" / "sheet.html")
    found.save(tmp_path / "new" / "sheet.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.html"]
    assert (tmp_path / "new" / "sheet.html").read_text().rstrip().endswith("</html>")
    with pytest.raises(UserError, match=r"recipe\.yaml: a contact sheet is a page"):
        found.save(tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_progress_is_told(paint: Any, tmp_path: Path) -> None:
    import contextlib
    from collections.abc import Iterator

    stages: list[tuple[str, int]] = []
    ticks: list[str] = []

    class Reports:
        def note(self, text: str) -> None: ...

        @contextlib.contextmanager
        def stage(self, name: str, total: int) -> Iterator[Any]:
            stages.append((name, total))
            yield lambda told="": ticks.append(told)

    paint("p/a.png", 1), paint("p/b.png", 2)
    inspect(tmp_path / "p", resolution=64, reporter=Reports())
    assert (stages, len(ticks)) == ([("looking", 2)], 2)


@pytest.mark.parametrize("name", ["character-lora", "style-lora"])
def test_the_bundled_recipes_have_nothing_to_object_to(name: str) -> None:
    found = inspect(ROOT / "recipes" / f"{name}.yaml")
    assert not codes(found)
    assert not codes(found, "warning")


def test_the_verb_prints_json_saves_the_page_and_says_by_its_exit_code_what_training_would(
    paint: Any, tmp_path: Path, typed: Typed
) -> None:
    paint("p/a.png", 1)
    page = tmp_path / "sheet.html"
    told = typed("inspect", tmp_path / "p", "--resolution", 64, "--json", "--html", page)
    assert (told.code, json.loads(told.out)["ok"]) == (0, True)
    assert "1 picture, nothing to object to" in page.read_text()
    told = typed("inspect", tmp_path / "p")
    assert told.code == 2
    assert "a.png: 96x96 is smaller than the resolution of 512" in told.out


def test_pictures_of_the_class_are_looked_at_too(paint: Any, recipe: Any, tmp_path: Path) -> None:
    for number in range(3):
        paint(f"train/{number}.png", number, text="a zorp robot")
        paint(f"class/{number}.png", 10 + number)
    drawn = inspect(recipe("  resolution: 64\n  prior: {count: 9}"))
    assert any('draws 9 pictures of the class: "a robot"' in f.text for f in drawn.findings)
    whole = inspect(recipe("  resolution: 64\n  prior: {source: class}"))
    assert whole.ok
    assert [p["name"] for p in whole.as_dict()["prior"]["pictures"]] == ["0.png", "1.png", "2.png"]
    assert "Pictures of the class" in whole.html()
    (tmp_path / "class/1.png").write_bytes(b"")
    broken = inspect(recipe("  resolution: 64\n  prior: {source: class}"))
    assert not broken.ok
    assert any(code.startswith("prior-") for code in codes(broken))


def test_pictures_of_a_shard_stay_in_the_cache_until_the_page_is_drawn(
    paint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(paint(f"plain/{number}.png", number), "a.png")
    with contextlib.ExitStack() as held:
        found = inspect(tmp_path / "0.tar", held=held)
        with pytest.raises(UserError, match="in use"):
            Cache().prune(max_bytes=0)
        found.save(tmp_path / "page.html")
    assert Cache().prune(max_bytes=0).files == {"pictures": 1}
    inspect(tmp_path / "0.tar")
    monkeypatch.setenv("TUNEKIT_CACHE_MAX", "1")
    told = Told()
    inspect(tmp_path / "1.tar", reporter=told)
    assert "the cache may hold 1 byte" in told.notes[0]
    assert Cache().prune(max_bytes=0).files == {"pictures": 1}
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "1.tar"))  # of a folder nothing is kept
    assert inspect(tmp_path / "plain", resolution=64).ok


def test_a_name_that_is_no_text_is_told_with_escapes() -> None:
    with pytest.raises(UserError, match=r"p\\xff: the name is not UTF-8"):
        inspect("p\udcff")
