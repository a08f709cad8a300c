"""Folders of pictures and words: what is read, and every fault of a folder (FAULTS 13 to 17)."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tunekit.data.source import Found, read
from tunekit.schema_source import Pictures

Paint = Callable[..., Path]
Metadata = Callable[[list[dict[str, Any] | str]], None]
Look = Callable[..., Found]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Return a function that reads tmp_path/pictures."""

    def run(mask: bool = False, **changes: Any) -> Found:
        path = str(changes.pop("path", tmp_path / "pictures"))
        return read([Pictures(path=path, **changes)], mask=mask)

    return run


def told(found: Found) -> str:
    """Return what is told beside faults, one finding a line."""
    return "\n".join(str(finding) for finding in found.findings if finding.severity != "error")


def words(found: Found) -> dict[str, tuple[tuple[str, ...], str]]:
    return {record.name: (record.captions, record.origin) for record in found.records}


# Captions


def test_captions_from_metadata(look: Look, paint: Paint, metadata: Metadata) -> None:
    paint("a.png"), paint("sub/ü b 😀.png")
    (paint("a.png").parent / "README.md").write_text("how they were made")
    metadata(
        [
            {"file_name": "sub/ü b 😀.png", "text": " a {trigger} {class} at night "},
            "",
            {"text": "a zorp robot", "file_name": "./a.png", "seed": 3},
        ]
    )
    found = look()
    assert words(found) == {
        "a.png": (("a zorp robot",), "metadata.jsonl:3"),
        "sub/ü b 😀.png": (("a {trigger} {class} at night",), "metadata.jsonl:1"),
    }
    assert "left aside: README.md" in told(found)
    assert "not used: seed" in told(found)
    assert not found.faults
    assert not [finding for finding in found.findings if finding.severity == "warning"]


def test_several_captions_weight_and_split(look: Look, paint: Paint, metadata: Metadata) -> None:
    for name in "abcd":
        paint(f"{name}.png")
    metadata(
        [
            {"file_name": "a.png", "text": ["one", "two"], "text_10": "four", "text_2": "three"},
            {"file_name": "b.png", "text": "b", "weight": 0.5, "split": None},
            {"file_name": "c.png", "text": "c", "split": "test"},
            {"file_name": "d.png", "text": "d", "split": "train", "wieght": 2},
        ]
    )
    found = look()
    assert [(r.name, r.captions, r.weight) for r in found.records] == [
        ("a.png", ("one", "two", "three", "four"), 1.0),
        ("b.png", ("b",), 0.5),
        ("d.png", ("d",), 1.0),
    ]
    assert 'pictures of the split "test" that are not used (1): c.png' in told(found)
    assert 'not used: wieght (did you mean "weight"?)' in told(found)
    assert [r.name for r in look(split="test").records] == ["c.png"]
    assert look(split="val").faults == [
        'metadata.jsonl: no line of the split "val"; there are: test, train'
    ]


def test_a_split_that_is_no_text_is_told_once(look: Look, paint: Paint, metadata: Metadata) -> None:
    paint("a.png")
    metadata([{"file_name": "a.png", "text": "x", "split": 1}])
    assert look().faults == ['metadata.jsonl:1: a.png: "split" is 1 and not text']


def test_whole_characters_may_be_written_as_halves(
    look: Look, paint: Paint, metadata: Metadata
) -> None:
    paint("a.png")
    metadata(['{"file_name": "a.png", "text": "a zorp \\ud83d\\ude42"}'])
    assert words(look())["a.png"][0] == ("a zorp 🙂",)


def test_captions_from_csv(look: Look, paint: Paint) -> None:
    folder = paint("a.png").parent
    paint("b, c.png")
    lines = '\ufefffile_name,text,text_2,weight,stars\r\n"b, c.png","a zorp,\r\nat night",,2,5\r\n'
    (folder / "metadata.csv").write_bytes((lines + "\r\na.png,x,y,,\r\n").encode())
    found = look()
    assert not found.faults
    assert words(found) == {
        "a.png": (("x", "y"), "metadata.csv:5"),
        "b, c.png": (("a zorp,\r\nat night",), "metadata.csv:2"),
    }
    assert [record.weight for record in found.records] == [1.0, 2.0]
    assert "columns of metadata.csv that are not used: stars" in told(found)


