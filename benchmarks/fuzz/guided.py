"""Feed the readers inputs that are led by what the code does with them: atheris, over libFuzzer.

    pip install 'tunekit[fuzz]'
    python benchmarks/fuzz/guided.py --reader "recipe text" --inputs 10000

The readers, the ways to spoil, the watch and what counts as a fault are those of run.py. There a
generator of random numbers chooses what is spoilt, and how; here the fuzzer's bytes do (`Chosen`),
and what led the code somewhere new is kept and changed further. `kept` of a row says how many
inputs did. Branches of the packages in LED are what is looked at. Writes
benchmarks/results/fuzz_guided.json; a fault in it has its bytes, which Chosen takes again.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import run

RESULT = run.ROOT / "benchmarks" / "results" / "fuzz_guided.json"
LED = ["tunekit", "ruamel", "PIL", "tarfile", "csv", "json"]
_LONGEST = 2048  # bytes of an input, at most; what is drawn beyond them is chance
_FIRST = 16  # inputs to begin with, by chance


class Chosen(Random):
    """Draws from bytes as long as there are any, then by chance: the same for the same bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, count: int) -> int:
        """Return a number of so many bits; of more than 64, which are contents, by chance."""
        size = (count + 7) // 8
        if count > 64 or self._at + size > len(self._data):
            return super().getrandbits(count)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "big") >> (8 * size - count)

    def random(self) -> float:
        """Return a number from 0 to 1, of two bytes."""
        return self.getrandbits(16) / 2**16


def work(target: Any, start: int, end: int, seed: int, scratch: Path, answers: Connection) -> None:
    """Feed `end` - `start` inputs of the fuzzer's choice, in a process of their own."""
    import atheris

    with atheris.instrument_imports(include=LED):
        feed = run.prepared(target, seed, scratch)
    corpus = scratch / "corpus" / target.name.replace(" ", "-")
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number in range(_FIRST):
            data = Random(f"{seed} {target.name} {number}").randbytes(256)
            (corpus / str(number)).write_bytes(data)
    left = end - start

    def one(data: bytes) -> None:
        nonlocal left
        (scratch / run.LAST).write_bytes(data)
        kept = len(os.listdir(corpus)) - _FIRST
        answers.send(feed(Chosen(data)) | {"kept": kept, "data": data.hex()})
        left -= 1
        if not left:
            os._exit(0)

    # What is too slow or too large is seen by run.py, which counts the time of this process alone.
    limits = [f"-max_len={_LONGEST}", "-rss_limit_mb=0", "-timeout=86400"]
    atheris.Setup(["guided", f"-seed={seed + start + 1}", *limits, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed: pip install 'tunekit[fuzz]'")
    sys.exit(run.main(__doc__, RESULT, work))
