"""The training loop: one for every family and every adapter, on accelerate.

Every random number comes from (seed, purpose, step), so any step can be computed alone, and a batch
split into micro-batches sees the same noise and timesteps as the batch in one piece. Several
processes that share every batch out (`tunekit.ranks`) decide alike, from the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tunekit import diffusion, forward, parallel, seeding
from tunekit.adapters.base import WeightsAdapter
from tunekit.errors import UserError
from tunekit.guards import Fault, Guards, Seen
from tunekit.guards import TrainingError as TrainingError
from tunekit.objective import Goal
from tunekit.optim import (
    build_optimizer,
    build_schedule,
    has_stepped,
    load_state_tensors,
    state_tensors,
)
from tunekit.optim.average import Ema, Weights
from tunekit.optim.fused import Stepping
from tunekit.passes import Batches, Part, Pass, passes_of
from tunekit.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tunekit.adapters.base import Adapter
    from tunekit.families.base import Conditioning, Family
    from tunekit.schema import Train

Encode = Callable[[Sequence[str]], "Conditioning"]

# fp16 gradients overflow now and then, and the scaler answers with a smaller scale. Below this
# scale it is no longer the scale's fault.
_LOWEST_SCALE = 1.0
# What of the scaler changes from step to step.
_SCALE = frozenset({"scale", "_growth_tracker"})


@dataclass(frozen=True)
class StepRecord:
    """What is known after an optimizer step."""

    step: int
    """Steps done, from 1."""
    steps: int
    """Steps in all."""
    loss: float
    """Weighted mean error over the step's pictures of the subject, before the step."""
    lr: float
    """The denoiser's learning rate in this step."""
    grad_norm: float
    """Norm of the whole gradient before it was clipped; infinite in a skipped fp16 step."""
    images_per_second: float
    memory_bytes: int
    """The most memory so far: of the GPU, or of the process where there is none."""
    seconds: float
    """Wall time of this step."""
    skipped: bool = False
    """Whether this step was not taken: a guard's answer, or an fp16 overflow (the loss scale was
    lowered)."""
    prior_loss: float | None = None
    """The same over the pictures of the class, with their weight: what they add to what is
    minimised. None without any."""
    noticed: str | None = None
    """What a guard has to tell of this step."""
    skips: int = 0
    """Steps that guards have kept from being taken so far, with this one."""
    spike: float | None = None
    """How many times the usual the loss was, where that is a spike."""


@dataclass(frozen=True)
class _Found:
    """A step's losses and its gradient's norm. clipped: whether it came as far as the gradient."""

    loss: float = math.nan
    prior: float = math.nan
    norm: float = math.nan
    fault: Fault | None = None
    clipped: bool = False


def train(
    family: Family,
    adapter: Adapter,
    batches: Batches,
    settings: Train,
    *,
    encode: Encode | None = None,
    start: int = 0,
) -> Iterator[StepRecord]:
    """Train `adapter` in place and yield a record after each optimizer step.

    `encode` turns captions into conditioning; it is needed, and used, where the adapter trains a
    text encoder (`family.encode_prompt` fits). `start`: steps done before. Between two records the
    adapter is in drawing mode, so that the caller may draw, save or stop.

    Raises UserError at once where the settings do not suit the machine, and TrainingError where a
    guard stops the run: before the step, so that what was learned stays as it was.
    """
    return Loop(family, adapter, settings, encode=encode).run(batches, start)