def test_the_column_of_the_captions(look: Look, paint: Paint, metadata: Metadata) -> None:
    paint("a.png")
    metadata([{"file_name": "a.png", "caption": "x", "prompt": "y"}])
    found = look()
    assert words(found)["a.png"][0] == ("x",)
    assert "captions are the column of metadata.jsonl called: caption" in told(found)
    assert words(look(caption_column="prompt"))["a.png"][0] == ("y",)
    assert look(caption_column="promt").faults == [
        'metadata.jsonl: there is no caption_column "promt" (did you mean "prompt"?); the columns '
        "are: file_name, caption, prompt"
    ]
    metadata([{"file_name": "a.png", "caption": "x", "text": "y"}])
    assert look().faults == [
        "metadata.jsonl: captions may be in text or caption; name one as caption_column; the "
        "columns are: file_name, caption, text"
    ]


def test_captions_from_sidecars_and_the_template_for_the_rest(look: Look, paint: Paint) -> None:
    folder = paint("a.png").parent
    paint("b.v2.JPG"), paint("c.png"), paint("d.webp")
    (folder / "a.txt").write_bytes("\ufeffa zorp robot\r\nwaving\n".encode())
    (folder / "b.v2.txt").write_text("a robot")
    (folder / "d.caption").write_text("a zorp")
    found = look()
    assert words(found) == {
        "a.png": (("a zorp robot waving",), "a.txt"),
        "b.v2.JPG": (("a robot",), "b.v2.txt"),
        "c.png": ((), "template"),
        "d.webp": (("a zorp",), "d.caption"),
    }
    assert "several lines joined to one caption: a.txt" in told(found)


def test_one_name_composed_in_two_ways(look: Look, paint: Paint, metadata: Metadata) -> None:
    """macOS hands out "ü" as two signs where it was typed as one."""
    name = unicodedata.normalize("NFD", "über.png")
    folder = paint(name).parent
    typed = unicodedata.normalize("NFC", name)
    (folder / typed.replace("png", "txt")).write_text("a zorp")
    assert words(look())[name][0] == ("a zorp",)
    (folder / typed.replace("png", "txt")).unlink()
    metadata([{"file_name": typed, "text": "a robot"}])
    assert words(look())[name][0] == ("a robot",)


def test_names_that_differ_in_case_only_are_all_read_and_told(look: Look, paint: Paint) -> None:
    folder = paint("A.png", (1, 2, 3)).parent
    if paint("a.png", (4, 5, 6)).samefile(folder / "A.png"):
        pytest.skip("this disk cannot tell them apart")
    (folder / "A.txt").write_text("large")
    (folder / "a.txt").write_text("small")
    found = look()
    assert words(found) == {"A.png": (("large",), "A.txt"), "a.png": (("small",), "a.txt")}
    assert "warning: names that differ in case only" in told(found)
    assert "A.png, a.png; rename them" in told(found)


# Repeats from the names of folders


def test_folders_named_as_sd_scripts_does(look: Look, paint: Paint) -> None:
    folder = paint("10_zorp robot/a.png").parent
    paint("10_zorp robot/b.png"), paint("2_zorp toy/c.png")
    (folder / "b.txt").write_text("a zorp at night")
    found = look()
    assert [(r.name, r.captions, r.origin, r.repeats) for r in found.records] == [
        ("10_zorp robot/a.png", ("zorp robot",), "folder 10_zorp robot", 10),
        ("10_zorp robot/b.png", ("a zorp at night",), "10_zorp robot/b.txt", 10),
        ("2_zorp toy/c.png", ("zorp toy",), "folder 2_zorp toy", 2),
    ]
    assert "each of their pictures: 10_zorp robot/ (10), 2_zorp toy/ (2)" in told(found)
    assert [r.repeats for r in look(repeats=3).records] == [30, 30, 6]


def test_a_year_is_no_count(look: Look, paint: Paint) -> None:
    paint("2024_summer/a.png")
    assert "warning: visits an epoch" in told(look())


def test_faults_of_such_folders(look: Look, paint: Paint) -> None:
    for name in ("10_zorp/a.png", "more/b.png", "0_off/c.png", "99999_far/d.png", "e.png"):
        paint(name)
    assert [fault.split("; ")[0] for fault in look().faults] == [
        'more/: not named "NUMBER_words" as 0_off/ is, whose number is taken as repeats',
        "e.png: lies beside 0_off/, whose number is taken as repeats",
        "0_off/: 0 repeats",
        "99999_far/: 99999 repeats",
    ]


