"""Shards with several processes at once, and those that are not what they should be."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hostile import Canary

from tunekit.data import shelf
from tunekit.data.cache import Cache
from tunekit.data.shards import Block, DamagedError, read_block, read_spans, write_shard

WORKER = """
import random, sys, time
from pathlib import Path
import torch
from tunekit.data import shelf
from tunekit.data.cache import Cache

root, seed, count, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
torch.set_num_threads(1)
shelf.SHARD_BYTES = 5_000
said = []
cache = Cache(root, said.append)
order = list(range(count))
random.Random(seed).shuffle(order)
print("begins", flush=True)
with cache.using():
    kept = {}
    for i in order:
        def make(i=i):
            time.sleep(pause)
            return {"x": torch.full((100,), float(i)), "i": torch.tensor(i)}
        kept[i] = cache.keep("latents", f"{i:064}", make)
        j = random.Random(seed + i).choice(sorted(kept))
        assert kept[j].read()["i"] == j
    for i, entry in kept.items():
        assert entry.read()["x"].tolist() == [float(i)] * 100
assert not said, said
print(cache.misses)
"""


def start(root: Path, seed: int, count: int, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(root), str(seed), str(count), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    count = 120
    both = [start(tmp_path, seed, count, 0.003) for seed in (1, 2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    made = [int(out.split()[-1]) for out, _ in told]
    assert all(misses <= count for misses in made)
    assert sum(made) >= count
    reader = Cache(tmp_path)
    for i in range(count):
        assert reader.fetch("latents", f"{i:064}", dict)["i"] == i
    assert not list(tmp_path.rglob("*.part"))


def test_what_another_process_wrote_is_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.keep("latents", "first", lambda: {"x": torch.ones(1)})  # has listed the folder
    cache.flush()
    process = start(tmp_path, 1, 10, 0.0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split()[-1] == "10"
    for i in range(10):
        assert cache.keep("latents", f"{i:064}", dict).read()["i"] == i
    assert cache.hits == 10


def test_a_disk_with_a_coarse_clock_hides_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.using():
        cache.keep("latents", "first", lambda: {"x": torch.ones(1)})
    stamp = (tmp_path / "latents").stat().st_mtime_ns
    cache.keep("latents", "second", lambda: {"x": torch.ones(1)})  # lists the folder
    with Cache(tmp_path).using() as other:
        other.keep("latents", "third", lambda: {"x": torch.ones(1)})
    os.utime(tmp_path / "latents", ns=(stamp, stamp))  # as if in the same tick
    cache.keep("latents", "third", dict)
    assert (cache.hits, cache.misses) == (1, 2)


def test_a_killed_writer_leaves_only_whole_entries(tmp_path: Path) -> None:
    process = start(tmp_path, 1, 1000, 0.002)
    assert process.stdout
    assert process.stdout.readline() == "begins\n"
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("shard-*"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    said: list[str] = []
    cache = Cache(tmp_path, said.append)
    found = sum(len(read_spans(path)) for path in tmp_path.rglob("shard-*.safetensors"))
    for i in range(1000):
        made = {"x": torch.full((100,), float(i)), "i": torch.tensor(i)}
        cache.keep("latents", f"{i:064}", lambda made=made: made)  # type: ignore[misc]
    assert cache.hits == found >= 5
    assert not said


def test_workers_read_what_their_parent_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entries = [
        cache.keep("latents", f"{i:064}", lambda i=i: {"x": torch.tensor([i])})  # type: ignore[misc]
        for i in range(4)
    ]
    many = pickle.dumps(entries * 50)
    assert len(many) < 10_000, "the index must not travel with each entry"
    program = (
        "import pickle, sys; print([e.read()['x'].item() for e in pickle.load(sys.stdin.buffer)])"
    )
    spawned = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(entries), capture_output=True
    )
    assert spawned.stdout == b"[0, 1, 2, 3]\n", spawned.stderr
    cache.keep("latents", "pending", lambda: {"x": torch.ones(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads are idle here
        child = os.fork()
    if child == 0:  # a fork holds what its parent has not written, and must not write it as well
        code = 1
        try:
            cache.flush()
            code = int(cache.fetch("latents", "pending", dict)["x"].item() != 1)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.rglob("shard-*"))) == 1
    cache.flush()
    assert len(list(tmp_path.rglob("shard-*"))) == 2


def test_a_pickle_in_the_cache_is_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with Cache(tmp_path).using() as cache:
        cache.keep("latents", "a", lambda: {"x": torch.ones(1)})
    (path,) = tmp_path.rglob("shard-*")
    torch.save({"x": Canary(canary)}, path)
    said: list[str] = []
    Cache(tmp_path, said.append).keep("latents", "a", lambda: {"x": torch.ones(1)})
    assert len(said) == 1
    assert "pickle" in said[0]
    assert not canary.exists()


def shard(tmp_path: Path) -> tuple[Path, dict[str, Block]]:
    blocks = {
        key: Block.of({"x": torch.arange(n), "y": torch.ones(n, dtype=torch.float16)})
        for key, n in (("a", 5), ("b", 3))
    }
    path = tmp_path / "latents" / "shard-0.safetensors"
    return path, blocks


def test_a_shard_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, blocks = shard(tmp_path)
    written = write_shard(path, blocks)
    assert read_spans(path) == written
    for key, block in blocks.items():
        assert read_block(path, key, written[key]) == block
    with pytest.raises(DamagedError, match="digest"):
        read_block(path, "a", written["b"])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].pop("format"),
        lambda header: header["__metadata__"].update(format="another"),
        lambda header: header["__metadata__"].pop("a"),
        lambda header: header["__metadata__"].update(c="00"),
        lambda header: header["__metadata__"].update(a="no digest"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["a/x"].update(data_offsets=[0, 10**9]),
        lambda header: header["a/x"].update(data_offsets=[-9, 8]),
        lambda header: header["a/x"].update(data_offsets="here"),
        lambda header: header["a/x"].pop("data_offsets"),
        lambda header: header.update({"b/y": 3}),
    ],
)
def test_a_header_that_lies(tmp_path: Path, change: object) -> None:
    path, blocks = shard(tmp_path)
    write_shard(path, blocks)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(DamagedError):
        read_spans(path)


def test_a_damaged_shard_that_cannot_be_removed_is_told_once_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "remove", lambda path: None)
    path, blocks = shard(tmp_path)
    written = write_shard(path, blocks)
    data = bytearray(path.read_bytes())
    data[written["a"].start] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    cache = Cache(tmp_path, said.append)
    cache.keep("latents", "a", lambda: {"x": torch.ones(1)})
    cache.flush()
    cache.keep("latents", "b", dict)
    cache.keep("latents", "a", dict)
    assert (cache.hits, cache.misses, len(said)) == (2, 1, 1)
