"""How a fuzz test feeds a reader: hypothesis chooses, the watch looks on, and time is bounded."""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from huggingface_hub.constants import HF_HOME
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import storage_directory
from targets import Target, emptied, run_once
from watch import watched

SECONDS = 5  # of processor time an input
KILOBYTES = 1_000_000  # an input, beyond what the process had
PLENTY, FEW = 150, 40  # inputs; few where each loads a model
# What `datasets`, and hypothesis while it chooses, keep for themselves.
LIBRARIES = (Path(HF_HOME), Path(storage_directory().path))
RANDOMS = st.randoms(use_true_random=False)


def thorough(inputs: int) -> Callable[[Any], Any]:
    """Return the settings of a test that is fed so many inputs, the same ones each time."""
    return settings(
        max_examples=inputs,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Range:
    """One reader under fire, in a folder of its own."""

    def __init__(self, target: Target, scratch: Path) -> None:
        self.target, self.scratch = target, scratch
        self.seeds = target.prepare(emptied(scratch / "good"))
        self.here = emptied(scratch / "here")
        with self._inside():
            run_once(target, Random(0), self.seeds, self.here)  # brings what is imported on the way

    def feed(self, rng: Random) -> None:
        """Feed one input: it is read or refused, in time, and nothing is left behind elsewhere."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with self._inside(), bounded(), watched(self.scratch.parent, *LIBRARIES) as seen:
            run_once(self.target, rng, self.seeds, self.here)
        assert not seen, seen
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Be in the input's folder, where libraries find a home of their own."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HOME", "TMPDIR", "TUNEKIT_CACHE"):
                patch.setenv(name, str(self.scratch))
            patch.setattr(tempfile, "tempdir", None)
            patch.setattr(sys, "dont_write_bytecode", True)  # of what is imported on the way
            patch.chdir(emptied(self.here))
            yield


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError where what is done meanwhile takes more than SECONDS."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    former = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


def each(targets: Sequence[Target]) -> Any:
    """Return a fixture that gives each reader in turn, with good inputs made."""

    @pytest.fixture(scope="module", params=targets, ids=lambda target: target.name)
    def under_fire(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Range:
        target: Target = request.param
        return Range(target, tmp_path_factory.mktemp("fuzz"))

    return under_fire
