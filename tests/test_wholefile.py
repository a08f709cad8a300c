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
from tunekit.wholefile import (
    check_room,
    part_of,
    remove_folder,
    tidy,
    whole_file,
    whole_folder,
    write_whole,
)

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
    assert synced == [False, True]  # its bytes, then its name in the folder


def test_a_name_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    path = tmp_path / ("\N{CAT FACE}" * 62 + ".txt")  # 252 of 255 bytes
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.txt: cannot be written: \w+"):
        write_whole(tmp_path / "file" / "a.txt", "new")


def test_what_a_killed_process_left_is_told_from_what_others_wrote(tmp_path: Path) -> None:
    def killed() -> None:
        with whole_file(tmp_path / "recipe.yaml") as part:
            part.write_text("half")
            seen.append(part_of(part.name))
            raise KeyboardInterrupt

    seen: list[str | None] = []
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert seen == ["recipe.yaml"]
    assert part_of(".recipe.yaml.12.0123abcd.part") == "recipe.yaml"
    assert part_of("recipe.yaml") is part_of(".bashrc") is part_of("my.1.part") is None


class TestFolders:
    def folder(self, parent: Path, name: str, text: str) -> Path:
        (parent / name).mkdir(parents=True)
        (parent / name / "a.txt").write_text(text)
        return parent / name

    def test_one_takes_anothers_place_when_it_is_whole(self, tmp_path: Path) -> None:
        path = self.folder(tmp_path, "a", "old")
        with whole_folder(path) as partial:
            write_whole(partial / "a.txt", "new")
            assert (path / "a.txt").read_text() == "old"
        assert (path / "a.txt").read_text() == "new"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]

    def test_an_older_one_stays_where_the_new_one_cannot_take_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, rename = self.folder(tmp_path, "a", "old"), Path.rename

        def refused(self: Path, target: Path) -> Path:
            if self.name == ".a.partial":
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refused)
        with pytest.raises(OSError, match="Input/output"), whole_folder(path) as partial:
            write_whole(partial / "a.txt", "new")
        assert (path / "a.txt").read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]

    def test_what_a_kill_leaves_is_put_right(self, tmp_path: Path) -> None:
        """Killed while one was written, between the two renames, and while one was removed."""
        self.folder(tmp_path, ".b.partial", "half")
        self.folder(tmp_path, ".c.replaced", "old")
        self.folder(tmp_path, ".d.replaced", "old")
        self.folder(tmp_path, "d", "new")
        self.folder(tmp_path, ".e.removed", "half")
        self.folder(tmp_path, ".mine", "mine")
        tidy(tmp_path)
        left = {entry.name: (entry / "a.txt").read_text() for entry in tmp_path.iterdir()}
        assert left == {"c": "old", "d": "new", ".mine": "mine"}

    def test_removing_is_all_or_a_name_that_nobody_reads(self, tmp_path: Path) -> None:
        remove_folder(self.folder(tmp_path, "a", "old"))
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(UserError, match="a: cannot be removed: No such file"):
            remove_folder(tmp_path / "a")


def test_room_is_looked_for_where_the_file_will_be(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "a", 1000, "make room")
    with pytest.raises(UserError, match=r"a: cannot be written: 1\d+ bytes needed.*; make room"):
        check_room(tmp_path / "new" / "a", 10**18, "make room")


@pytest.mark.parametrize(
    "file",
    "data/shards data/cache pictures captioners/_place inspection export checkpoint "
    "runwriter runstate".split(),
)
def test_no_file_has_a_way_of_its_own(file: str) -> None:
    text = (PACKAGE / f"{file}.py").read_text()
    assert "tunekit.wholefile" in text
    assert not re.search(r"mkstemp|\.partial\b|fsync|umask\(", text)
