"""What a step of training is held to: finite numbers, no sudden spike, and that anything moves.

A guard looks before the optimizer's step is taken, and answers as the recipe says: the run stops,
or the step is not taken, or it is only told. What is remembered is part of a checkpoint, so a run
that goes on answers as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from tunekit.errors import UserError, some
from tunekit.parallel import whole
from tunekit.spikes import Spikes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.schema import Train

PATIENCE = 20
"""Steps after which a run is stopped in which nothing that trains has moved."""
_SAMPLED = 4096  # numbers of each tensor that are looked at, at least
_LONGEST = 80  # characters of a caption


class TrainingError(UserError):
    """Training cannot go on; the message names the step, what went wrong, and the pictures."""

    def __init__(self, message: str, *, step: int, names: Sequence[str]) -> None:
        super().__init__(message)
        self.step = step
        self.names = tuple(names)


class Seen(NamedTuple):
    """A picture in a step: its file, the caption it was trained with, and its timestep."""

    name: str
    caption: str
    timestep: int

    def __str__(self) -> str:
        words = " ".join(self.caption.split())
        words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."
        return f'{self.name} (timestep {self.timestep}, "{words}")'


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step, with which pictures, and what the recipe says to do about it."""

    what: str
    seen: Sequence[Seen]
    policy: str
    spike: float | None = None

    def __str__(self) -> str:
        return f"{self.what} with {some(self.seen, 8)}"


