"""Small runs by several processes: what tests/test_ranks.py has torchrun start, and takes alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resumed import digest
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tunekit import checkpoint, parallel
from tunekit.data.dataset import Batch
from tunekit.preparation import prepare, quietly
from tunekit.progress import Silent
from tunekit.ranks import Ranks, joined
from tunekit.recipe import Recipe, load_recipe
from tunekit.run import Request, train_as
from tunekit.train import Loop

NAN, RUN = ".nan", ".run"  # beside a recipe: a step with a number that is none; a whole run
STOP = 2


@dataclass
class Taken:
    """What a process saw and learned. gradients: those of the first step. held: numbers that train
    and that this process holds."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    stopped: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    seen: list[list[str]] = field(default_factory=list)
    held: int = 0

    def told(self) -> dict[str, Any]:
        """Return what others can be compared by."""
        return {
            "records": self.records,
            "seen": self.seen,
            "held": self.held,
            "digest": digest(self.state),
        }


def take(
    ranks: Ranks, recipe: Recipe, before: Any = None, start: int = 0, nan: bool = False
) -> Taken:
    """Take the steps from `start` on, from the state before if there is one."""
    taken = Taken()
    with quietly(), ranks.in_turn():
        ready = prepare(recipe, Silent(), ranks=ranks)
    encode = ready.family.encode_prompt if ready.adapter.trains_text_encoder else None
    loop = Loop(ready.family, ready.adapter, recipe.train, encode=encode, ranks=ranks)
    if before is not None:
        loop.load_state(before)
    batches = ready.batches(recipe.train, ranks)

    def asked(step: int, micro: int) -> list[Batch]:
        given = batches(step, micro)
        for batch in given:
            taken.seen.append([f"{step}.{micro}.{batch.prior}", *batch.names, *batch.captions])
        if nan and step == 1 and ranks.rank == ranks.count - 1:
            given[0].latents[-1] = math.nan  # the last row, whoever computes it
        return given

    with _gradients_of(loop, taken):
        for record in loop.run(asked, start):
            timed = {"images_per_second": 0.0, "seconds": 0.0, "memory_bytes": 0}
            taken.records.append(asdict(record) | timed)
            if record.step == STOP:
                taken.stopped = loop.state()
    taken.state = loop.state()
    for parameter in loop.adapter.trained().values():
        own: Any = parameter
        taken.held += (own.to_local() if loop.sharded else own).numel()
    return taken


@contextmanager
def _gradients_of(loop: Loop, taken: Taken) -> Iterator[None]:
    def note(*_: Any) -> None:
        if not taken.records and not taken.gradients:
            for name, parameter in loop.adapter.trained().items():
                if parameter.grad is not None:
                    taken.gradients[name] = parallel.whole(parameter.grad).clone()

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def main(folder: Path) -> None:
    """Take every recipe of a folder, each of them twice: in one go, and stopped on the way."""
    with joined() as own:
        for path in sorted(folder.glob("*.yaml")):
            recipe, name = load_recipe(path), path.stem
            if RUN in path.suffixes:
                train_as(own, Request(recipe, out=folder / name), Silent())
                continue
            taken = take(own, recipe, nan=NAN in path.suffixes)
            again = take(own, recipe, taken.stopped, STOP)
            told = {"one": taken.told(), "again": again.told()}
            (folder / f"{name}-{own.rank}.json").write_text(json.dumps(told))
            if own.leads:
                sets = {**taken.state, "gradients": taken.gradients}
                checkpoint.save(folder / f"{name}-state", sets, {})
                checkpoint.save(folder / f"{name}-stopped", taken.stopped, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
