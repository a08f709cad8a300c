"""Several processes that train as one: who is who among them, and what they tell each other.

Each process computes its share of every batch, and all of them decide alike from the same numbers.
The first alone writes, draws and tells. `tunekit.launch` starts them; torchrun may do so too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.schema_train import Train

STEP_LIMIT = timedelta(minutes=30)
"""How long one waits for the others within a step."""
WAIT_LIMIT = timedelta(hours=12)
"""How long the others wait for the first: while it encodes pictures, draws or judges samples."""
LAUNCHED = "TUNEKIT_LAUNCHED"
"""Set for processes whose standard input ends with the process that started them."""
_NAMED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_HOW = "start `tunekit train --processes N`, or torchrun on this machine"


class RankLostError(UserError):
    """Another process of the run has ended, so that this one cannot go on either.

    watched: `tunekit.launch` saw that, and tells of it and of what is saved.
    """

    exit_code = 70

    def __init__(self, watched: bool) -> None:
        super().__init__("another process of this run has ended, or did not answer in time")
        self.watched = watched


@dataclass(frozen=True)
class Ranks:
    """One process among `count`; `rank` is its number, from 0. Alone it waits for nobody.

    watched: `tunekit.launch` started it, and tells of one that was lost, and of what is saved.
    """

    rank: int = 0
    count: int = 1
    _patient: Any = None  # a group whose members wait for each other as long as WAIT_LIMIT
    watched: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files, draws and tells."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return what every process says, in their order; to be asked by all. value: as JSON."""
        if self.count == 1:
            return [value]
        import torch
        from torch import distributed as dist

        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(said)]))
        longest = max(int(size) for size in sizes)
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(rows, torch.nn.functional.pad(said, (0, longest - len(said))))
        pairs = zip(rows, sizes, strict=True)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in pairs]

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            from torch import distributed as dist

            dist.barrier(group=self._patient)

    def heard(self, value: Any) -> Any:
        """Return what the first process says, however long that takes it; to be asked by all."""
        self.wait()
        return self.gather(value)[0]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first do something, then the others, who find what it left in the caches."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()
        self.wait()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turn what the libraries raise where another process is gone into RankLostError."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_lost(error):
                raise
            raise RankLostError(self.watched) from error

    def check(self, train: Train) -> None:
        """Raise UserError, a line a fault, where several processes cannot train with this."""
        faults = []
        if train.batch_size % self.count:
            faults.append(
                f"train.batch_size: {train.batch_size} pictures are not shared out evenly over "
                f"{self.count} processes (it is the batch of all of them): set a multiple of "
                f"{self.count}"
            )
        if self.count > 1 and train.fused_backward:
            faults.append(
                "train.fused_backward: takes its steps before the gradients of several processes "
                "are averaged: leave it out, or start one process"
            )
        if faults:
            raise UserError("\n".join(faults))

    def notes(self, train: Train) -> list[str]:
        """Return what is worth telling of a run by so many processes."""
        if self.count > 1:
            share = train.batch_size // self.count
            return [
                f"{self.count} processes: each computes {share} of a batch's {train.batch_size} "
                "pictures (train.batch_size is that of all)"
            ]
        if train.fsdp:
            return ["train.fsdp: this run is one process, so nothing is shared out (--processes)"]
        return []


ALONE = Ranks()


def started() -> int:
    """Return as how many processes a launcher started this run: 1 where none did."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not (told.isdecimal() and int(told) > 0):
        raise UserError(f"WORLD_SIZE: {told!r} is no number of processes: {_HOW}")
    return int(told)


@contextlib.contextmanager
def joined(wanted: int | None = None) -> Iterator[Ranks]:
    """Meet the other processes that a launcher started, and give this one's place among them.

    wanted: how many the user asked for; None: as many as there are. One on a GPU each where there
    are GPUs (nccl), else on the processor (gloo). Raises UserError where the launcher says
    something else, or the machine has fewer GPUs.
    """
    count = started()
    if count == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "LOCAL_RANK") if not os.environ.get(name, "").isdecimal()]
    if missing:
        raise UserError(f"{' and '.join(missing)}: not set beside WORLD_SIZE={count}: {_HOW}")
    if wanted not in (None, count):
        raise UserError(f"--processes: {wanted} were asked for, and {count} started (WORLD_SIZE)")
    if os.environ.get("LOCAL_WORLD_SIZE", str(count)) != str(count):
        raise UserError(f"WORLD_SIZE: {count} processes are not all on this machine: {_HOW}")
    import torch
    from torch import distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        check_devices(count)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=STEP_LIMIT)
    patient = dist.new_group(backend="gloo", timeout=WAIT_LIMIT)
    own = Ranks(dist.get_rank(), count, patient, os.environ.pop(LAUNCHED, None) is not None)
    # accelerate would start groups of its own; here it serves one process, as ever.
    for name in _NAMED:
        os.environ.pop(name, None)
    if own.watched:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    yield own
    dist.destroy_process_group()  # not after an error: the others may be gone


def check_devices(count: int) -> None:
    """Raise UserError where there are GPUs, but not one for each process."""
    import torch

    if 0 < torch.cuda.device_count() < count:
        raise UserError(
            f"--processes: {count} need as many GPUs, and this machine has "
            f"{torch.cuda.device_count()}"
        )


def _end_with_launcher() -> None:
    """Ask this process to finish its step, save and end, once the one that started it is gone."""
    while os.read(sys.stdin.fileno(), 1024):  # which nobody writes to
        continue
    os.kill(os.getpid(), signal.SIGTERM)


def _is_lost(error: RuntimeError) -> bool:
    from torch import distributed as dist

    # gloo raises plain errors, which name its own files
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