def test_such_folders_at_any_depth_and_the_source_itself(look: Look, paint: Paint) -> None:
    folder = paint("img/10_zorp robot/a.png").parent
    paint("img/10_zorp robot/close/b.png"), paint("img/10_zorp robot/2_zorp toy/c.png")
    found = look()
    assert [(r.name, r.captions, r.origin, r.repeats) for r in found.records] == [
        ("img/10_zorp robot/2_zorp toy/c.png", ("zorp toy",), _folder("2_zorp toy"), 2),
        ("img/10_zorp robot/a.png", ("zorp robot",), "folder img/10_zorp robot", 10),
        ("img/10_zorp robot/close/b.png", ("zorp robot",), "folder img/10_zorp robot", 10),
    ]
    assert "pictures: img/10_zorp robot/2_zorp toy/ (2), img/10_zorp robot/ (10)" in told(found)
    within = look(path=folder)
    assert [(r.name, r.captions, r.repeats) for r in within.records] == [
        ("2_zorp toy/c.png", ("zorp toy",), 2),
        ("a.png", ("zorp robot",), 10),
        ("close/b.png", ("zorp robot",), 10),
    ]
    assert not within.faults
    paint("img/more/d.png"), paint("e.png")
    assert [fault.split("; ")[0].split(" as ")[0] for fault in look().faults] == [
        'img/more/: not named "NUMBER_words"',
        "e.png: lies beside img/10_zorp robot/2_zorp toy/, whose number is taken",
    ]


def _folder(name: str) -> str:
    return f"folder img/10_zorp robot/{name}"


def test_plain_subfolders_say_nothing_of_repeats(look: Look, paint: Paint) -> None:
    paint("front/a.png"), paint("10/b.png"), paint("c.png")
    assert [(r.name, r.repeats) for r in look().records] == [
        ("10/b.png", 1),
        ("c.png", 1),
        ("front/a.png", 1),
    ]


# Masks


def test_masks_by_their_names(look: Look, paint: Paint) -> None:
    folder = paint("a.png").parent
    for name in ("a.mask.png", "b.jpg", "b-masklabel.png", "c.png"):
        paint(name)
    found = look(mask=True)
    assert {r.name: r.mask for r in found.records} == {
        "a.png": folder / "a.mask.png",
        "b.jpg": folder / "b-masklabel.png",
        "c.png": None,
    }
    assert "warning: no mask, so the whole picture is trained: c.png" in told(found)
    assert told(look()) == (
        "warning: masks that have no effect, since data.mask takes none from files: "
        "a.mask.png, b-masklabel.png; set `data.mask: {source: files}` to use them"
    )
    assert not look().faults
    assert [r.name for r in look().records] == ["a.png", "b.jpg", "c.png"]


def test_masks_from_metadata(look: Look, paint: Paint, metadata: Metadata) -> None:
    folder = paint("a.png").parent
    paint("masks/a.png"), paint("b.png"), paint("b.mask.png"), paint("c.png"), paint("masks/c.png")
    metadata(
        [
            {"file_name": "a.png", "text": "x", "mask": "masks/a.png"},
            {"file_name": "b.png", "text": "x"},
            {"file_name": "c.png", "text": "x", "mask": "masks/c.png", "split": "test"},
        ]
    )
    found = look(mask=True)
    assert not found.faults
    assert [r.mask for r in found.records] == [folder / "masks/a.png", folder / "b.mask.png"]
    assert not look().faults
    assert "no effect" in told(look())
    assert "b.mask.png, masks/a.png, masks/c.png" in told(look())


def test_faults_of_masks(look: Look, paint: Paint, metadata: Metadata) -> None:
    folder = paint("a.png").parent
    assert look(mask=True).faults == [
        f"{folder}: data.mask is set, but there are no masks here; name them NAME.mask.png"
    ]
    for name in ("a.mask.png", "a-masklabel.png", "aa.mask.png", "b.png", "b.jpg", "b.mask.png"):
        paint(name)
    assert look(mask=True).faults == [
        "a.mask.png: a.png has a mask in a-masklabel.png too; keep one of them",
        'aa.mask.png: there is no picture of that name (did you mean "a"?); rename it, or move it '
        "out of the folder",
        "b.mask.png: masks b.jpg and b.png at once; give each its own name",
    ]


# Faults of the folder


