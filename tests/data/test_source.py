"""Folders that are read, and every fault of a folder in one error (FAULTS 13 to 17)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tunekit.data import DataError, DataSheet, load_examples, preflight
from tunekit.data.sheet import shared_pictures
from tunekit.errors import UserError
from tunekit.schema import Data

Paint = Callable[..., Path]
Metadata = Callable[[list[dict[str, Any] | str]], None]


@pytest.fixture
def check(tmp_path: Path, data: Callable[..., Data]) -> Callable[..., DataSheet]:
    """Return a function that runs the preflight over tmp_path/pictures."""

    def run(resolution: int = 64, **changes: Any) -> DataSheet:
        return preflight(data(changes.pop("source", tmp_path / "pictures"), **changes), resolution)

    return run


def faults(check: Callable[..., DataSheet], **changes: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        check(**changes)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def notes(sheet: DataSheet) -> str:
    return "\n".join(sheet.summary())


# Captions


def test_captions_from_metadata(check: Any, paint: Paint, metadata: Metadata) -> None:
    paint("a.png", (1, 2, 3)), paint("sub/ü b.png", (4, 5, 6))
    (paint("a.png").parent / "README.md").write_text("how they were made")
    metadata(
        [
            {"file_name": "sub/ü b.png", "text": " a {trigger} {class} at night "},
            "",
            {"text": "a zorp robot", "file_name": "./a.png", "seed": 3},
        ]
    )
    sheet = check()
    assert [(e.name, e.caption, e.origin) for e in sheet.examples] == [
        ("a.png", "a zorp robot", "metadata.jsonl:3"),
        ("sub/ü b.png", "a zorp robot at night", "metadata.jsonl:1"),
    ]
    assert sheet.caption_sources() == {"metadata.jsonl": 2}
    assert "left aside: README.md" in notes(sheet)
    assert "not used: seed" in notes(sheet)
    assert not [note for note in sheet.notes if note.severity == "warning"]


def test_captions_from_sidecars_and_the_template_for_the_rest(check: Any, paint: Paint) -> None:
    folder = paint("a.png", (1, 2, 3)).parent
    paint("b.v2.JPG", (4, 5, 6)), paint("c.png", (7, 8, 9))
    (folder / "a.txt").write_bytes("\ufeffa zorp robot\r\nwaving\n".encode())
    (folder / "b.v2.txt").write_text("a robot")
    sheet = check(caption="{class} {trigger}")
    assert [(e.caption, e.origin) for e in sheet.examples] == [
        ("a zorp robot waving", "a.txt"),
        ("a robot", "b.v2.txt"),
        ("robot zorp", "template"),
    ]
    assert sheet.caption_sources() == {".txt files": 2, "the template": 1}
    said = notes(sheet)
    assert "several lines joined to one caption: a.txt" in said
    assert 'does not say "zorp", so it does not teach the trigger: b.v2.JPG' in said
    assert 'the template "{class} {trigger}" captions them: c.png' in said


def test_the_template_alone(check: Any, paint: Paint, data: Any, tmp_path: Path) -> None:
    paint("a.png")
    assert 'all "a zorp robot", from the template' in notes(check())
    assert [e.origin for e in load_examples(data(tmp_path / "pictures"))] == ["template"]


# Faults of the folder


def test_no_folder_a_file_an_empty_folder(check: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    with pytest.raises(UserError, match=r"pictures: there is no such folder"):
        check()
    folder.mkdir()
    with pytest.raises(UserError, match=r"no pictures here \(it is empty\)"):
        check()
    (folder / "movie.mp4").write_text("")
    with pytest.raises(UserError, match=r"no pictures here \(it holds movie\.mp4\)"):
        check()
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no pictures here"):
        check()
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(UserError, match="this is a file"):
        check(source=folder)


def test_every_broken_picture_is_listed_at_once(check: Any, paint: Paint) -> None:
    folder = paint("good.png").parent
    whole = paint("cut.jpg", size=(200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_text("<!DOCTYPE html><p>404")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    paint("dot.png", size=(1, 1))
    found = faults(check)
    assert [fault.split(":")[0] for fault in sorted(found)] == [
        "cut.jpg",
        "dot.png",
        "empty.png",
        "page.png",
        "phone.heic",
    ]
    assert "truncated" in next(f for f in found if f.startswith("cut"))
    assert "web page" in next(f for f in found if f.startswith("page"))
    assert "1x1 would be enlarged" in next(f for f in found if f.startswith("dot"))


def test_links_and_hidden_files(check: Any, paint: Paint, tmp_path: Path) -> None:
    folder = paint("a.png").parent
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    (folder / "hidden").symlink_to(tmp_path)
    (folder / "out.png").symlink_to(secret)
    (folder / "lost.png").symlink_to(folder / "nothing.png")
    (folder / ".thumbs").mkdir()
    (folder / "._a.png").write_bytes(b"junk")
    assert sorted(faults(check)) == [
        "hidden: a link to a folder; put the pictures here, or name that folder as data.source",
        "lost.png: a link to nothing, or not an ordinary file",
        "out.png: a link that leads out of the folder; put the file itself here",
    ]
    for name in ("hidden", "out.png", "lost.png"):
        (folder / name).unlink()
    (folder / "inside.png").symlink_to("a.png")
    sheet = check()
    assert "left aside: ._a.png, .thumbs/" in notes(sheet)
    assert "the same picture 2 times, seen that much oftener: a.png, inside.png" in notes(sheet)


def test_a_fifo_does_not_hang(check: Any, paint: Paint) -> None:
    os.mkfifo(paint("a.png").parent / "b.png")
    assert faults(check) == ("b.png: a link to nothing, or not an ordinary file",)


def test_a_linked_folder_is_a_folder(check: Any, paint: Paint, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(paint("a.png").parent)
    assert len(check(source=link).examples) == 1


# Faults of sidecars


def test_faults_of_sidecars(check: Any, paint: Paint) -> None:
    folder = paint("a.png").parent
    for name in ("b.png", "b.jpg", "c.png", "d.png", "e.png", "f.png"):
        paint(name)
    (folder / "aa.txt").write_text("a caption whose picture was renamed")
    (folder / "b.txt").write_text("for which of the two?")
    (folder / "c.txt").write_text(" \n")
    (folder / "d.txt").write_bytes("a zorp robot".encode("utf-16"))
    (folder / "e.txt").write_text("x" * 50_000)
    (folder / "f.txt").write_text("a {red|blue} robot")
    (folder / "a.caption").write_text("a zorp robot")
    found = "\n".join(sorted(faults(check)))
    assert "a.caption: captions are read from .txt files; rename it" in found
    assert 'aa.txt: there is no picture of that name (did you mean "a"?)' in found
    assert "b.txt: captions b.jpg and b.png at once" in found
    assert "c.txt: the caption is empty; write one, or delete the file" in found
    assert "d.txt: UTF-16; save it as UTF-8" in found
    assert "e.txt: 50,000 characters are no caption" in found
    assert 'f.png: caption in f.txt: unknown placeholder "{red|blue}"' in found
    assert found.count("\n") == 6


# Faults of metadata.jsonl


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "a.png", "text": "x"', "not valid JSON: Expecting ',' delimiter (column"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[1, 2]", "a JSON object is needed, this is [1, 2]"),
        ('{"file_name": "a.png", "text": "x", "text": "y"}', 'key "text" stands twice'),
        ({"text": "x"}, '"file_name" is missing'),
        ({"image": "a.png", "text": "x"}, '"file_name" is missing; "image" should be called that'),
        ({"file_name": "a.png", "caption": "x"}, '"text" is missing; "caption" should be'),
        ({"file_name": "a.png", "txt": "x"}, '"text" is missing; "txt" should be called that'),
        ({"file_name": "a.png", "text": None}, '"text" is missing'),
        ({"file_name": "a.png", "text": 3}, '"text" is 3 and not text'),
        ({"file_name": "a.png", "text": " "}, "a.png: the caption is empty"),
        ({"file_name": "a.png", "text": "x", "mask": "m.png"}, '"mask" is not supported'),
        ({"file_name": "../a.png", "text": "x"}, '"../a.png": ".." leads out of the folder'),
        ({"file_name": "sub/../a.png", "text": "x"}, '".." leads out'),
        ({"file_name": "..\\a.png", "text": "x"}, '".." leads out'),
        ({"file_name": "/etc/a.png", "text": "x"}, '"/etc/a.png": an absolute path'),
        ({"file_name": "C:\\a.png", "text": "x"}, "an absolute path"),
        ({"file_name": "out.png", "text": "x"}, "out.png: a link that leads out of the folder"),
        ({"file_name": "out/a.png", "text": "x"}, "there is no such picture"),
        ({"file_name": "A.png", "text": "x"}, 'no such picture (did you mean "a.png"?)'),
        ({"file_name": "README.md", "text": "x"}, "not a picture by its name"),
        ({"file_name": "ok.png", "text": "again"}, "ok.png is listed already in line 1"),
    ],
)
def test_a_faulty_line_is_told_with_its_number(
    check: Any, paint: Paint, metadata: Metadata, tmp_path: Path, line: Any, says: str
) -> None:
    folder = paint("ok.png").parent
    outside = tmp_path / "elsewhere" / "a.png"
    outside.parent.mkdir()
    Image.new("RGB", (64, 64)).save(outside)
    if "out.png" in str(line):
        (folder / "out.png").symlink_to(outside)
    else:
        paint("a.png")
    (folder / "README.md").write_text("")
    metadata([{"file_name": "ok.png", "text": "a zorp"}, line])
    found = faults(check)
    mine = [fault for fault in found if fault.startswith("metadata.jsonl:2: ")]
    assert len(mine) == 1
    assert says in mine[0]


def test_unlisted_pictures_and_all_faults_together(
    check: Any, paint: Paint, metadata: Metadata
) -> None:
    folder = paint("a.png").parent
    paint("unlisted.png"), paint("c.png")
    (folder / "a.txt").write_text("a second caption")
    (folder / "c.png").write_bytes(b"")
    (folder / "metadata.csv").write_text("file_name,text\n")
    metadata(
        [
            {"file_name": "a.png", "text": "x"},
            "{",
            {"file_name": "gone.png", "text": "x"},
            {"file_name": "c.png", "text": "x"},
        ]
    )
    assert [fault.split("; ")[0] for fault in faults(check)] == [
        "metadata.csv: only a metadata.jsonl in the top folder is read",
        "metadata.jsonl:2: not valid JSON: Expecting property name enclosed in double quotes "
        "(column 2)",
        'metadata.jsonl:3: "gone.png": there is no such picture (did you mean "c.png"?)',
        "unlisted.png: not listed in metadata.jsonl",
        "a.txt: captions stand in metadata.jsonl already",
        "c.png: an empty file (0 bytes)",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"file_name": "a.png", "text": "x"}'.encode("utf-16"), "metadata.jsonl: UTF-16; save"),
        (b'\n{"file_name": "a.png", "text": "\xe4"}', "metadata.jsonl: not UTF-8 (line 2, byte"),
    ],
)
def test_metadata_in_another_encoding(check: Any, paint: Paint, content: bytes, says: str) -> None:
    (paint("a.png").parent / "metadata.jsonl").write_bytes(content)
    assert faults(check)[0].startswith(says)


# What the sheet says


def test_enlarged_and_cut_pictures_are_listed(
    check: Any, paint: Paint, data: Any, tmp_path: Path
) -> None:
    paint("small.png", (1, 1, 1), (50, 60)), paint("large.png", (2, 2, 2), (300, 100))
    sheet = check(resolution=64)
    said = notes(sheet)
    assert "2 pictures of 50x60 to 300x100, made 64x64" in said
    assert "enlarged, which teaches blur: small.png (50x60, 1.28x)" in said
    assert "cut off: large.png (300x100, 67%), small.png (50x60, 17%)" in said
    assert sheet.notes[0].severity == "warning"
    later = preflight(data(tmp_path / "pictures"))
    assert "teaches blur" not in notes(later)
    assert later.at(64) == sheet == sheet.at(64)
    with pytest.raises(DataError, match=r"small\.png: 50x60 would be enlarged more than 8 times"):
        later.at(512)


def test_conversions_are_listed(check: Any, paint: Paint) -> None:
    paint("clear.png", (0, 0, 0, 0), mode="RGBA"), paint("ink.jpg", (0, 9, 9, 0), mode="CMYK")
    said = notes(check())
    assert "transparent parts laid over white: clear.png" in said
    assert "CMYK without a colour profile, converted by the plain formula: ink.jpg" in said


def test_captions_longer_than_the_encoder_reads(check: Any, paint: Paint) -> None:
    (paint("a.png").parent / "a.txt").write_text("a zorp robot waving at us")
    paint("b.png", (9, 9, 9))
    sheet = check().with_cut_captions(lambda caption: " ".join(caption.split()[3:]))
    assert 'never reads the end of the caption: a.png ("waving at us")' in sheet.summary()[1]
    assert check().with_cut_captions(lambda caption: "") == check()


def test_pictures_in_both_folders(check: Any, paint: Paint, tmp_path: Path) -> None:
    paint("a.png", (1, 1, 1)), paint("b.png", (2, 2, 2))
    held = tmp_path / "held"
    held.mkdir()
    Image.new("RGB", (64, 64), (2, 2, 2)).save(held / "x.bmp")
    assert shared_pictures(check(), check(source=held)) == [("b.png", "x.bmp")]


def test_a_key_is_the_content(check: Any, paint: Paint) -> None:
    path = paint("a.png")
    before = check().examples[0]
    path.rename(path.with_name("b.png"))
    after = check().examples[0]
    assert (before.key, before.pixels) == (after.key, after.pixels)
    assert check(caption="a {class}, {trigger}").examples[0].key != before.key
    assert check(caption="a {class}, {trigger}").examples[0].pixels == before.pixels
