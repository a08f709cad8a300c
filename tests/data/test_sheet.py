"""The preflight: one decode a picture, every fault at once, and what a colleague would say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tunekit.data import images
from tunekit.data import sheet as sheets
from tunekit.data.records import DataError, Finding
from tunekit.data.sheet import DataSheet, examine, preflight, shared_pictures
from tunekit.errors import UserError
from tunekit.schema import Data

Paint = Callable[..., Path]
Make = Callable[..., Data]


@pytest.fixture
def scene(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a picture of sharp blocks, another one for each seed."""

    def save(name: str, seed: int = 0, size: tuple[int, int] = (96, 96), mode: str = "RGB") -> Path:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks(seed, size).convert(mode).save(path)
        return path

    return save


def blocks(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    rows, columns = -(-size[1] // 6), -(-size[0] // 6)
    values = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(values.repeat(6, 0).repeat(6, 1)[: size[1], : size[0]])


def codes(sheet: DataSheet, severity: str | None = None) -> list[str]:
    return [f.code for f in sheet.findings if severity in (None, f.severity)]


def only(sheet: DataSheet, code: str) -> Finding:
    found = [finding for finding in sheet.findings if finding.code == code]
    assert len(found) == 1, [str(finding) for finding in sheet.findings]
    return found[0]


@pytest.fixture
def look(tmp_path: Path, data: Make) -> Callable[..., DataSheet]:
    """Return a function that examines tmp_path/pictures with changed keys of the data section."""

    def run(resolution: int | None = 64, **changes: Any) -> DataSheet:
        return examine(data(tmp_path / "pictures", **changes), resolution)

    return run


# Faults


def test_every_fault_is_told_at_once_and_nothing_is_used(
    scene: Any, data: Make, tmp_path: Path
) -> None:
    good = scene("good.png", 1)
    (good.parent / "cut.png").write_bytes(good.read_bytes()[:300])
    (good.parent / "empty.png").write_bytes(b"")
    scene("small.png", 2, (40, 40))
    scene("brace.png", 3)
    (good.parent / "brace.txt").write_text("a {zorp} robot")
    section = data(tmp_path / "pictures")
    with pytest.raises(DataError, match="4 faults; nothing was used") as refused:
        preflight(section, 64)
    lines = sorted(refused.value.faults)
    assert [line.split(":")[0] for line in lines] == [
        "brace.png",
        "cut.png",
        "empty.png",
        "small.png",
    ]
    assert 'caption in brace.txt: unknown placeholder "{zorp}"' in lines[0]
    assert "smaller than the resolution of 64" in lines[3]
    seen = examine(section, 64)
    assert sorted(codes(seen, "error")) == ["broken", "broken", "caption", "too-small"]
    assert [example.name for example in seen.examples] == ["good.png", "small.png"]


def test_a_folder_without_pictures_is_one_fault(data: Make, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="no pictures here"):
        preflight(data(tmp_path / "pictures"), 64)
    assert "no picture that can be used" in examine(data(tmp_path / "pictures"), 64).headline()


def test_impossible_buckets_are_told_once(scene: Any, look: Any) -> None:
    scene("a.png", 1), scene("b.png", 2)
    found = only(look(buckets={"min": 100, "max": 110, "step": 64}), "buckets")
    assert found.severity == "error"
    assert "lower data.buckets.step" in found.text


def test_each_picture_is_decoded_once(
    scene: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene("a.png", 1), scene("b.png", 2)
    opened: list[str] = []

    def decode(path: Path, *rest: Any) -> Any:
        opened.append(path.name)
        return images.decode(path, *rest)

    monkeypatch.setattr(sheets, "decode", decode)
    later = look(None).at(64)
    assert later.findings
    assert sorted(opened) == ["a.png", "b.png"]


def test_progress_counts_pictures_and_faulty_ones(scene: Any, data: Make, tmp_path: Path) -> None:
    scene("a.png", 1)
    (tmp_path / "pictures" / "b.png").write_bytes(b"")
    told: list[tuple[int, int]] = []
    examine(data(tmp_path / "pictures"), 64, progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]


# What an example is


def test_a_key_is_the_content_and_not_the_name(scene: Any, look: Any) -> None:
    path = scene("a.png", 1)
    before = look().examples[0]
    path.rename(path.with_name("b.png"))
    after = look().examples[0]
    assert (before.key, before.pixels) == (after.key, after.pixels)
    other = look(captions={"template": "a {class}, {trigger}"}).examples[0]
    assert other.pixels == before.pixels
    assert other.key != before.key


def test_pictures_in_both_folders(scene: Any, look: Any, data: Make, tmp_path: Path) -> None:
    scene("a.png", 1), scene("b.png", 2)
    (tmp_path / "held").mkdir()
    blocks(2).save(tmp_path / "held" / "x.bmp")
    held = preflight(data(tmp_path / "pictures"), 64, folder=str(tmp_path / "held"))
    assert shared_pictures(look(), held) == [("b.png", "x.bmp")]
    assert held.folder / "x.bmp" == tmp_path / "held" / "x.bmp"


def test_held_out_pictures_may_be_small_and_need_no_mask(
    scene: Any, data: Make, tmp_path: Path
) -> None:
    (tmp_path / "held").mkdir()
    blocks(2, (50, 50)).save(tmp_path / "held" / "x.png")
    blocks(2, (50, 50)).save(tmp_path / "held" / "x.mask.png")
    section = data(tmp_path / "pictures", mask={})
    held = preflight(section, 64, folder=str(tmp_path / "held"))
    assert len(held.examples) == 1
    assert "enlarged" in codes(held, "warning")
    assert only(held, "mask-unused").severity == "note"


# Sizes


def test_enlarged_and_cut_pictures_are_listed(scene: Any, look: Any) -> None:
    (
        scene("small.png", 1, (50, 60)),
        scene("large.png", 2, (300, 100)),
        scene("near.png", 3, (65, 64)),
    )
    sheet = look(upscale=True)
    assert "3 pictures of 50x60 to 300x100, made 64x64" in sheet.summary()[0]
    assert only(sheet, "enlarged").names == ("small.png (50x60, 1.28x)",)
    assert only(sheet, "much-cut").names == ("large.png (300x100, 67%)",)
    assert only(sheet, "cut").names == ("near.png (65x64, 2%)", "small.png (50x60, 17%)")
    assert "data.buckets" in only(sheet, "much-cut").advice
    later = look(None, upscale=True)
    assert not {"enlarged", "cut", "much-cut", "blurred"} & set(codes(later))
    assert later.at(64) == sheet == sheet.at(64)
    with pytest.raises(DataError, match=r"small\.png: 50x60 would be enlarged more than 8 times"):
        later.at(512)


def test_buckets_are_counted_and_smaller_ones_told(scene: Any, look: Any) -> None:
    scene("wide.png", 1, (180, 90)), scene("high.png", 2, (90, 180)), scene("tiny.png", 3, (40, 40))
    sheet = look(buckets={"step": 8})
    shapes = sheet.in_buckets(64)
    assert sum(shapes.values()) == 3
    assert (40, 40) in shapes
    assert "40x40 (1)" in sheet.summary()[0]
    assert only(sheet, "smaller-bucket").names == ("tiny.png (40x40 in 40x40)",)
    assert not codes(sheet, "error")


def test_each_of_several_resolutions_is_checked(scene: Any, data: Make, tmp_path: Path) -> None:
    scene("a.png", 1, (100, 100))
    sheet = examine(data(tmp_path / "pictures", resolution=[64, 128]))
    assert (sheet.resolution, sheet.resolutions) == (64, (64, 128))
    assert "made 64x64 and 128x128" in sheet.headline()
    assert "smaller than the resolution of 128" in only(sheet, "too-small").text


@pytest.mark.parametrize("crop", ["center", "random", "smart"])
def test_crops_lie_in_the_picture_and_have_its_buckets_shape(
    scene: Any, look: Any, crop: str
) -> None:
    scene("a.png", 1, (200, 100))
    sheet = look(crop=crop)
    fits = sheet.crops(sheet.examples[0], 64)
    assert len(fits) == (4 if crop == "random" else 1)
    for fit in fits:
        assert 0 <= fit.left < fit.right <= 200
        assert (fit.top, fit.bottom, fit.width, fit.height) == (0, 100, 64, 64)


def test_a_smart_crop_is_where_the_detail_is(look: Any, tmp_path: Path) -> None:
    picture = Image.new("RGB", (300, 100), (200, 200, 200))
    picture.paste(blocks(1, (90, 90)), (205, 5))
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "a.png")
    sheet = look(crop="smart")
    (fit,) = sheet.crops(sheet.examples[0], 64)
    assert fit.left <= 205
    assert fit.right >= 295


# Words


def test_captions_of_their_own_the_template_and_the_words(scene: Any, look: Any) -> None:
    folder = scene("a.png", 1).parent
    scene("b.png", 2), scene("c.png", 3), scene("d.png", 4)
    (folder / "a.txt").write_text("a zorp robot waving")
    (folder / "b.txt").write_text("two zorpish robots")
    (folder / "c.caption").write_text("Zorp on the beach")
    sheet = look()
    told = [f.text for f in sheet.findings if f.code == "captions"]
    assert told == ["captions: 2 from .txt files", "captions: 1 from .caption files"]
    missing = only(sheet, "missing-caption")
    assert (missing.severity, missing.names) == ("warning", ("d.png",))
    assert 'the template "a {trigger} {class}" captions them' in missing.text
    assert only(sheet, "no-trigger").names == ("b.png",)
    assert "data.captions.trigger: insert" in only(sheet, "no-trigger").advice
    assert only(sheet, "no-class").names == ("c.png",)
    assert "no-trigger" not in codes(look(captions={"trigger": "insert"}))


def test_the_template_alone(scene: Any, look: Any) -> None:
    scene("a.png", 1), scene("b.png", 2)
    assert 'all "a zorp robot", from the template' in "\n".join(look().summary())
    several = look(captions={"template": "dreambooth"})
    assert len(several.examples[0].captions) > 2
    assert "in turn, from the templates" in only(several, "captions").text
    assert "identical-captions" not in codes(several)


@pytest.mark.parametrize(("same", "severity"), [(2, "note"), (4, "warning")])
def test_captions_that_are_the_same(scene: Any, look: Any, same: int, severity: str) -> None:
    for number in range(5):
        text = "a zorp robot" if number < same else f"a zorp robot, number {number}"
        scene(f"{number}.png", number).with_suffix(".txt").write_text(text)
    found = only(look(), "identical-captions")
    assert (found.severity, len(found.names)) == (severity, same)


def test_captions_longer_than_the_encoder_reads(scene: Any, look: Any) -> None:
    scene("a.png", 1).with_suffix(".txt").write_text("a zorp robot waving at us")
    scene("b.png", 2).with_suffix(".txt").write_text("a zorp robot")
    cut = lambda caption: " ".join(caption.split()[3:])  # noqa: E731
    sheet = examine(look().data, 64, cut_words=cut)
    assert 'never reads the end of the caption: a.png ("waving at us")' in "\n".join(
        sheet.summary()
    )
    assert examine(look().data, 64, cut_words=lambda caption: "") == look()


def test_of_tags_that_change_places_other_words_are_cut_at_each_visit(
    scene: Any, look: Any
) -> None:
    scene("a.png", 1).with_suffix(".txt").write_text("a zorp robot, waving, at us")
    scene("b.png", 2).with_suffix(".txt").write_text("a zorp robot at home with us")
    cut = lambda caption: " ".join(caption.split()[4:])  # noqa: E731
    data = look(captions={"shuffle": True}).data
    first, second = (f for f in examine(data, 64, cut_words=cut).findings if "cap" in f.code[4:])
    assert "never reads the end" in first.text
    assert first.names == ('b.png ("home with us")',)
    assert "other words are cut at each visit" in second.text
    assert second.names == ('a.png (as it is written "at us")',)


def test_a_trigger_that_tag_dropout_leaves_out(scene: Any, look: Any) -> None:
    scene("a.png", 1).with_suffix(".txt").write_text("zorp robot, waving")
    scene("b.png", 2).with_suffix(".txt").write_text("waving, zorp robot")
    dropped = only(look(captions={"tag_dropout": 0.1}), "dropped-trigger")
    assert (dropped.severity, dropped.names) == ("warning", ("a.png", "b.png"))
    assert 'leaves out "zorp" at some visits' in dropped.text
    assert "data.captions.keep_tokens: 1" in dropped.advice
    kept = look(captions={"tag_dropout": 0.1, "keep_tokens": 1})
    assert only(kept, "dropped-trigger").names == ("b.png",)
    assert "dropped-trigger" not in codes(look(captions={"tag_dropout": 0.1, "prefix": "zorp,"}))
    assert "dropped-trigger" not in codes(look(captions={"shuffle": True}))


# Looks


def test_a_blurred_picture_is_told_at_the_size_it_is_trained_in(
    scene: Any, look: Any, tmp_path: Path
) -> None:
    scene("sharp.png", 1, (512, 512))
    soft = blocks(2, (512, 512)).filter(ImageFilter.GaussianBlur(6))
    soft.save(tmp_path / "pictures" / "soft.png")
    assert only(look(512), "blurred").names[0].startswith("soft.png (detail 0.0")
    assert "blurred" not in codes(look(64)), "eight times smaller it is sharp"


def test_a_picture_of_nothing(scene: Any, look: Any, paint: Paint) -> None:
    scene("a.png", 1)
    paint("white.png", "white"), paint("grey.png", "grey")
    sheet = look()
    assert only(sheet, "blank").names == ("grey.png", "white.png")
    assert "near-duplicate" not in codes(sheet), "one colour is like any other"


def test_the_same_pixels_in_two_files(scene: Any, look: Any) -> None:
    scene("a.png", 1), scene("b.bmp", 1), scene("c.png", 2)
    found = only(look(), "duplicate")
    assert found.names == ("a.png", "b.bmp")
    assert "the same picture 2 times, seen that much oftener" in found.text
    assert "near-duplicate" not in codes(look())


@pytest.mark.parametrize(
    ("change", "marked"),
    [
        (lambda i: i.resize((70, 70)), "b.png"),
        (lambda i: i.point(lambda v: min(255, round(v * 1.2))), "b.png"),
        (lambda i: i.filter(ImageFilter.GaussianBlur(0.8)), "b.png"),
        (lambda i: i.crop((1, 1, 95, 95)), "b.png"),
        (lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "b.png (mirrored)"),
    ],
    ids=["resized", "brighter", "softer", "cut", "mirrored"],
)
def test_almost_the_same_picture(
    look: Any, tmp_path: Path, change: Callable[[Image.Image], Image.Image], marked: str
) -> None:
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    picture = coarse.resize((96, 96), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "pictures" / "a.png")
    change(picture).save(tmp_path / "pictures" / "b.png")
    blocks(9).save(tmp_path / "pictures" / "other.png")
    assert only(look(), "near-duplicate").names == ("a.png", marked)


def test_different_pictures_are_not_near(scene: Any, look: Any) -> None:
    for number in range(40):
        scene(f"{number:02}.png", number)
    assert not {"duplicate", "near-duplicate", "same-background"} & set(codes(look()))


@pytest.mark.parametrize(("grounds", "told"), [([240] * 4, True), ([240, 240, 90, 20], False)])
def test_one_background_in_all_pictures(
    look: Any, tmp_path: Path, grounds: Sequence[int], told: bool
) -> None:
    (tmp_path / "pictures").mkdir()
    for number, grey in enumerate(grounds):
        picture = Image.new("RGB", (96, 96), (grey, grey, grey))
        picture.paste(blocks(number, (50, 50)), (20 + number, 24))
        picture.save(tmp_path / "pictures" / f"{number}.png")
    assert ("same-background" in codes(look(), "warning")) == told


# Masks


@pytest.fixture
def masked(scene: Any) -> Callable[..., None]:
    def save(name: str, colour: int, size: tuple[int, int] = (96, 96)) -> None:
        folder = scene(f"{name}.png", hash(name) % 1000).parent
        mask = Image.new("L", size, 0)
        mask.paste(colour, (0, 0, size[0] // 2, size[1]))
        mask.save(folder / f"{name}.mask.png")

    return save


def test_masks_of_the_wrong_size_and_black_ones_are_faults(masked: Any, look: Any) -> None:
    masked("good", 255), masked("black", 0), masked("small", 255, (50, 50))
    sheet = look(mask={})
    assert {f.names[0] for f in sheet.errors if f.code == "mask"} == {"black.png", "small.png"}
    (good,) = sheet.examples
    assert good.mask_pixels
    assert sheet.looks[0].coverage == pytest.approx(0.5)
    assert "same-background" not in codes(sheet)


def test_pictures_without_a_mask(masked: Any, scene: Any, look: Any) -> None:
    scene("bare.png", 1)
    assert "there are no masks here" in look(mask={}).errors[0].text
    assert only(look(mask={"source": "alpha"}), "no-mask").severity == "error"
    masked("good", 255)
    found = only(look(mask={}), "no-mask")
    assert (found.severity, found.names) == ("warning", ("bare.png",))


def test_an_alpha_channel_as_mask(look: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture = blocks(1).convert("RGBA")
    solid = picture.copy()
    picture.putalpha(Image.linear_gradient("L").resize((96, 96)))
    picture.save(tmp_path / "pictures" / "a.png")
    solid.save(tmp_path / "pictures" / "solid.png")
    sheet = look(mask={"source": "alpha"}, background="black")
    assert only(sheet, "mask-full").names == ("solid.png",)
    assert "transparent parts laid over black" in only(sheet, "converted").text
    assert len({example.mask_pixels for example in sheet.examples}) == 2


def test_a_crop_without_the_masked_subject_is_a_fault(look: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    blocks(1, (300, 96)).save(tmp_path / "pictures" / "a.png")
    mask = Image.new("L", (300, 96), 0)
    mask.paste(255, (270, 10, 290, 90))
    mask.save(tmp_path / "pictures" / "a.mask.png")
    assert "leaves out all of the masked subject" in only(look(mask={}), "mask").text
    assert not look(mask={}, crop="smart").errors
    assert not look(mask={"background_weight": 0.1}).errors


# The summary


def test_many_names_are_counted_in_the_summary_and_all_in_the_findings(
    scene: Any, look: Any
) -> None:
    for number in range(45):
        scene(f"{number:02}.png", number, (96, 70))
    sheet = look()
    line = next(line for line in sheet.summary() if "cut off" in line)
    assert "39.png" in line
    assert line.endswith("and 5 more")
    assert len(only(sheet, "cut").names) == 45


def test_warnings_come_before_notes(scene: Any, look: Any) -> None:
    scene("a.png", 1, (96, 80)).with_suffix(".txt").write_text("a robot")
    severities = [note.severity for note in look().notes]
    assert severities == sorted(severities, key=["warning", "note"].index)
    assert "warning" in severities
