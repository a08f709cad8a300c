"""Parquet files, Hub datasets and webdataset shards: streamed, kept as files, never trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import Canary
from PIL import Image

from tunekit.data.reading import Reading
from tunekit.data.source import Found, read
from tunekit.data.spool import suffix_of
from tunekit.data.tables import open_dataset, read_rows
from tunekit.errors import UserError
from tunekit.schema_source import Pictures

Table = Callable[..., Path]
Shard = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep pictures under tmp_path, and let nothing reach the network."""
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pictures"


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Return a function that writes columns as tmp_path/NAME.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str = "a", **columns: Any) -> Path:
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return path

    return write


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Return a function that packs members as tmp_path/NAME.tar."""

    def pack(members: dict[str, bytes | str], name: str = "a") -> Path:
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for member, data in members.items():
                content = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return pack


def picture(shade: int = 0, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 20, 30)).save(data, kind)
    return data.getvalue()


def look(path: Path | str, mask: bool = False, **changes: Any) -> Found:
    return read([Pictures(path=str(path), **changes)], mask=mask)


def told(found: Found) -> str:
    return "\n".join(str(finding) for finding in found.findings if finding.severity != "error")


def words(found: Found) -> list[tuple[str, tuple[str, ...], str]]:
    return [(record.name, record.captions, record.origin) for record in found.records]


# Parquet


def test_a_table_of_bytes(table: Table, cache: Path) -> None:
    shown: list[str] = []
    path = table(img=[picture(1), picture(2, "JPEG")], caption=["one", "two"], seed=[1, 2])
    found = read([Pictures(path=str(path), repeats=2)], progress=shown.append)
    assert not found.faults
    assert words(found) == [
        ("a.parquet:0", ("one",), "a.parquet:0"),
        ("a.parquet:1", ("two",), "a.parquet:1"),
    ]
    assert [r.path.read_bytes() for r in found.records] == [picture(1), picture(2, "JPEG")]
    assert [r.path.suffix for r in found.records] == [".png", ".jpg"]
    assert all(r.path.is_relative_to(cache) and r.repeats == 2 for r in found.records)
    assert "columns that are read: img (pictures), caption (captions)" in told(found)
    assert "columns that are not used: seed" in told(found)
    size = len(picture(1) + picture(2, "JPEG"))
    assert f"2 pictures ({size} bytes) kept as files in {cache}" in told(found)
    assert shown == ["a.parquet:0", "a.parquet:1"]


def test_a_table_as_datasets_writes_it(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"image": {"bytes": picture(n), "path": f"{n}.png"}, "text": f"robot {n}", "weight": n + 1}
        for n in range(40)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "weight": datasets.Value("float32"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "x.parquet")
    found = look(tmp_path / "x.parquet")
    assert [(r.captions, r.weight) for r in found.records] == [
        ((f"robot {n}",), n + 1.0) for n in range(40)
    ]
    assert [r.path.read_bytes() for r in found.records] == [picture(n) for n in range(40)]


def test_several_files_are_one_source(table: Table, tmp_path: Path) -> None:
    (
        table("t/train-0", image=[picture(1)], text=["a"]),
        table("t/train-1", image=[picture(2)] * 2, text=["b", "c"]),
    )
    found = look(tmp_path / "t" / "train-*.parquet")
    assert words(found) == [
        ("train-0.parquet:0", ("a",), "train-0.parquet:0"),
        ("train-1.parquet:0", ("b",), "train-1.parquet:0"),
        ("train-1.parquet:1", ("c",), "train-1.parquet:1"),
    ]
    table("t/train-2", image=[picture(1)], prompt=["a"])
    (tmp_path / "t" / "train-3.parquet").write_bytes(b"PAR1 and nothing")
    faults = look(tmp_path / "t" / "train-*.parquet").faults
    assert len(faults) == 2
    assert "train-2.parquet: has the columns image (binary), prompt (string) where" in faults[0]
    assert "train-3.parquet: no Parquet file, or a broken one" in faults[1]
    good = (tmp_path / "t" / "train-0.parquet").read_bytes()
    (tmp_path / "t" / "train-3.parquet").write_bytes(good.replace(b"image", b"im\xffge"))
    faults = look(tmp_path / "t" / "train-*.parquet").faults
    assert "train-3.parquet: no Parquet file, or a broken one" in faults[1]


def test_captions_lists_and_rows_without(table: Table) -> None:
    images = [picture(n) for n in range(3)]
    found = look(table(image=images, text=[["a", "b"], None, ["c"]], text_2=["d", "e", None]))
    assert words(found) == [
        ("a.parquet:0", ("a", "b", "d"), "a.parquet:0"),
        ("a.parquet:1", (), "template"),
        ("a.parquet:2", ("c",), "a.parquet:2"),
    ]
    assert "warning: rows without a caption, which the template captions: a.parquet:1" in told(
        found
    )


def test_files_beside_each_other_keep_their_names(table: Table, shard: Shard) -> None:
    paths = [table(image=[picture(1)], text=["a"]), shard({"k.png": picture(2)})]
    found = read([Pictures(path=str(path)) for path in paths])
    assert [r.name for r in found.records] == ["a.parquet:0", "a.tar/k"]
    assert "columns that are read: a.parquet/image (pictures)" in told(found)


def test_which_column_is_never_guessed(table: Table) -> None:
    both = table(image=[picture()], photo=[picture()], text=["a"])
    assert look(both).faults == [
        f"{both}: pictures may be in image or photo; name one as image_column"
    ]
    assert words(look(both, image_column="photo"))[0][1] == ("a",)
    assert "columns that are not used: image" in told(look(both, image_column="photo"))
    [fault] = look(both, image_column="foto").faults
    assert (
        'no image_column "foto" (did you mean "photo"?); the columns are: image (binary)' in fault
    )
    [fault] = look(both, image_column="text").faults
    assert "holds string and no pictures (links and file names are not followed)" in fault
    captions = table(image=[picture()], text=["a"], caption=["b"])
    [fault] = look(captions).faults
    assert "captions may be in text or caption; name one as caption_column; the columns" in fault
    assert words(look(captions, caption_column="caption"))[0][1] == ("b",)
    links = table(url=["https://example.org/a.png"], text=["a"])
    [fault] = look(links).faults
    assert (
        fault == f"{links}: no column holds pictures; the columns are: url (string), text (string)"
    )
    other = table(image=[picture()], prompt=["a"])
    assert "warning: columns that are not used: prompt; name the one" in told(look(other))
    assert words(look(other)) == [("a.parquet:0", (), "template")]


def test_masks_weights_and_splits(table: Table) -> None:
    path = table(
        image=[picture(1), picture(2), picture(3)],
        mask=[picture(255), None, None],
        text=["a", "b", "c"],
        weight=[2.0, None, 1.0],
        split=["train", None, "test"],
    )
    found = look(path, mask=True)
    assert [(r.captions, r.weight, r.mask is not None) for r in found.records] == [
        (("a",), 2.0, True),
        (("b",), 1.0, False),
    ]
    assert found.records[0].mask is not None
    assert found.records[0].mask.read_bytes() == picture(255)
    assert '1 row of the split "test" is not used' in told(found)
    assert not [finding for finding in found.findings if finding.code == "mask-unused"]
    unasked = [f for f in look(path).findings if f.code == "mask-unused"]
    assert [(f.severity, f.names) for f in unasked] == [("warning", ("mask",))]
    assert "columns that are not used" not in told(look(path))
    assert "no mask, so the whole picture is trained: a.parquet:1" in told(found)
    assert [r.captions for r in look(path, split="test").records] == [("c",)]
    assert look(path, split="val").faults == [
        f'{path}: no row of the split "val"; there are: test, train'
    ]
    assert [r.mask for r in look(path).records] == [None, None]
    assert "mask" in told(look(path))
    bare = table("bare", image=[picture()], text=["a"])
    assert "data.mask is set, but there are no masks" in look(bare, mask=True).faults[0]
    assert 'split "test"' in look(bare, split="test").faults[0]


def test_every_faulty_row_at_once(table: Table) -> None:
    path = table(
        image=[picture(), None, b"", picture(), picture(), picture()],
        text=["a", "b", "c", " ", "x" * 50_000, "d"],
        weight=[1.0, 1.0, 1.0, 1.0, 1.0, -1.0],
    )
    found = look(path)
    assert found.faults == [
        'a.parquet:1: no picture in "image"',
        'a.parquet:2: an empty picture in "image" (0 bytes)',
        "a.parquet:3: the caption is empty",
        "a.parquet:4: 50,000 characters are no caption; the limit is 10,000",
        'a.parquet:5: "weight" is -1.0; a number above 0, at most 1000, is needed',
    ]
    assert len(found.records) == 1
    import pyarrow as pa

    empty = table("empty", image=pa.array([], pa.binary()), text=pa.array([], pa.string()))
    assert look(empty).faults == [f"{empty}: no rows"]


def test_a_table_opens_no_file_that_it_names(table: Table, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    path = table(image=[{"bytes": None, "path": str(secret)}], text=["a"])
    assert look(path).faults == [
        "a.parquet:0: holds the name of a file and not the picture; such names are not followed"
    ]


def test_a_damaged_kept_picture_is_written_again(table: Table) -> None:
    path = table(image=[picture()], text=["a"])
    kept = look(path).records[0].path
    kept.write_bytes(b"damaged")
    assert look(path).records[0].path == kept
    assert kept.read_bytes() == picture()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux's to tell")
def test_memory_does_not_grow_with_a_table(table: Table) -> None:
    """100 MB of pictures take no more memory than 10 MB."""
    import pyarrow.parquet as pq

    program = (
        "import re, sys; from pathlib import Path; from tunekit.data.source import read; "
        "from tunekit.schema_source import Pictures\n"
        "for path in sys.argv[1:]:\n"
        "    found = read([Pictures(path=path)])\n"
        # getrusage would give the peak of this process, where that is the higher one
        r"    peak = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())"
        "\n    print(len(found.records), int(peak[1]) // 1024)"
    )
    paths = []
    for rows in (20, 200):
        path = table(f"{rows}", image=[os.urandom(500_000) for _ in range(rows)])
        pq.write_table(pq.read_table(path), path, row_group_size=20)  # as `datasets` writes them
        paths.append(str(path))
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (few, before), (many, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (20, 200)
    assert after - before < 40


# The Hub: its own path is tried on a folder laid out like a dataset


@pytest.fixture
def repository(table: Table, tmp_path: Path) -> Path:
    table("repo/data/train-00000", image=[{"bytes": picture(1), "path": "1.png"}], text=["a"])
    table("repo/data/test-00000", image=[{"bytes": picture(2), "path": "2.png"}], text=["b"])
    return tmp_path / "repo"


def hub(folder: Path, root: str = "", **changes: Any) -> tuple[list[Any], list[Any]]:
    source = Pictures(dataset="owner/name", **changes)
    return read_rows(open_dataset(str(folder), root or str(folder), source), source, Reading())


def test_a_dataset_and_its_splits(repository: Path) -> None:
    [record], _ = hub(repository)
    assert (record.name, record.captions, record.path.read_bytes()) == (
        "train:0",
        ("a",),
        picture(1),
    )
    [record], _ = hub(repository, split="test")
    assert (record.name, record.captions) == ("test:0", ("b",))
    with pytest.raises(UserError, match=r"Bad split: val\. Available splits: \['t"):
        hub(repository, split="val")
    with pytest.raises(UserError, match="'more' not found"):
        hub(repository, config="more")


def test_a_dataset_of_picture_files(tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.png").write_bytes(picture(3))
    line = {"file_name": "a.png", "text": "a zorp"}
    (folder / "train" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    [record], _ = hub(folder)
    assert (record.captions, record.path.read_bytes()) == (("a zorp",), picture(3))
    records, findings = hub(folder, root="hf://datasets/owner/name")
    assert not records
    assert "such names are not followed" in findings[0].text


def test_a_dataset_of_links_and_one_with_a_script(tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "train.csv").write_text("url,text\nhttps://example.org/a.png,x\n")
    _, [finding] = hub(folder)
    assert "no column holds pictures; the columns are: url (string), text (string)" in finding.text
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError) as caught:
        hub(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = read([Pictures(dataset="owner/name")])
    [fault] = found.faults
    assert fault.startswith("owner/name: Couldn't reach 'owner/name' on the Hub")
    assert fault.endswith("check the network, or name files on this disk as `path`")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    [fault] = read([Pictures(dataset="owner/name")]).faults
    assert "is a file or folder here too; name it as `path: ./owner/name`" in fault


# Shards


def test_a_shard(shard: Shard, cache: Path) -> None:
    path = shard(
        {
            "00.jpg": picture(1, "JPEG"),
            "00.txt": "\ufeffa zorp\r\nat night\n",
            "./sub/01.PNG": picture(2),
            "sub/01.json": json.dumps({"text": ["one", "two"], "weight": 2}),
            "02.webp": picture(3, "WEBP"),
            "02.caption": "three",
            "02.cls": "7",
            "03.png": picture(4),
            "._03.png": "junk of another system",
        }
    )
    found = look(path)
    assert not found.faults
    assert words(found) == [
        ("a.tar/00", ("a zorp at night",), "a.tar/00.txt"),
        ("a.tar/sub/01", ("one", "two"), "a.tar/sub/01.json"),
        ("a.tar/02", ("three",), "a.tar/02.caption"),
        ("a.tar/03", (), "template"),
    ]
    assert [r.weight for r in found.records] == [1, 2, 1, 1]
    assert found.records[0].path.read_bytes() == picture(1, "JPEG")
    assert found.records[1].path.is_relative_to(cache)
    said = told(found)
    assert "several lines joined to one caption: a.tar/00.txt" in said
    assert "members that are not used: .cls (1)" in said
    assert "left aside: a.tar/._03.png" in said
    assert "4 pictures" in said


def test_masks_in_shards(shard: Shard) -> None:
    path = shard(
        {
            "a.jpg": picture(1, "JPEG"),
            "b.png": picture(2),
            "a.mask.png": picture(3),
            "b-masklabel.png": picture(4),
            "c.png": picture(5),
        }
    )
    found = look(path, mask=True)
    assert [r.mask and r.mask.read_bytes() for r in found.records] == [
        picture(3),
        picture(4),
        None,
    ]
    assert "no mask, so the whole picture is trained: a.tar/c" in told(found)
    assert (
        "warning: masks that have no effect, since data.mask takes none from files: a.tar/a, "
        "a.tar/b; set `data.mask: {source: files}` to use them" in told(look(path))
    )
    assert len(look(path).records) == 3
    assert "no masks here" in look(shard({"a.png": picture()}), mask=True).faults[0]


def test_several_shards(shard: Shard, tmp_path: Path) -> None:
    shard({"a.png": picture(1), "a.txt": "x"}, "s-0"), shard({"a.png": picture(2)}, "s-1")
    assert [r.name for r in look(tmp_path / "s-*.tar").records] == ["s-0.tar/a", "s-1.tar/a"]


def test_which_member_is_never_guessed(shard: Shard) -> None:
    path = shard({"a.jpg": picture(1, "JPEG"), "a.png": picture(2), "a.txt": "x", "a.caption": "y"})
    assert look(path).faults == ["a.tar/a: pictures may be in jpg or png; name one as image_column"]
    assert look(path, image_column="png").faults == [
        "a.tar/a: captions may be in .txt or .caption; name one as caption_column"
    ]
    [record] = look(path, image_column="png", caption_column="txt").records
    assert (record.path.read_bytes(), record.captions) == (picture(2), ("x",))
    assert (
        'no caption "prompt"' in look(path, image_column="png", caption_column="prompt").faults[0]
    )
    assert 'no picture "webp"' in look(path, image_column="webp").faults[0]
    assert "shards name none" in look(path, image_column="png", split="test").faults[0]


def test_faults_of_a_shard_are_told_with_their_members(shard: Shard) -> None:
    path = shard(
        {
            "a.png": picture(),
            "a.txt": "a zorp".encode("utf-16"),
            "b.png": picture(),
            "b.json": "{",
            "c.png": picture(),
            "c.json": json.dumps({"text": "x", "weight": 0}),
            "d.txt": "nobody's",
            "e.heic": "x",
            "f.png": picture(),
            "f.txt": "x" * 50_000,
            "g.png": picture(),
            "g.txt": " ",
            "../h.png": picture(),
        }
    )
    assert look(path).faults == [
        "a.tar/../h.png: a name that leads out of the shard; pack it under a plain name",
        "a.tar/a.txt: UTF-16; save it as UTF-8",
        "a.tar/b.json: not valid JSON: Expecting property name enclosed in double quotes "
        "(column 2)",
        'a.tar/c.json: "weight" is 0; a number above 0, at most 1000, is needed',
        "a.tar/d: no picture under this name; it has: txt",
        "a.tar/e: no picture under this name; .heic cannot be read, pack it as PNG or JPEG; it "
        "has: heic",
        "a.tar/f.txt: 50,000 bytes of words; the limit is 40,003",
        "a.tar/g.txt: the caption is empty",
    ]


def test_broken_and_empty_shards(shard: Shard, tmp_path: Path) -> None:
    path = shard({"a.png": picture(), "b.png": picture()})
    path.write_bytes(path.read_bytes()[:700])
    assert "a.tar: no tar file, or a broken one" in look(path).faults[0]
    path.write_text("no tar")
    assert "a.tar: no tar file, or a broken one" in look(path).faults[0]
    assert "no pictures in these shards" in look(shard({})).faults[0]
    assert look(shard({"a.png": b""})).faults == ["a.tar/a: an empty picture (0 bytes)"]


def test_a_shard_that_ends_early_or_goes_on_is_a_fault(shard: Shard) -> None:
    path = shard({"a.png": picture(), "a.txt": "x", "b.png": picture()})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = {member.name: member.offset for member in tar}
        end = tar.offset
    assert not look(path).faults

    def fault(data: bytes) -> str:
        path.write_bytes(data)
        [line] = look(path).faults
        return line

    cut = "of the 1,024 zero bytes that end a tar file behind"
    again = "pack or download it again"
    assert fault(whole[: starts["b.png"]]) == f"a.tar: cut off: 0 {cut} a.txt; {again}"
    assert fault(whole[:end]) == f"a.tar: cut off: 0 {cut} b.png; {again}"
    assert fault(whole[: end + 512]) == f"a.tar: cut off: 512 {cut} b.png; {again}"
    assert fault(whole[: starts["b.png"] + 100]) == (
        f"a.tar: broken: neither a member nor the end behind a.txt; {again}"
    )
    assert fault(whole + whole).startswith("a.tar: there is more behind the end")
    path.write_bytes(whole[: end + 1024])
    assert not look(path).faults
    assert [r.name for r in look(path).records] == ["a.tar/a", "a.tar/b"]


def test_words_of_a_shard_that_no_disk_could_hold(shard: Shard) -> None:
    path = shard(
        {
            "a.png": picture(1),
            "a.json": '{"text": "a zorp \\ud800"}',
            "b.png": picture(2),
            "b.json": '{"text": "x", "weight": 1' + "0" * 5000 + "}",
            "c.png": picture(3),
            "c.json": '{"text": "x", "weight": 1' + "0" * 400 + "}",
            "d\udcff.png": picture(4),
        }
    )
    faults = look(path).faults
    assert faults[0] == r"a.tar/d\xff.png: the name is not UTF-8; rename it"
    assert r"a.tar/a.json: \ud800 is half of a character" in faults[1]
    assert "a.tar/b.json: a number of thousands of digits" in faults[2]
    assert 'a.tar/c.json: "weight" is 10000' in faults[3]
    assert len(faults) == 4


def test_links_in_a_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert "a link or device" in look(tmp_path / "a.tar").faults[0]


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "PT"])
def test_pickles_in_a_shard_are_never_opened(shard: Shard, tmp_path: Path, suffix: str) -> None:
    canary = tmp_path / "canary"
    path = shard({"a.png": picture(), f"a.{suffix}": pickle.dumps(Canary(canary))})
    [fault] = look(path).faults
    assert f"a.tar/a.{suffix}: .{suffix.lower()} files can run code" in fault
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_suffixes_are_those_of_the_content(kind: str) -> None:
    made = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    assert suffix_of(picture(1, kind)) == made
    assert suffix_of(b"<html>") == ".bin"


def test_a_cache_that_cannot_be_written_is_said(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(image=[picture()], text=["a"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEKIT_CACHE", os.fspath(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="TUNEKIT_CACHE"):
        look(path)