def test_no_folder_a_file_an_empty_folder(look: Look, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    assert look().faults == [f"{folder}: there is no such folder of pictures"]
    folder.mkdir()
    assert look().faults == [
        f"{folder}: no pictures here (it is empty); PNG, JPEG and WebP files are usual"
    ]
    (folder / "movie.mp4").write_text("")
    assert "no pictures here (it holds movie.mp4)" in look().faults[0]
    (folder / "metadata.jsonl").write_text("\n")
    assert "no pictures here" in look().faults[0]
    (folder / "x.parquet").write_text("")
    assert f"but x.parquet; name the files: {folder}/*.parquet" in look().faults[0]
    assert len(look().faults) == 1


def test_keys_that_a_folder_cannot_fulfil(look: Look, paint: Paint) -> None:
    folder = paint("a.png").parent
    assert look(split="test", caption_column="x").faults == [
        f'{folder}: split "test" is asked, but there is no metadata here',
        f'{folder}: caption_column "x" is set, but there is no metadata here',
    ]
    assert "is for tables and shards" in look(image_column="x").faults[0]


def test_links_and_hidden_files(look: Look, paint: Paint, tmp_path: Path) -> None:
    folder = paint("a.png").parent
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    (folder / "hidden").symlink_to(tmp_path)
    (folder / "out.png").symlink_to(secret)
    (folder / "a.mask.png").symlink_to(secret)
    (folder / "lost.png").symlink_to(folder / "nothing.png")
    (folder / ".thumbs").mkdir()
    (folder / "._a.png").write_bytes(b"junk")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert sorted(look().faults) == [
        "a.mask.png: a link that leads out of the folder; put the file itself here",
        "hidden: a link to a folder; put the pictures here, or name that folder as data.source",
        "lost.png: a link to nothing, or not an ordinary file",
        "out.png: a link that leads out of the folder; put the file itself here",
        "phone.heic: .heic cannot be read; convert it to PNG or JPEG",
    ]
    for name in ("hidden", "out.png", "lost.png", "a.mask.png", "phone.heic"):
        (folder / name).unlink()
    (folder / "inside.png").symlink_to("a.png")
    found = look()
    assert "left aside: ._a.png, .thumbs/" in told(found)
    assert [record.name for record in found.records] == ["a.png", "inside.png"]


def test_a_fifo_does_not_hang(look: Look, paint: Paint) -> None:
    os.mkfifo(paint("a.png").parent / "b.png")
    assert look().faults == ["b.png: a link to nothing, or not an ordinary file"]


def test_a_link_to_itself_is_a_fault(look: Look, paint: Paint) -> None:
    (paint("a.png").parent / "b.png").symlink_to("b.png")
    assert look().faults == ["b.png: a link to nothing, or not an ordinary file"]


def test_names_that_are_not_utf8_are_told_with_escapes(look: Look, paint: Paint) -> None:
    folder = paint("a.png").parent
    raw = os.fsencode(folder)
    for name in (b"b\xff.png", b"c\xff.mp4"):
        Path(os.fsdecode(raw + b"/" + name)).write_bytes((folder / "a.png").read_bytes())
    Path(os.fsdecode(raw + b"/d\xff")).mkdir()
    found = look()
    assert found.faults == [
        r"d\xff/: the name is not UTF-8; rename it",
        r"b\xff.png: the name is not UTF-8; rename it",
    ]
    assert r"left aside: c\xff.mp4" in told(found)
    assert [record.name for record in found.records] == ["a.png"]


def test_a_linked_folder_is_a_folder(look: Look, paint: Paint, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(paint("a.png").parent)
    assert len(look(path=link).records) == 1


# Faults of sidecars


def test_faults_of_sidecars(look: Look, paint: Paint) -> None:
    folder = paint("a.png").parent
    for name in ("b.png", "b.jpg", "c.png", "d.png", "e.png"):
        paint(name)
    (folder / "aa.txt").write_text("a caption whose picture was renamed")
    (folder / "b.txt").write_text("for which of the two?")
    (folder / "c.txt").write_text(" \n")
    (folder / "d.txt").write_bytes("a zorp robot".encode("utf-16"))
    (folder / "e.txt").write_text("x" * 50_000)
    (folder / "a.caption").write_text("a zorp robot")
    (folder / "a.txt").write_text("a zorp robot")
    (folder / "a.cap").write_text("a zorp robot")
    found = "\n".join(sorted(look().faults))
    assert "a.cap: captions are read from .txt and .caption files; rename it" in found
    assert "a.txt: a.png has a caption in a.caption too; keep one of them" in found
    assert 'aa.txt: there is no picture of that name (did you mean "a"?)' in found
    assert "b.txt: captions b.jpg and b.png at once" in found
    assert "c.txt: the caption is empty; write one, or delete the file" in found
    assert "d.txt: UTF-16; save it as UTF-8" in found
    assert "e.txt: 50,000 characters are no caption" in found
    assert found.count("\n") == 6


# Faults of metadata


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "a.png", "text": "x"', "not valid JSON: Expecting ',' delimiter (column"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[1, 2]", "a JSON object is needed, this is [1, 2]"),
        ('{"file_name": "a.png", "text": "x", "text": "y"}', 'key "text" stands twice'),
        ({"text": "x"}, '"file_name" is missing'),
        ({"image": "a.png", "text": "x"}, '"file_name" is missing; "image" should be called that'),
        ({"file_name": "a.png", "prompt": "x"}, '"text" is missing; "prompt" should be'),
        ({"file_name": "a.png", "txt": "x"}, '"text" is missing; "txt" should be called that'),
        ({"file_name": "a.png", "text": None}, '"text" is missing'),
        ({"file_name": "a.png", "text": 3}, '"text" is 3 and not text'),
        ({"file_name": "a.png", "text": " "}, "a.png: the caption is empty"),
        ({"file_name": "a.png", "text": []}, "a.png: the caption is empty"),
        ({"file_name": "a.png", "text": ["x", 3]}, 'a.png: "text" is 3 and not text'),
        ({"file_name": "a.png", "text": ["x", ""]}, "a.png: the caption is empty"),
        ({"file_name": "a.png", "text": "x" * 50_000}, "a.png: 50,000 characters are no caption"),
        ({"file_name": "a.png", "text": "x", "weight": 0}, '"weight" is 0; a number above 0'),
        ({"file_name": "a.png", "text": "x", "weight": "inf"}, '"weight" is "inf"; a number'),
        ({"file_name": "a.png", "text": "x", "weight": True}, '"weight" is true; a number'),
        ({"file_name": "a.png", "text": "x", "split": 3}, '"split" is 3 and not text'),
        ({"file_name": "a.png", "text": "x", "weight": 10**400}, '"weight" is 1000000000000000'),
        (
            '{"file_name": "a.png", "text": "x", "weight": 1' + "0" * 5000 + "}",
            "a number of thousands of digits; write a smaller one",
        ),
        ({"file_name": "a.png", "text": "x \ud800"}, r"\ud800 is half of a character; write the"),
        ({"file_name": "\udfff.png", "text": "x"}, r"\udfff is half of a character"),
        ({"file_name": "a.png", "text": "x", "\udcff": 1}, r"\udcff is half of a character"),
        ('{"\\ud800": 1, "\\ud800": 2}', r'key "\ud800" stands twice'),
        ({"file_name": "a\0.png", "text": "x"}, r'"a\0.png": \0 in the name; name a picture'),
        ({"file_name": "a" * 5000, "text": "x"}, "5,000 characters; no file has so long a name"),
        ({"file_name": "a" * 300, "text": "x"}, "there is no such picture"),
        ({"file_name": "a.png", "text": "x", "mask": "a" * 300}, "there is no such mask"),
        ({"file_name": "a.png", "text": "x", "mask": 3}, '"mask" is 3 and not text'),
        ({"file_name": "a.png", "text": "x", "mask": "m.png"}, '"m.png": there is no such mask'),
        ({"file_name": "a.png", "text": "x", "mask": "../m.png"}, "name a mask inside it"),
        ({"file_name": "a.png", "text": "x", "mask": "out/a.png"}, "a link that leads out"),
        ({"file_name": "a.png", "text": "x", "mask": "README.md"}, "not a picture by its name"),
        ({"file_name": "a.png", "text": "x", "mask": "a.png"}, "cannot be its own mask"),
        ({"file_name": "../a.png", "text": "x"}, '"../a.png": ".." leads out of the folder'),
        ({"file_name": "sub/../a.png", "text": "x"}, '".." leads out'),
        ({"file_name": "..\\a.png", "text": "x"}, '".." leads out'),
        ({"file_name": "/etc/a.png", "text": "x"}, '"/etc/a.png": an absolute path'),
        ({"file_name": "C:\\a.png", "text": "x"}, "an absolute path"),
        ({"file_name": "out.png", "text": "x"}, "out.png: a link that leads out of the folder"),
        ({"file_name": "out/a.png", "text": "x"}, "there is no such picture"),
        ({"file_name": "A.png", "text": "x"}, 'no such picture (did you mean "a.png"?)'),
        ({"file_name": "README.md", "text": "x"}, "not a picture by its name"),
        ({"file_name": "ok.mask.png", "text": "x"}, "a mask by its name, not a picture"),
        ({"file_name": "ok.png", "text": "again"}, "ok.png is listed already in line 1"),
    ],
)
def test_a_faulty_line_is_told_with_its_number(
    look: Look, paint: Paint, metadata: Metadata, tmp_path: Path, line: Any, says: str
) -> None:
    folder = paint("ok.png").parent
    outside = tmp_path / "elsewhere" / "a.png"
    outside.parent.mkdir()
    Image.new("RGB", (64, 64)).save(outside)
    if "out.png" in str(line):
        (folder / "out.png").symlink_to(outside)
    else:
        paint("a.png")
    if '"out/a.png"' in str(line).replace("'", '"') and "mask" in str(line):
        (folder / "out").symlink_to(outside.parent)
    if "ok.mask.png" in str(line):
        paint("ok.mask.png")
    (folder / "README.md").write_text("")
    metadata([{"file_name": "ok.png", "text": "a zorp"}, line])
    mine = [fault for fault in look().faults if fault.startswith("metadata.jsonl:2: ")]
    assert len(mine) == 1
    assert says in mine[0]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("name,text\na.png,x\n", 'metadata.csv:1: the first line names no column "file_name"'),
        ("image,text\na.png,x\n", '"file_name"; "image" should be called that'),
        ("file_name;text\na.png;x\n", "metadata.csv:1: separated by semicolons; save it with"),
        ("file_name\ttext\na.png\tx\n", "metadata.csv:1: separated by tabs"),
        ("file_name,text,text\na.png,x,y\n", 'metadata.csv:1: the column "text" stands twice'),
        ("file_name,text\na.png,x,y\n", "metadata.csv:2: 3 cells where the first line names 2"),
        ("file_name,text\n\na.png\n", "metadata.csv:3: 1 cells where the first line names 2"),
        ('file_name,text\na.png,"x\n', "metadata.csv:2: not valid CSV: unexpected end of data"),
        ('file_name,text\na.png,"x"y\n', "metadata.csv:2: not valid CSV"),
        ("file_name,text\na.png,\n", 'metadata.csv:2: "text" is missing'),
        ("file_name,text,weight\na.png,x,much\n", 'metadata.csv:2: a.png: "weight" is "much"'),
        ("file_name,text\n../a.png,x\n", 'metadata.csv:2: "../a.png": ".." leads out'),
    ],
)
def test_faults_of_csv(look: Look, paint: Paint, lines: str, says: str) -> None:
    (paint("a.png").parent / "metadata.csv").write_text(lines)
    assert says in look().faults[0]


