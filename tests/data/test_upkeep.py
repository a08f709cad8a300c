"""What the cache holds, and how it is kept small: never while anybody uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tunekit.data import shelf, upkeep
from tunekit.data.cache import Cache
from tunekit.errors import UserError

DAY = 86_400


@pytest.fixture(autouse=True)
def _usual_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNEKIT_CACHE_MAX", raising=False)


def put(root: Path, kind: str, names: str, days: float) -> Path:
    """Write a shard with an entry of 4 kB a letter, last used some days ago."""
    with Cache(root).using() as cache:
        for name in names:
            cache.keep(kind, name * 64, lambda: {"x": torch.zeros(1000)})
    made = max((root / kind).glob("shard-*"), key=lambda path: path.stat().st_mtime)
    return used(made, days)


def used(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def shards(root: Path) -> set[Path]:
    return set(root.rglob("shard-*"))


@contextmanager
def another_user(root: Path) -> Iterator[None]:
    """Hold the cache in another process."""
    program = (
        "import sys; from pathlib import Path; from tunekit.data.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).using(): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"in\n"
        try:
            yield
        finally:
            process.stdin.close()


def test_usage_counts_by_kind(tmp_path: Path) -> None:
    put(tmp_path, "latents", "ab", 3)
    put(tmp_path, "latents", "c", 1)
    put(tmp_path, "conditioning", "d", 2)
    Cache(tmp_path).keep_file("pictures", "e" * 64, ".jpg", lambda: b"12345")
    held = {usage.kind: usage for usage in Cache(tmp_path).usage()}
    assert list(held) == ["conditioning", "latents", "pictures"]
    latents = held["latents"]
    assert (latents.files, latents.entries) == (2, 3)
    assert latents.bytes == sum(path.stat().st_size for path in (tmp_path / "latents").iterdir())
    assert abs(time.time() - DAY - latents.last_used) < 60
    assert (held["pictures"].entries, held["pictures"].bytes) == (1, 5)
    told = upkeep.lines(tmp_path, list(held.values()))
    assert any(line.startswith("latents: 3 entries in 2 files, 1") for line in told)
    assert "of 20 GB" in told[-1]
    assert str(tmp_path) in told[-1]
    facts = json.loads(json.dumps(upkeep.as_dict(tmp_path, list(held.values()))))
    assert facts["bytes"] == sum(kind["bytes"] for kind in facts["kinds"])
    assert (facts["max_bytes"], facts["kinds"][1]["entries"]) == (20_000_000_000, 3)
    assert Cache(tmp_path / "none").usage() == []


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    oldest, middle, newest = (
        put(tmp_path, kind, "a", days) for kind, days in [("b", 9), ("a", 5), ("c", 1)]
    )
    size = newest.stat().st_size
    pruned = Cache(tmp_path).prune(max_bytes=2 * size + 100)
    assert shards(tmp_path) == {middle, newest}
    assert (pruned.files, pruned.bytes, pruned.left_files) == ({"b": 1}, size, 2)
    assert not oldest.exists()
    Cache(tmp_path).prune(older_than_seconds=3 * DAY)
    assert shards(tmp_path) == {newest}
    assert "nothing to remove, 1 file of" in str(Cache(tmp_path).prune(max_bytes=size))
    told = str(Cache(tmp_path).prune(max_bytes=0))
    assert "removed 4.3 kB of c (1 file); 0 files of 0 bytes left" in told
    assert shards(tmp_path) == set()
    empty = str(Cache(tmp_path / "none").prune())
    assert empty.endswith("nothing to remove, 0 files of 0 bytes left")
    assert not (tmp_path / "none").exists()


def test_reading_counts_as_use(tmp_path: Path) -> None:
    put(tmp_path, "latents", "b", 5)
    read = put(tmp_path, "latents", "a", 9)
    picture = Cache(tmp_path).keep_file("pictures", "e" * 64, ".jpg", lambda: b"12345")
    used(picture, 9)
    Cache(tmp_path).keep("latents", "a" * 64, dict)
    assert Cache(tmp_path).keep_file("pictures", "e" * 64, ".jpg", bytes) == picture
    Cache(tmp_path).prune(older_than_seconds=3 * DAY)
    assert shards(tmp_path) == {read}
    assert picture.read_bytes() == b"12345"


def test_what_is_removed_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.keep("latents", "a" * 64, lambda: {"x": torch.ones(3)})
    cache.prune(max_bytes=0)
    assert cache.fetch("latents", "a" * 64, lambda: {"x": torch.zeros(3)})["x"].sum() == 0
    assert cache.misses == 2


def test_only_its_own_files_are_touched(tmp_path: Path) -> None:
    mine = [
        put(tmp_path, "latents", "a", 0),
        tmp_path / "pictures" / "ab" / f"ab{'0' * 62}.png",
        tmp_path / "latents" / "cd" / f"cd{'0' * 62}.safetensors",
        used_part(tmp_path / "latents" / ".shard-x.part"),
    ]
    others = [
        tmp_path / "thesis.txt",
        tmp_path / "photos" / "summer.jpg",
        tmp_path / "photos" / "ab" / "summer.jpg",
        tmp_path / "photos" / "ab" / f"cd{'0' * 62}.png",
        tmp_path / ".ssh" / "ab" / f"ab{'0' * 62}.png",
        tmp_path / "deep" / "pictures" / "ab" / f"ab{'0' * 62}.png",
        tmp_path / "model.safetensors",
        tmp_path / "latents" / "model.safetensors",
        tmp_path / "latents" / "new.part",
    ]
    for path in (mine[1], mine[2], *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    put(elsewhere, "latents", "a", 0)
    (tmp_path / "linked").symlink_to(elsewhere / "latents")
    drawn = Cache(elsewhere).keep_file("pictures", "ef" * 32, ".png", lambda: b"1")
    (tmp_path / "pictures" / "ef").symlink_to(drawn.parent)
    kinds = [usage.kind for usage in Cache(tmp_path).usage()]
    assert kinds == ["latents", "latents (old format)", "pictures", "unfinished"]
    Cache(tmp_path).prune(max_bytes=0)
    assert not [path for path in mine if path.exists()]
    assert all(path.exists() for path in others)
    assert shards(elsewhere)
    assert drawn.exists()


def used_part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    return used(path, 1)


def test_useless_files_go_first_whatever_is_asked(tmp_path: Path) -> None:
    kept = put(tmp_path, "latents", "a", 100)
    old = tmp_path / "latents" / "cd" / f"cd{'0' * 62}.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"1")
    left = used_part(tmp_path / "latents" / ".shard-x.part")
    being_written = tmp_path / "latents" / ".shard-y.part"
    being_written.write_bytes(b"half")
    pruned = Cache(tmp_path).prune()
    json.dumps(pruned.as_dict())
    assert pruned.files == {"latents (old format)": 1, "unfinished": 1}
    assert kept.exists()
    assert being_written.exists()
    assert not old.exists()
    assert not left.exists()
    assert Cache(tmp_path).prune(max_bytes=0).left_files == 1, "somebody may be writing it"
    assert being_written.exists()


def test_nothing_goes_while_another_process_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "latents", "a", 9)
    said: list[str] = []
    with another_user(tmp_path):
        with pytest.raises(UserError, match="in use by a run; nothing was removed"):
            Cache(tmp_path).prune(max_bytes=0)
        monkeypatch.setenv("TUNEKIT_CACHE_MAX", "1kB")
        with Cache(tmp_path, said.append).using() as cache:  # two may use it at once
            cache.keep("latents", "a" * 64, dict)
        assert len(said) == 1
        assert "left so while another run uses it" in said[0]
    assert Cache(tmp_path).prune(max_bytes=0).left_files == 0


def test_a_killed_user_holds_nobody_back(tmp_path: Path) -> None:
    put(tmp_path, "latents", "a", 9)
    program = (
        "import os, sys; from pathlib import Path; from tunekit.data.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).using(): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert Cache(tmp_path).prune(max_bytes=0).left_files == 0


def test_a_run_bounds_the_cache_when_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest, newer = put(tmp_path, "latents", "a", 9), put(tmp_path, "latents", "b", 1)
    said: list[str] = []
    monkeypatch.setenv("TUNEKIT_CACHE_MAX", "5 kB")
    cache = Cache(tmp_path, said.append)
    with cache.using(), cache.using():
        assert shards(tmp_path) == {newer}
        cache.keep("latents", "b" * 64, dict)
        kept = cache.keep("latents", "a" * 64, lambda: {"x": torch.zeros(1000)})
        with pytest.raises(UserError, match="in use"):
            Cache(tmp_path).prune()
    assert not oldest.exists()
    assert len(said) == 1
    assert "may hold 5 kB" in said[0]
    assert "removed 4.3 kB of latents (1 file); 1 file of 4.3 kB left" in said[0]
    assert kept.read()["x"].shape == (1000,)
    monkeypatch.setenv("TUNEKIT_CACHE_MAX", "plenty")
    with pytest.raises(UserError, match='TUNEKIT_CACHE_MAX: "plenty" is no size'), cache.using():
        pass


def test_entries_of_a_cleared_cache_are_made_again_by_the_next_user(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.using():
        cache.keep("latents", "a" * 64, lambda: {"x": torch.ones(3)})
    Cache(tmp_path).prune(max_bytes=0)  # as another process would
    with cache.using():
        assert cache.keep("latents", "a" * 64, lambda: {"x": torch.ones(3)}).read()["x"].sum() == 3
    assert cache.misses == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10_000_000_000),
        ("1.5 mb", 1_500_000),
        ("2GiB", 2 * 1024**3),
        ("512K", 512_000),
        ("0", 0),
        ("70", 70),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert upkeep.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "10 gigs", "1,5GB"])
def test_wrong_sizes_and_ages(text: str) -> None:
    with pytest.raises(UserError, match="is no size: write"):
        upkeep.parse_size(text)
    with pytest.raises(UserError, match="is no age: write"):
        upkeep.parse_age(text)


def test_the_options_of_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upkeep.wanted("10GB", None, False) == (10**10, None)
    assert upkeep.wanted(None, "1d", False) == (None, DAY)
    assert upkeep.wanted("0", "1d", False) == (0, DAY)
    assert upkeep.wanted(None, None, True) == (0, None)
    monkeypatch.setenv("TUNEKIT_CACHE_MAX", "7GB")
    assert upkeep.wanted(None, None, False) == (7 * 10**9, None)
    for options, told in [
        (("much", None, False), '--max-size: "much" is no size'),
        ((None, "long", False), '--older-than: "long" is no age'),
        (("1GB", None, True), "leave out --max-size"),
    ]:
        with pytest.raises(UserError, match=told):
            upkeep.wanted(*options)


def test_ages() -> None:
    told = [upkeep.parse_age(text) for text in ("30d", "12 h", "1.5W", "90s", "2m")]
    assert told == [30 * DAY, 12 * 3600, 10.5 * DAY, 90, 120]
    assert upkeep.size_text(1) == "1 byte"
    assert upkeep.size_text(20 * 10**9) == "20 GB"


def test_a_folder_without_rights(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set TUNEKIT_CACHE to"), Cache(tmp_path / "file").using():
        pass


def test_a_kept_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> bytes:
        raise UserError("cannot be drawn")

    cache = Cache(tmp_path)
    with pytest.raises(UserError, match="cannot be drawn"):
        cache.keep_file("prior", "a" * 64, ".png", fails)
    (tmp_path / "prior").write_text("in the way")
    with pytest.raises(UserError, match="the cache cannot be"):
        cache.keep_file("prior", "a" * 64, ".png", lambda: b"x")
    assert shelf.SHARD_BYTES == 8_000_000
    assert (cache.hits, cache.misses) == (0, 0)
