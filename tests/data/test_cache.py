from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tunekit.data.cache import Cache, cache_root, content_key, fingerprint
from tunekit.errors import UserError

KEY = content_key(pixels="p", vae="v")


def entry(root: Path) -> Path:
    (path,) = root.rglob("*.safetensors")
    return path


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
def test_a_damaged_entry_is_said_and_made_again(tmp_path: Path, place: str) -> None:
    said: list[str] = []
    cache = Cache(tmp_path, said.append)
    cache.fetch("latents", KEY, lambda: {"x": torch.ones(64)})
    path = entry(tmp_path)
    data = bytearray(path.read_bytes())
    if place == "cut":
        data = data[:-100]
    elif place == "empty":
        data = bytearray()
    elif place == "swapped":  # whole, but another entry's
        other = Cache(tmp_path / "other")
        other.fetch("latents", content_key(pixels="q"), lambda: {"x": torch.zeros(64)})
        data = bytearray(entry(tmp_path / "other").read_bytes())
    else:
        data[{"first": 0, "header": 20, "middle": len(data) - 128, "last": -1}[place]] ^= 1
    path.write_bytes(data)
    made = cache.fetch("latents", KEY, lambda: {"x": torch.ones(64)})
    assert torch.equal(made["x"], torch.ones(64))
    assert len(said) == 1
    assert str(path) in said[0]
    assert "damaged" in said[0]
    cache.fetch("latents", KEY, never)


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(entry(tmp_path).stat().st_mode) == 0o640


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "latents").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="TUNEKIT_CACHE"):
        Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.ones(1)})


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "latents" / KEY[:2] / f"{KEY}.safetensors"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be read"):
        Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.ones(1)})
    cache = Cache(tmp_path)
    with pytest.raises(UserError, match=r"cannot be written \([\d,]+ bytes\)"):
        cache._write(path, KEY, {"x": torch.ones(1)})
    assert not list(tmp_path.rglob("*.part"))


def test_many_writers_of_one_entry(tmp_path: Path) -> None:
    def fetch(_: int) -> torch.Tensor:
        return Cache(tmp_path).fetch("latents", KEY, lambda: {"x": torch.arange(5000)})["x"]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fetch, range(32)))
    assert all(torch.equal(result, torch.arange(5000)) for result in results)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


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
