"""`tunekit train --processes N`: starts the processes of a run on this machine and watches them.

Each is `tunekit train` again, told its number as torchrun would tell it. They meet at a socket that
this machine alone can reach. Where one of them ends badly, the others may save what they have, and
end; a signal is handed on to all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tunekit import checkpoint
from tunekit.errors import UserError
from tunekit.interrupts import SIGNALS
from tunekit.ranks import LAUNCHED, RankLostError, Ranks, check_devices
from tunekit.runfolder import CHECKPOINTS

GRACE = 20.0
"""Seconds that the others have to save and end, once one of the processes has failed."""
_LOOK = 0.1  # seconds between two looks at them
_SHOWN = 20_000  # characters of what a process said, from the end


class _Worker:
    """One process. Only the first one's output is seen; what others say is kept, for a failure."""

    def __init__(self, rank: int, command: Sequence[str], shared: Mapping[str, str]) -> None:
        self.rank = rank
        self.stopped = False  # by this module, after the others
        self._said: IO[bytes] | None = tempfile.TemporaryFile() if rank else None  # noqa: SIM115
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,  # which ends with this process
            stdout=subprocess.DEVNULL if rank else None,
            stderr=self._said,
            start_new_session=True,  # so that Ctrl-C comes once, from here
        )

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal's; None while it lives."""
        return self.process.poll()

    @property
    def to_blame(self) -> bool:
        """Whether it failed, and not because another one did."""
        return not self.stopped and self.code not in (None, 0, RankLostError.exit_code)

    def kill(self) -> None:
        """End it at once."""
        if self.code is None:
            self.stopped = True
            self.process.kill()

    def close(self) -> None:
        """Let go of what leads to it."""
        for end in (self.process.stdin, self._said):
            if end is not None:
                end.close()

    def said(self) -> str:
        """Return what it said of its end; the first one's was seen already."""
        if self._said is None:
            return ""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-_SHOWN:].strip()


def train(
    recipe: Path,
    overrides: Sequence[str],
    options: Mapping[str, object],
    flags: Mapping[str, bool],
) -> int:
    """Train a recipe with as many processes as `--processes` of `options` says; see `start`.

    options, flags: those of `tunekit train` by their names. Raises UserError, before anything is
    started, for a recipe that so many cannot train, or too few GPUs.
    """
    from tunekit.recipe import load_recipe
    from tunekit.run import RUNS

    count = int(str(options["--processes"]))
    resolved = load_recipe(recipe, overrides)
    Ranks(0, count).check(resolved.train)
    check_devices(count)
    arguments = ["train", str(recipe), *overrides]
    for name, value in options.items():
        arguments += [name, str(value)] if value is not None else []
    arguments += [name for name, on in flags.items() if on]
    out = options["--out"]
    return start(count, arguments, Path(str(out)) if out is not None else RUNS / resolved.name)


def start(count: int, arguments: Sequence[str], folder: Path) -> int:
    """Train with `count` processes, and return the exit code of the run.

    arguments: of `tunekit`, for each of them. folder: the run's, to tell what was saved. Raises
    UserError where a process was killed, or failed before the first could tell why.
    """
    command = [sys.executable, "-P", "-m", "tunekit", *arguments]
    workers: list[_Worker] = []
    with socket.socket() as door, _handing_on(workers):
        door.bind(("127.0.0.1", 0))
        door.listen()
        shared = _environment(count, door.getsockname()[1])
        try:
            workers += [_Worker(rank, command, shared) for rank in range(count)]
            store = _meeting_point(door)
            _watch(workers)
            del store
            return _outcome(workers, folder)
        finally:
            for worker in workers:
                worker.kill()
                worker.process.wait()
                worker.close()


def _environment(count: int, port: int) -> dict[str, str]:
    """Return what every process is told: where to meet, and to share the processor."""
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the meeting point is here, not at the first
        LAUNCHED: "1",
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    usual = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // count)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # remarks on how gradients are gathered
    }
    loops = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loops:
        usual["GLOO_SOCKET_IFNAME"] = loops[0]
    return {**shared, **{name: value for name, value in usual.items() if name not in os.environ}}


def _meeting_point(door: socket.socket) -> Any:
    """Return the store at which the processes find each other, behind a socket that listens."""
    from torch import distributed

    dist: Any = distributed
    address, port = door.getsockname()
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach()
    )


@contextlib.contextmanager
def _handing_on(workers: Sequence[_Worker]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to the processes, which finish their step and save."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.code is None:
                worker.process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[_Worker]) -> None:
    """Wait for the end of all; once one has failed, at most GRACE longer."""
    until: float | None = None
    while any(worker.code is None for worker in workers):
        if until is None and any(worker.code for worker in workers):
            until = time.monotonic() + GRACE
        if until is not None and time.monotonic() > until:
            for worker in workers:
                worker.kill()
        time.sleep(_LOOK)


def _outcome(workers: Sequence[_Worker], folder: Path) -> int:
    """Return the exit code; raise UserError where the first process could not tell why."""
    first = workers[0]
    code = first.process.returncode
    if code == 0 or (code > 0 and code != RankLostError.exit_code):
        return code  # it has told itself
    worker = next((worker for worker in workers if worker.to_blame), first)
    which = f"process {worker.rank} of {len(workers)} (pid {worker.process.pid})"
    if not worker.to_blame and code > 0:
        how = (
            f"the {len(workers)} processes did not answer each other in time, and the run has ended"
        )
    elif worker.process.returncode < 0:
        name = signal.Signals(-worker.process.returncode).name
        how = f"{which} was killed by {name}, and the run has ended with it"
    else:
        how = f"{worker.said()}\n{which} ended so, and the run with it".strip()
    saved = checkpoint.steps(folder / CHECKPOINTS)
    left = f"{saved[-1].name} is saved" if saved else "nothing was saved yet"
    raise UserError(f"{how}; {left}{': --resume goes on from there' if saved else ''}")
