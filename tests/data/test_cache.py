from __future__ import annotations

import os
import pickle
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunekit.data import shelf
from tunekit.data.cache import Cache, Entry, cache_root, content_key, fingerprint
from tunekit.errors import UserError

KEY = content_key(pixels="p", vae="v")


def entry(root: Path) -> Path:
    (path,) = root.rglob("*.safetensors")
    return path


def numbers(i: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(100, dtype=torch.float32) + 1000 * i}


def keep(cache: Cache, kind: str, key: str, tensors: dict[str, torch.Tensor]) -> Entry:
    return cache.keep(kind, key, lambda: tensors)


def flip(path: Path, values: torch.Tensor) -> None:
    """Change a byte of a tensor in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(values.numpy().tobytes()) + 50] ^= 1
    path.write_bytes(data)


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("made again")


def test_an_entry_is_made_once_and_comes_back_equal(tmp_path: Path) -> None:
    made = {
        "half": torch.randn(4, 3).to(torch.bfloat16),
        "turned": torch.randn(3, 5).t(),
        "ids": torch.arange(7),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
    }
    cache = Cache(tmp_path)
    first = cache.fetch("latents", KEY, lambda: made)
    cache.flush()
    found = Cache(tmp_path).fetch("latents", KEY, never)
    for name, tensor in made.items():
        for got in (first[name], found[name]):
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)
    assert (cache.hits, cache.misses) == (0, 1)
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_returned_is_the_callers_own(tmp_path: Path) -> None:
    made = torch.zeros(3)
    Cache(tmp_path).fetch("latents", KEY, lambda: {"x": made})["x"].add_(1)
    assert made.sum() == 0
    Cache(tmp_path).fetch("latents", KEY, never)["x"].add_(1)
    assert Cache(tmp_path).fetch("latents", KEY, never)["x"].sum() == 0


@pytest.mark.parametrize("place", ["first", "header", "middle", "last", "cut", "empty", "swapped"])
def test_a_damaged_entry_is_said_once_and_made_again(tmp_path: Path, place: str) -> None:
    Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.ones(64)})
    path = entry(tmp_path)
    data = bytearray(path.read_bytes())
    if place == "cut":
        data = data[:-100]
    elif place == "empty":
        data = bytearray()
    elif place == "swapped":  # one entry's values under another's name
        Cache(tmp_path / "other").fetch("latents", KEY, lambda: {"x": torch.zeros(64)})
        data[-256:] = entry(tmp_path / "other").read_bytes()[-256:]
    else:
        data[{"first": 0, "header": 20, "middle": len(data) - 128, "last": -1}[place]] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    made = Cache(tmp_path, said.append).fetch("latents", KEY, lambda: {"x": torch.ones(64)})
    assert torch.equal(made["x"], torch.ones(64))
    assert len(said) == 1
    assert str(path) in said[0]
    assert "damaged" in said[0]
    Cache(tmp_path, said.append).keep("latents", KEY, never)
    assert len(said) == 1


def test_damage_to_one_entry_leaves_its_neighbours(tmp_path: Path) -> None:
    with Cache(tmp_path).using() as cache:
        entries = [keep(cache, "latents", f"{i:064}", numbers(i)) for i in range(20)]
    flip(entry(tmp_path), numbers(7)["x"])
    reader = Cache(tmp_path)
    kept = [reader.keep("latents", f"{i:064}", never) for i in (3, 12)]
    said: list[str] = []
    mender = Cache(tmp_path, said.append)
    mender.keep("latents", f"{7:064}", lambda: numbers(7))
    assert (mender.misses, len(said)) == (1, 1)
    for i in range(20):
        mender.keep("latents", f"{i:064}", never)
    assert len(said) == 1
    # Those who were reading from the mended shard go on.
    assert torch.equal(kept[0].read()["x"], numbers(3)["x"])
    assert torch.equal(kept[1].read()["x"], numbers(12)["x"])
    del mender
    assert torch.equal(entries[7].read()["x"], numbers(7)["x"])


def test_kept_entries_are_read_when_asked(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entries = [keep(cache, "masks", f"{i:064}", numbers(i)) for i in range(5)]
    assert not list(tmp_path.rglob("*.safetensors"))  # gathered
    assert torch.equal(entries[3].read()["x"], numbers(3)["x"])
    with pytest.raises(AssertionError, match="made again"):
        cache.keep("masks", "other", never)
    cache.flush()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    for i in (4, 0, 2, 2):
        assert torch.equal(entries[i].read()["x"], numbers(i)["x"])
    entries[2].read()["x"].add_(1)
    assert torch.equal(entries[2].read()["x"], numbers(2)["x"])
    assert (cache.hits, cache.misses) == (0, 5)
    assert torch.equal(pickle.loads(pickle.dumps(entries[1])).read()["x"], numbers(1)["x"])


def test_an_entry_that_vanished_or_broke_is_an_error_that_names_it(tmp_path: Path) -> None:
    with Cache(tmp_path).using() as cache:
        kept = cache.keep("latents", KEY, lambda: numbers(1))
    path = entry(tmp_path)
    flip(path, numbers(1)["x"])
    with pytest.raises(UserError, match=f"{KEY} is damaged") as broken:
        kept.read()
    assert str(path) in str(broken.value)
    path.unlink()
    with pytest.raises(UserError, match=f"{KEY} has vanished"):
        kept.read()


def test_any_reader_of_safetensors_reads_a_shard(tmp_path: Path) -> None:
    with Cache(tmp_path).using() as cache:
        for i in range(3):
            odd = {"x": torch.ones(i + 1, dtype=torch.uint8), "empty": torch.zeros(0, 2)}
            keep(cache, "latents", f"{i:064}", odd | {"a/b": torch.ones(2) * i})
    tensors = load_file(entry(tmp_path))
    assert len(tensors) == 9
    assert torch.equal(tensors[f"{2:064}/a/b"], torch.ones(2) * 2)
    assert set(Cache(tmp_path).fetch("latents", f"{1:064}", never)) == {"x", "empty", "a/b"}


def test_shards_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SHARD_BYTES", 1000)
    cache = Cache(tmp_path)
    for i in range(10):
        keep(cache, "latents", f"{i:064}", numbers(i))  # 400 bytes each
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    monkeypatch.setattr(shelf, "SHARD_SECONDS", 0.0)
    cache.keep("latents", "slow", lambda: numbers(0))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    monkeypatch.undo()
    monkeypatch.setattr(shelf, "SHARD_ENTRIES", 3)
    for i in range(7):
        keep(cache, "conditioning", f"{i:064}", numbers(i))
    assert len(list((tmp_path / "conditioning").iterdir())) == 2


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(entry(tmp_path).stat().st_mode) == 0o640


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.fetch("latents", KEY, lambda: {"x": torch.ones(5000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \([\d,]+ bytes\).*TUNEKIT_CACHE"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_cannot_be_written_at_the_end_is_said(tmp_path: Path) -> None:
    (tmp_path / "latents").write_text("a file where a folder should be")
    said: list[str] = []
    cache = Cache(tmp_path, said.append)
    with pytest.raises(UserError, match="TUNEKIT_CACHE"):
        cache.fetch("latents", KEY, lambda: {"x": torch.ones(1)})
    cache.fetch("masks", KEY, lambda: {"x": torch.ones(1)})
    (tmp_path / "masks").write_text("in the way")
    del cache
    assert len(said) == 1
    assert "cannot be written" in said[0]


def test_many_writers_of_one_entry(tmp_path: Path) -> None:
    def fetch(_: int) -> torch.Tensor:
        return Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.arange(5000)})["x"]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fetch, range(32)))
    assert all(torch.equal(result, torch.arange(5000)) for result in results)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}
    assert len(files) <= 8  # those who met made it twice


def test_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path))
    assert Cache().root == cache_root() == tmp_path
    monkeypatch.delenv("TUNEKIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "tunekit"


def test_keys_and_fingerprints_tell_everything_apart() -> None:
    assert content_key(a="1", b=2) == content_key(b=2, a="1")
    assert len({content_key(a="1"), content_key(a=1), content_key(b="1"), content_key()}) == 4
    weights = {"w": torch.ones(2, 3), "b": torch.zeros(3)}
    base = fingerprint(weights)
    assert base == fingerprint(dict(reversed(weights.items())))
    assert base == fingerprint({"w": torch.ones(3, 2).t(), "b": torch.zeros(3)})
    others = [
        fingerprint({**weights, "w": torch.ones(3, 2)}),
        fingerprint({**weights, "b": torch.tensor([0, 0, 1e-30])}),
        fingerprint({**weights, "b": torch.zeros(3, dtype=torch.float16)}),
        fingerprint({"v": torch.ones(2, 3), "b": torch.zeros(3)}),
        fingerprint(weights, "scaling 0.5"),
        fingerprint(weights, "scaling", "0.5"),
    ]
    assert len({base, *others}) == 7