class Guards:
    """The guards of one run. trained: the parameters, live; timesteps: how many there are.

    `skips`: steps not taken so far.
    """

    def __init__(self, settings: Train, trained: Mapping[str, nn.Parameter], timesteps: int):
        self._settings = settings
        self.spikes = Spikes(timesteps)
        self.pulse = Pulse(trained)
        self.skips = 0
        self._spiking = False
        self._last: tuple[Sequence[float], Sequence[int], float | None] | None = None

    def losses(self, losses: Sequence[float], seen: Sequence[Seen]) -> Fault | None:
        """Return what is wrong with the losses of these pictures, naming those at fault."""
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad:
            return None
        what = f"the loss is {losses[bad[0]]}"
        return Fault(what, [seen[i] for i in bad], self._settings.on_nonfinite)

    def gradient(self, norm: float, seen: Sequence[Seen]) -> Fault | None:
        """Return what is wrong with a gradient of this norm."""
        if math.isfinite(norm):
            return None
        return Fault(f"the gradient's norm is {norm}", seen, self._settings.on_nonfinite)

    def spike(self, losses: Sequence[float], seen: Sequence[Seen]) -> Fault | None:
        """Return whether these finite losses are a spike."""
        timesteps = [one.timestep for one in seen]
        excess = self.spikes.excess(losses, timesteps)
        fault = None
        if self.spikes.is_spike(excess):
            assert excess is not None
            factor = math.exp(excess)
            what = f"the loss is {factor:.1f} times what it usually is at these timesteps"
            fault = Fault(what, seen, self._settings.on_spike, factor)
        self._last = losses, timesteps, excess
        return fault

    def decide(self, fault: Fault | None, step: int) -> tuple[bool, str | None]:
        """Return whether the step is taken, and what there is to tell of it.

        step: from 0. Raises TrainingError where the recipe says to stop.
        """
        where = f"step {step + 1} of {self._settings.steps}"
        policy, most = fault.policy if fault else "warn", self._settings.max_skips
        if fault and (policy == "stop" or (policy == "skip" and self.skips >= most)):
            self._last = None
            raise self._stop(fault, where, step)
        if self._last is not None:
            self.spikes.take(*self._last)
            self._last = None
        again, self._spiking = self._spiking, fault is not None and fault.spike is not None
        if fault is None:
            return True, None
        if policy == "warn":  # of several in a row the first is told
            return True, None if again else f"{where}: {fault}; it was taken all the same"
        self.skips += 1
        return False, f"{where}: {fault}; it was not taken (skip {self.skips} of {most})"

    def _stop(self, fault: Fault, where: str, step: int) -> TrainingError:
        settings = self._settings
        advice = f"lower train.learning_rate (it is {settings.learning_rate:g})"
        if settings.precision == "fp16":
            advice += ", or set train.precision: bf16 or fp32"
        key = "on_spike" if fault.spike is not None else "on_nonfinite"
        intact = "before the step was taken, what was learned before is intact"
        if settings.fused_backward:
            intact = "within the step (fused_backward), what the last checkpoint holds is intact"
        elif fault.policy == "stop":
            advice += f", or set train.{key}: skip"
        else:
            advice += f", or raise train.max_skips: {self.skips} steps were skipped before"
        return TrainingError(
            f"{where}: {fault}; stopped {intact}: {advice}",
            step=step + 1,
            names=[one.name for one in fault.seen],
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what is remembered."""
        usual = self.spikes.state().items()
        counts = [self.skips, int(self._spiking), *self.pulse.state()]
        return {
            **{name: torch.tensor(values, dtype=torch.float64) for name, values in usual},
            "counts": torch.tensor(counts),
        }

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_tensors` returned. Raises UserError where it is none of that."""
        own = self.state_tensors()
        lists = all(values.ndim == 1 for values in state.values())
        if own.keys() != state.keys() or not lists or state["counts"].shape != own["counts"].shape:
            raise UserError("the saved state of the guards is missing, or not what is kept now")
        self.spikes.load_state({name: values.tolist() for name, values in state.items()})
        self.skips, spiking, *pulse = state["counts"].tolist()
        self._spiking = bool(spiking)
        self.pulse.load_state(pulse)


class Pulse:
    """Whether what trains moves at all: watched until it has moved once."""

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self.moved = False
        self._trained = trained
        self._before: list[Tensor] = []
        self._still = 0
        self._felt = False  # a gradient other than 0

    def begin(self, step: int, steps: int, rate: float) -> None:
        """Look at what trains before a step (0 is the first).

        rate: the largest learning rate in it. Raises TrainingError where PATIENCE steps were taken
        and nothing has moved.
        """
        if not self.moved and not self._before:
            self._before = [part.clone() for part in self._parts()]
        if self.moved or self._still < PATIENCE:
            return
        if not self._felt:
            why = "the gradient is exactly 0, so the loss does not depend on what trains"
        elif rate == 0:
            why = "the learning rate is 0"
        else:
            why = f"a learning rate of {rate:g} is too small to change the numbers"
        raise TrainingError(
            f"step {step + 1} of {steps}: nothing that trains has moved in {self._still} steps: "
            f"{why}",
            step=step + 1,
            names=(),
        )

    def end(self, norm: float) -> None:
        """Look again after a step that was taken, with this norm of the gradient."""
        if self.moved:
            return
        parts = zip(self._before, self._parts(), strict=True)
        self.moved = any(not torch.equal(before, now) for before, now in parts)
        self._felt = self._felt or norm != 0
        self._still += 1
        if self.moved:
            self._before = []

    @property
    def taken(self) -> bool:
        """Whether a step was taken so far, whatever it moved."""
        return self.moved or self._still > 0

    def state(self) -> list[int]:
        """Return all that is remembered; what it compares with is what trains, until it moves."""
        return [int(self.moved), self._still, int(self._felt)]

    def load_state(self, state: Sequence[int]) -> None:
        """Take up what `state` returned."""
        moved, self._still, felt = state
        self.moved, self._felt = bool(moved), bool(felt)
        self._before = []

    def _parts(self) -> Iterator[Tensor]:
        """Yield numbers of every tensor, evenly chosen: a step moves each a little or none."""
        for parameter in self._trained.values():
            flat = whole(parameter.detach()).reshape(-1)
            yield flat[:: max(1, len(flat) // _SAMPLED)]