class Loop:
    """The loop with its parts at hand: `optimizer` (torch's own) and the accelerator.

    ranks: this process among those that train together. `sharded`: whether each of them holds a
    part of what trains; then `state` and `load_state` are to be asked by all.
    """

    def __init__(
        self,
        family: Family,
        adapter: Adapter,
        settings: Train,
        *,
        encode: Encode | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        assert adapter.trains_text_encoder == (encode is not None), (
            "a conditioning function belongs to an adapter that trains a text encoder"
        )
        self.family, self.adapter, self.settings = family, adapter, settings
        self.accelerator = _accelerator(family.device, settings.precision)
        self.ranks, self.sharded = ranks, settings.fsdp and ranks.count > 1
        if self.sharded:
            assert isinstance(adapter, WeightsAdapter), "recipes share out whole weights alone"
            parallel.share_out(family.denoiser)
            adapter.retake()
        groups = adapter.parameter_groups()
        self.parameters = [p for group in groups for p in group.parameters]
        self.optimizer = build_optimizer(settings, groups)
        self._fused = Stepping(self.optimizer) if settings.fused_backward else None
        self._stepper: Any = self._fused or self.accelerator.prepare(self.optimizer)
        self._set_rates = build_schedule(settings, self.optimizer)
        self._encode = encode
        self._arranged = forward.arrange(family, settings)
        self._goal = Goal(settings.objective, family.schedule)
        trained = adapter.trained()
        self.ema = Ema(trained, settings.ema) if settings.ema is not None else None
        self._weights = Weights(trained, self.optimizer, self.ema, ema_draws=settings.ema_export)
        self.guards = Guards(settings, trained, len(family.schedule))
        self._computed: Callable[[Pass], Tensor] = self._losses
        if ranks.count > 1 and not self.sharded:
            self._computed = parallel.averaged(self.parameters, self._losses)
        self.whole = True
        """Whether what trains is as the last finished step left it, even if another one failed."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that later steps depend on: CPU tensors, in sets by name.

        "adapter" is what draws; "trained", where it differs, what trains; "optimizer"; "ema" and
        "scaler" where there is one; "guards". To be asked between two records.
        """
        scaler = self.accelerator.scaler
        scale = {} if scaler is None else scaler.state_dict()
        sets = {
            "adapter": self.adapter.state(),
            "optimizer": state_tensors(self.optimizer),
            "trained": self._weights.state_tensors(),
            "ema": self.ema.state_tensors() if self.ema is not None else {},
            "guards": self.guards.state_tensors(),
            "scaler": {
                name: torch.tensor(scale[name], dtype=torch.float64) for name in _SCALE & set(scale)
            },
        }
        return {name: tensors for name, tensors in sets.items() if tensors}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what `state` returned. Raises UserError where it does not fit.

        An average that was not kept before starts with the weights as they are.
        """
        if "optimizer" not in state:
            raise UserError("the checkpoint holds no optimizer state: it is from an older version")
        self.adapter.load_state(state["adapter"])
        load_state_tensors(self.optimizer, state["optimizer"])
        self._weights.load_state_tensors(state.get("trained", self.adapter.state()))
        if self.ema is not None:
            self.ema.load_state_tensors(state.get("ema", self.adapter.state()))
        self.guards.load_state_tensors(state.get("guards", {}))
        if self.guards.pulse.taken and not has_stepped(state["optimizer"]):
            raise UserError(
                "the saved optimizer state is that of one that has learned nothing, though steps "
                "were taken"
            )
        if self.accelerator.scaler is not None and "scaler" in state:
            scale = self.accelerator.scaler.state_dict()
            saved = {name: value.item() for name, value in state["scaler"].items()}
            saved["_growth_tracker"] = int(saved["_growth_tracker"])
            self.accelerator.scaler.load_state_dict({**scale, **saved})
        self._weights.draw()

    def run(self, batches: Batches, start: int = 0) -> Iterator[StepRecord]:
        """Yield a record for each step from `start` (0 is the first) on."""
        for step in range(start, self.settings.steps):
            began = time.perf_counter()
            self.adapter.train()
            self._weights.train()
            try:
                with self._arranged():
                    record = self._step(step, batches, began)
            finally:
                self._weights.draw()
                self.adapter.train(False)
                self._stepper.zero_grad()
            yield record

    def _step(self, step: int, batches: Batches, began: float) -> StepRecord:
        passes = passes_of(step, batches, self.settings, self._goal, self.ranks)
        self.adapter.begin_step(step, self.settings.steps)
        lr = self._set_rates(step)
        rate = max(float(group["lr"]) for group in self.optimizer.param_groups)
        self.guards.pulse.begin(step, self.settings.steps, rate)
        found = self._gradient(passes)
        taken, noticed = self.guards.decide(found.fault, step)
        overflow = self._overflows(found.norm)
        if taken:
            self._take(step, found.norm, overflow)
        elif self.accelerator.scaler is not None and found.clipped:
            self.accelerator.scaler.update()  # it waits for a step that never comes
        parts = [part for one in passes for part in one.parts]
        shown = self.ranks.count * sum(len(part.batch.names) for part in parts)
        seconds = time.perf_counter() - began
        return StepRecord(
            step=step + 1,
            steps=self.settings.steps,
            loss=found.loss,
            lr=lr,
            grad_norm=found.norm,
            images_per_second=shown / seconds,
            memory_bytes=peak_memory(self.family.device),
            seconds=seconds,
            skipped=overflow or not taken,
            prior_loss=found.prior if any(part.batch.prior for part in parts) else None,
            noticed=noticed,
            skips=self.guards.skips,
            spike=found.fault.spike if found.fault else None,
        )

    def _gradient(self, passes: Sequence[Pass]) -> _Found:
        """Leave a step's clipped gradient in what trains; a part of it where a loss is wrong."""
        losses = {False: 0.0, True: 0.0}
        subject: list[float] = []
        seen: list[Seen] = []
        everyone: list[Seen] = []
        for one in passes:
            with self._reproducible(one), self._averaging(one is passes[-1]):
                shares = []
                for part, each in one.split(self._computed(one)):
                    # The mean over the whole step, whatever the sizes of its parts; the pictures
                    # of the class have a mean of their own, beside that of the subject.
                    shares.append(each.sum() / part.total)
                    values, pictures, loss = self._of_all(part, each, shares[-1])
                    if fault := self.guards.losses(values, pictures):
                        return _Found(fault=fault)
                    losses[part.batch.prior] += loss
                    everyone += pictures
                    if not part.batch.prior:
                        subject += values
                        seen += pictures
                self.whole = self._fused is None  # else steps are taken from here on
                self.accelerator.backward(sum(shares[1:], shares[0]))
        norm = self._clip()
        fault = None
        if not self._overflows(norm):
            fault = self.guards.gradient(norm, everyone) or self.guards.spike(subject, seen)
        return _Found(losses[False], losses[True], norm, fault, clipped=True)

    def _of_all(
        self, part: Part, each: Tensor, share: Tensor
    ) -> tuple[list[float], list[Seen], float]:
        """Return a part's losses and pictures and its share of the step's, of all processes."""
        told = self.ranks.gather([each.detach().tolist(), part.seen(), share.item()])
        values = [value for some, _, _ in told for value in some]
        pictures = [Seen(*picture) for _, some, _ in told for picture in some]
        return values, pictures, sum(loss for _, _, loss in told) / self.ranks.count

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Let processes that hold copies meet after the last of a step's passes, not after each."""
        if last or not isinstance(self._computed, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._computed.no_sync()

    def _take(self, step: int, norm: float, overflow: bool) -> None:
        """Take the optimizer's step; where the gradient overflowed, the scaler takes none."""
        self.whole = False
        self._stepper.step()
        self.adapter.end_step()
        if self.ema is not None and not overflow:
            self.ema.update(step)
        self.whole = True
        if not overflow:
            self.guards.pulse.end(norm)

    def _losses(self, one: Pass) -> Tensor:
        """Return the weighted loss of each picture, [B]."""
        family, batch, goal = self.family, one.joined(), self._goal
        latents = batch.latents.to(family.device, torch.float32)
        noise, seen = (part.to(family.device) for part in one.noise(goal, self.settings.seed))
        timesteps = one.timesteps.to(family.device)
        noisy = diffusion.add_noise(goal.schedule, latents, seen, timesteps)
        with self.accelerator.autocast():
            conditioning = self._encode(batch.captions) if self._encode else batch.conditioning
            if batch.sizes is not None:
                conditioning = family.with_sizes(conditioning, batch.sizes)
            prediction = family.predict(noisy, timesteps, conditioning)
        wanted = diffusion.target(goal.schedule, latents, noise, timesteps)
        mask = batch.mask.to(family.device) if batch.mask is not None else None
        losses = goal.losses(prediction, wanted, timesteps, mask)
        return losses if batch.weights is None else losses * batch.weights.to(family.device)

    @contextlib.contextmanager
    def _reproducible(self, one: Pass) -> Iterator[None]:
        """Give layers that draw from torch's global stream (dropout) numbers of this pass alone."""
        device = self.family.device
        fused = self._fused.during() if self._fused else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), fused:
            purpose = f"{one.kind}layers/{one.parts[0].micro}"
            if self.ranks.count > 1:  # whose pictures are others
                purpose += f"/{self.ranks.rank} of {self.ranks.count}"
            torch.manual_seed(seeding.derive(self.settings.seed, purpose, one.parts[0].step))
            yield

    def _clip(self) -> float:
        """Scale the gradient down where it is too long, and return the norm it had."""
        if self._fused is not None:
            return self._fused.norm()
        limit = self.settings.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        assert norm is not None
        return float(parallel.whole(norm))

    def _overflows(self, norm: float) -> bool:
        """Return whether this is fp16's scale growing too large, which the scaler corrects."""
        scaler = self.accelerator.scaler
        return not math.isfinite(norm) and scaler is not None and scaler.get_scale() > _LOWEST_SCALE


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: on the GPU, or by the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not there on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_precision(device: torch.device, precision: str) -> None:
    """Raise UserError where `device` cannot train in `precision` ("fp32", "bf16" or "fp16")."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError(
            "train.precision: fp16 needs a GPU, this run is on the CPU: set bf16 or fp32"
        )


def _accelerator(device: torch.device, precision: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    check_precision(device, precision)
    wanted = "no" if precision == "fp32" else precision
    if is_initialized():
        # accelerate keeps one state for the process and refuses another precision. A second run in
        # the same process is nothing unusual here.
        state: Any = AcceleratorState()
        if state.mixed_precision != wanted or state.device.type != device.type:
            AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=wanted)
    assert accelerator.device.type == device.type, (accelerator.device, device)
    # An environment made by `accelerate launch` could set it, and would shrink every gradient.
    assert accelerator.gradient_accumulation_steps == 1, "the loop divides by the pictures itself"
    return accelerator
