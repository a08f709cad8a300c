"""Files are there whole or not at all, and everybody writes them the same way."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from PIL import Image

from tunekit.errors import UserError
from tunekit.pictures import save_png
from tunekit.wholefile import whole_file, write_whole

PACKAGE = Path(__file__).parent.parent / "tunekit"


def test_a_file_is_there_whole_with_the_mode_of_any_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_whole(tmp_path / "new" / "a.txt", "häuser\r\n")
        save_png(Image.new("RGB", (2, 2)), tmp_path / "new" / "a.png", {})
    finally:
        os.umask(umask)
    assert (tmp_path / "new" / "a.txt").read_bytes() == "häuser\r\n".encode()
    for path in (tmp_path / "new").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_what_breaks_off_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def stopped() -> None:
        with whole_file(path) as part:
            part.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        synced.append((tmp_path / "a.txt").exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(tmp_path / "a.txt", "new")
    assert synced == [False]


def test_a_name_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    path = tmp_path / ("\N{CAT FACE}" * 62 + ".txt")  # 252 of 255 bytes
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.txt: cannot be written: \w+"):
        write_whole(tmp_path / "file" / "a.txt", "new")


@pytest.mark.parametrize(
    "file",
    "data/shards data/cache pictures captioners/_place inspection export".split(),
)
def test_no_file_has_a_way_of_its_own(file: str) -> None:
    text = (PACKAGE / f"{file}.py").read_text()
    assert "tunekit.wholefile" in text
    assert not re.search(r"mkstemp|\.partial\b|fsync|umask\(", text)
