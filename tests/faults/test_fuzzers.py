"""The fuzzers of benchmarks/fuzz find what is there: planted faults, and one that chance misses."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from targets import Target

from tunekit.errors import UserError

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz"


@pytest.fixture
def fuzzer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return what gives a program of benchmarks/fuzz as a module, which others do not meet."""
    monkeypatch.syspath_prepend(str(FUZZ))

    def load(name: str) -> ModuleType:
        found = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    return load


def _nothing(folder: Path) -> None:
    return None


def _one_of_six(rng: Random, seeds: None, where: Path) -> int:
    return rng.randrange(6)


def _faulty(choice: int) -> object:
    if choice == 0:
        raise UserError("no good")
    if choice == 1:
        raise RuntimeError("a fault")
    if choice == 2:
        os._exit(3)
    if choice == 3:
        until = time.process_time() + 60
        while time.process_time() < until:
            pass
    if choice == 4:
        return Path("/dev/shm/tunekit-fuzzed").touch()
    return None


def test_every_kind_of_fault_is_seen_and_the_rest_goes_on(
    fuzzer: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fuzzer("run")
    monkeypatch.setattr(run, "PROCESSOR", 0.5)
    # A name by which the few inputs are one of each, and the one that only warms up is none.
    target = Target("planted 252", _nothing, _one_of_six, _faulty)
    row = run.fuzz(target, 8, 0, tmp_path, run._work)
    choices = [Random(f"0 {target.name} {number}").randrange(6) for number in range(8)]
    assert set(choices) == set(range(6)), "one of them was not planted"
    assert row["inputs"] == 8
    assert row["refused"] == choices.count(0)
    told = {fault["what"]: (fault["count"], fault["input"]) for fault in row["faults"]}
    (raised,) = [what for what in told if what.startswith("RuntimeError at test_fuzzers.py:")]
    (wrote,) = [what for what in told if what.startswith(("os.", "open "))]
    expected = {raised: 1, "died (exit code 3)": 2, "hung": 3, wrote: 4}
    assert told == {
        what: (choices.count(choice), choices.index(choice)) for what, choice in expected.items()
    }


def test_bytes_choose_and_chance_goes_on_where_they_end(
    fuzzer: Callable[[str], ModuleType],
) -> None:
    chosen = fuzzer("guided").Chosen

    def drawn(data: bytes) -> list[Any]:
        rng = chosen(data)
        return [rng.getrandbits(8), rng.random(), rng.choice("abcdef"), *rng.randbytes(20)]

    assert drawn(b"A\x80\x00") == drawn(b"A\x80\x00")
    assert drawn(b"A\x80\x00")[:2] == [0x41, 0.5]
    assert drawn(b"B\x80\x00")[1:] == drawn(b"A\x80\x00")[1:], "a byte changes its choice alone"
    assert drawn(b"A\x40\x00")[1] == 0.25
    assert len({str(drawn(bytes([first]))) for first in range(256)}) == 256


def _three_bytes(rng: Random, seeds: None, where: Path) -> list[int]:
    return [rng.getrandbits(8) for _ in range(3)]


def _hidden(values: list[int]) -> None:
    if values[0] == 0x5A:  # noqa: SIM102 - a branch each
        if values[1] == 0xA7:  # noqa: SIM102 - a branch each
            if values[2] == 0x13:
                raise RuntimeError("one of sixteen millions")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs tunekit[fuzz]")
def test_what_chance_would_not_find_is_found(
    fuzzer: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    guided = fuzzer("guided")
    held: list[Callable[[list[int]], None]] = []

    def prepare(folder: Path) -> None:
        import atheris

        held.append(atheris.instrument_func(_hidden))

    target = Target("hidden", prepare, _three_bytes, lambda values: held[0](values))
    row = guided.run.fuzz(target, 20_000, 0, tmp_path, guided.work)
    (fault,) = row["faults"]
    assert fault["what"].startswith("RuntimeError at test_fuzzers.py:")
    assert bytes.fromhex(fault["bytes"])[:3] == b"\x5a\xa7\x13"
    assert row["kept"] >= 2


def test_what_was_found_so_is_refused(tmp_path: Path) -> None:
    """A shard of the cache whose offsets are numbers with a point."""
    import json

    import torch

    from tunekit.data.shards import Block, DamagedError, read_spans, write_shard

    path = tmp_path / "a"
    write_shard(path, {"k": Block.of({"x": torch.ones(3)})})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["k/x"]["data_offsets"] = [0.0, 12.0]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(DamagedError, match="its header cannot be read"):
        read_spans(path)