def test_unlisted_pictures_and_all_faults_together(
    look: Look, paint: Paint, metadata: Metadata
) -> None:
    folder = paint("a.png").parent
    paint("unlisted.png"), paint("c.png")
    (folder / "a.txt").write_text("a second caption")
    (folder / "sub").mkdir()
    (folder / "sub" / "metadata.csv").write_text("file_name,text\n")
    metadata(
        [
            {"file_name": "a.png", "text": "x"},
            "{",
            {"file_name": "gone.png", "text": "x"},
            {"file_name": "c.png", "text": "x"},
        ]
    )
    found = look()
    assert [fault.split("; ")[0] for fault in found.faults] == [
        "sub/metadata.csv: only metadata.jsonl or metadata.csv in the top folder is read",
        "metadata.jsonl:2: not valid JSON: Expecting property name enclosed in double quotes "
        "(column 2)",
        'metadata.jsonl:3: "gone.png": there is no such picture (did you mean "c.png"?)',
        "unlisted.png: not listed in metadata.jsonl",
        "a.txt: captions stand in metadata.jsonl already",
    ]
    assert [record.name for record in found.records] == ["a.png", "c.png"]
    (folder / "metadata.csv").write_text("file_name,text\n")
    assert "there is metadata.csv as well; keep one of them" in look().faults[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"file_name": "a.png", "text": "x"}'.encode("utf-16"), "metadata.jsonl: UTF-16; save"),
        (b'\n{"file_name": "a.png", "text": "\xe4"}', "metadata.jsonl: not UTF-8 (line 2, byte"),
    ],
)
def test_metadata_in_another_encoding(look: Look, paint: Paint, content: bytes, says: str) -> None:
    (paint("a.png").parent / "metadata.jsonl").write_bytes(content)
    assert look().faults[0].startswith(says)
