"""Sources of every kind become one list of records, or all their faults."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit.data.source import Found, fault_line, read, stream, weighted_repeats
from tunekit.schema_source import Pictures

Paint = Callable[..., Path]


@pytest.fixture
def subjects(paint: Paint, tmp_path: Path) -> Path:
    """Return a folder with zorp/train (2 pictures), toy/train (3) and toy/more (1)."""
    for name in ("zorp/train/a.png", "zorp/train/b.png", "toy/more/x.png"):
        paint(name)
    for name in ("a", "b", "c"):
        paint(f"toy/train/{name}.png")
    return tmp_path / "pictures"


def sources(root: Path, **settings: dict[str, Any]) -> list[Pictures]:
    return [
        Pictures(path=str(root / name.replace("_", "/")), **changes)
        for name, changes in settings.items()
    ]


def told(found: Found) -> str:
    return "\n".join(str(finding) for finding in found.findings)


def test_several_sources_keep_their_names_and_repeats(subjects: Path) -> None:
    found = read(sources(subjects, zorp_train={"repeats": 3}, toy_train={}, toy_more={}))
    assert [(r.name, r.repeats) for r in found.records] == [
        ("zorp/train/a.png", 3),
        ("zorp/train/b.png", 3),
        ("toy/train/a.png", 1),
        ("toy/train/b.png", 1),
        ("toy/train/c.png", 1),
        ("more/x.png", 1),
    ]
    assert found.label == ", ".join(
        f"{subjects}/{n}" for n in ("zorp/train", "toy/train", "toy/more")
    )
    assert (
        "share of all visits: zorp/train (2 pictures, 3 repeats, 60.0%), "
        "toy/train (3 pictures, 1 repeat, 30.0%), more (1 picture, 1 repeat, 10.0%)" in told(found)
    )


def test_one_source_keeps_plain_names_and_order(subjects: Path) -> None:
    found = read(sources(subjects, toy={"repeats": 2}))
    names = [r.name for r in found.records]
    assert names == ["more/x.png", "train/a.png", "train/b.png", "train/c.png"]
    assert {r.repeats for r in found.records} == {2}
    assert not found.findings


def test_weights_become_repeats(subjects: Path) -> None:
    found = read(sources(subjects, zorp_train={"weight": 2}, toy_train={"weight": 1}))
    assert [r.repeats for r in found.records] == [3, 3, 1, 1, 1]
    assert "zorp/train (2 pictures, 3 repeats, 66.7%, 66.7% asked)" in told(found)
    far = read(sources(subjects, zorp_train={"weight": 1000}, toy_train={"weight": 0.003}))
    assert far.faults == [
        "these weights would take 500,000 repeats, and 10,000 is the most; bring them nearer"
    ]


@given(st.lists(st.tuples(st.floats(0.1, 1000), st.integers(1, 5000)), min_size=1, max_size=5))
def test_weights_are_met_or_it_is_said(parts: list[tuple[float, int]]) -> None:
    weights, visits = [w for w, _ in parts], [n for _, n in parts]
    repeats, near = weighted_repeats(weights, visits)
    total = sum(r * n for r, n in zip(repeats, visits, strict=True))
    off = max(
        abs(r * n / total / (w / sum(weights)) - 1)
        for r, n, w in zip(repeats, visits, weights, strict=True)
    )
    assert min(repeats) >= 1
    assert near == (off <= 0.02)


def test_every_source_s_faults_at_once(subjects: Path) -> None:
    (subjects / "toy/train/a.txt").write_text(" ")
    (subjects / "zorp/train/no.txt").write_text("x")
    missing = Pictures(path=str(subjects / "gone"))
    found = read([*sources(subjects, zorp_train={}, toy_train={}), missing])
    assert [fault.split(";")[0] for fault in found.faults] == [
        "zorp/train/no.txt: there is no picture of that name",
        "toy/train/a.txt: the caption is empty",
        f"{subjects}/gone: there is no such folder of pictures",
    ]
    assert len(found.records) == 5


def test_a_source_named_twice(subjects: Path) -> None:
    found = read(sources(subjects, zorp_train={}) * 2)
    assert found.faults == [
        f"{subjects}/zorp/train: named twice as a source; name it once, with `repeats` or `weight`"
    ]


def test_a_source_named_twice_in_other_words(subjects: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(subjects)
    paths = [subjects / "zorp/train", subjects / "toy/../zorp/train", tmp_path / "link/zorp/train"]
    found = read([Pictures(path=f"{path}", repeats=n) for n, path in enumerate(paths, 1)])
    assert [fault.split(": ")[1].split(";")[0] for fault in found.faults] == [
        f"{paths[1]}, {paths[2]}"
    ]
    apart = [Pictures(path=str(subjects / "zorp/train"), split=name) for name in ("train", "x")]
    assert not [finding for finding in read(apart).findings if finding.code == "source-twice"]


def test_what_a_path_cannot_be(tmp_path: Path, subjects: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.zip", "a.parquet", "b.tar", "c.tar.gz"):
        (tmp_path / name).write_bytes(b"")

    def fault(path: str) -> str:
        [line] = read([Pictures(path=path)]).faults
        return line

    assert fault("gone") == "gone: there is no such folder of pictures"
    assert fault("nobody/gone") == (
        "nobody/gone: there is no such folder of pictures; a dataset on the Hub is named "
        "`source: {dataset: nobody/gone}`"
    )
    (tmp_path / "nobody").mkdir()
    assert fault("nobody/gone") == "nobody/gone: there is no such folder of pictures"
    assert "this is a file" in fault("a.zip")
    assert fault("*.jpg") == "*.jpg: no file has such a name"
    assert "several kinds (.gz, .parquet, .tar, .zip, folder)" in fault("*")
    assert "several folders" in fault("pictures/*")
    assert "unpack it to .tar" in fault("c.tar.gz")


def test_a_stream_gives_back_the_records(subjects: Path) -> None:
    (subjects / "toy/train/a.txt").write_text("a zorp")
    (subjects / "toy/train/a.mask.png").write_bytes(b"not opened")
    records = read(sources(subjects, toy_train={"repeats": 2}), mask=True).records
    assert list(stream(records)) == records
    assert records[0].captions == ("a zorp",)
    assert list(stream([])) == []


def test_a_finding_as_a_line(subjects: Path) -> None:
    (subjects / "zorp/train/no.txt").write_text("x")
    [finding] = read(sources(subjects, zorp_train={})).findings
    assert fault_line(finding).startswith("no.txt: there is no picture")


def test_listing_a_folder_loads_neither_torch_nor_datasets(subjects: Path) -> None:
    program = (
        "import sys; from tunekit.data.source import read; "
        "from tunekit.schema_source import Pictures; "
        f"assert read([Pictures(path={str(subjects)!r})]).records; "
        "print(sorted({'torch', 'datasets', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
