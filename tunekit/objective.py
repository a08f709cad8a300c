"""The objective of a recipe at work: what the loop draws, asks for and minimises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunekit import diffusion, timesteps
from tunekit.diffusion import FlowSchedule, NoiseSchedule, Schedule
from tunekit.errors import UserError
from tunekit.schema_objective import (
    FLOW_HAS_NO_WEIGHT,
    ONLY_FLOW_SHIFTS,
    WEIGHTINGS,
    Objective,
    zero_terminal_fault,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check(objective: Objective, schedule: Schedule) -> None:
    """Raise UserError, a line a fault, where the objective contradicts the base's schedule."""
    if faults := [f"train.objective.{line}" for line in _faults(objective, schedule)]:
        raise UserError("\n".join(faults))


def notes(objective: Objective, schedule: Schedule) -> list[str]:
    """Return what is worth telling before training with this objective on this base."""
    if not objective.zero_terminal_snr or not isinstance(schedule, NoiseSchedule):
        return []
    if schedule.alphas_cumprod[-1] == 0:
        return [
            "train.objective.zero_terminal_snr: this base's schedule ends in pure noise already"
        ]
    return [
        "train.objective.zero_terminal_snr: training goes to pure noise, which the base's own "
        "sampler never starts from; draw with one set to rescale_betas_zero_snr and "
        "timestep_spacing: trailing to see all of the effect"
    ]


def _faults(objective: Objective, schedule: Schedule) -> Iterator[str]:
    kind, count = schedule.prediction_type, len(schedule)
    if objective.prediction not in (None, kind):
        yield (
            f"prediction: {objective.prediction} is not what this base predicts ({kind}); leave it "
            "out, choose another base, or correct what it says of itself with base.prediction"
        )
    if objective.zero_terminal_snr and (why := zero_terminal_fault(kind)):
        yield f"zero_terminal_snr: {why}"
    if isinstance(schedule, FlowSchedule):
        for key in WEIGHTINGS:
            if getattr(objective, key):
                yield f"{key}: {FLOW_HAS_NO_WEIGHT}"
        if objective.resolution_shift and schedule.cells is None and schedule.shifts is None:
            yield "resolution_shift: this base does not say for which size its timesteps are made"
    else:
        for key, off in (("shift", 1.0), ("resolution_shift", False)):
            if getattr(objective, key) != off:
                yield f"{key}: {ONLY_FLOW_SHIFTS}"
    last = objective.max_timestep
    for key, value in (("min_timestep", objective.min_timestep), ("max_timestep", last)):
        if value is not None and value >= count:
            yield f"{key}: {value} is past the last timestep of this base, {count - 1}"
            return
    if not _uniform(objective) and not _table(objective, count, 1.0).any():
        yield "timestep_sampling: nearly nothing is drawn from min_timestep to max_timestep"


def _uniform(objective: Objective) -> bool:
    """Return whether every timestep is drawn alike."""
    return (
        objective.timestep_sampling == "uniform"
        and objective.timestep_bias is None
        and objective.min_timestep == 0
        and objective.max_timestep is None
        and objective.shift == 1
        and not objective.resolution_shift
    )


def _table(objective: Objective, count: int, shift: float) -> timesteps.Array:
    """Return how often each timestep is drawn for a picture that is shifted by `shift` more."""
    kind = objective.timestep_sampling
    parameters = {
        "uniform": (0.0, 0.0),
        "logit_normal": (objective.logit_mean, objective.logit_std),
        "mode": (objective.mode_scale, 0.0),
        "beta": (objective.beta_a, objective.beta_b),
    }[kind]
    bias = objective.timestep_bias
    last = objective.max_timestep
    return timesteps.probabilities(
        count,
        kind,
        parameters,
        shift=objective.shift * shift,
        bias=bias and (bias, objective.timestep_bias_multiplier, objective.timestep_bias_portion),
        limits=(objective.min_timestep, count - 1 if last is None else last),
    )


def _shift(schedule: FlowSchedule, cells: int) -> float:
    """Return how far a picture of so many latent cells moves the timesteps towards the noise."""
    if schedule.shifts is not None:
        return schedule.shifts(cells)
    assert schedule.cells is not None
    return timesteps.resolution_shift(cells, schedule.cells)


class Goal:
    """An objective on a base's schedule. Raises UserError as `check` does.

    `schedule` is what training noises with, which is the base's own but for a stretched end.
    """

    def __init__(self, objective: Objective, schedule: Schedule) -> None:
        check(objective, schedule)
        self.objective = objective
        self.schedule = schedule
        if objective.zero_terminal_snr:
            assert isinstance(schedule, NoiseSchedule)
            self.schedule = diffusion.zero_terminal_snr(schedule)

    def timesteps(self, cells: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw a timestep for each picture: [len(cells)] int64 on the CPU.

        cells: how many latent cells (h * w) each has.
        """
        if _uniform(self.objective):
            return diffusion.sample_timesteps(self.schedule, len(cells), generator)
        shifts = [1.0] * len(cells)
        if self.objective.resolution_shift:
            assert isinstance(self.schedule, FlowSchedule)
            shifts = [_shift(self.schedule, one) for one in cells]
        tables = [_table(self.objective, len(self.schedule), shift) for shift in shifts]
        return timesteps.draw(tables, generator)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw one picture's noise: what is asked for, and what the denoiser sees; [C, h, w]."""
        asked = diffusion.sample_noise(
            shape, generator, self.objective.noise_offset, self.objective.pyramid_noise
        )
        strength = self.objective.input_perturbation
        return asked, diffusion.perturb_noise(asked, generator, strength) if strength else asked

    def losses(
        self, prediction: Tensor, wanted: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the weighted error of each picture: [B, ...] and [B, ...] -> [B] float32."""
        objective = self.objective
        scale = None
        if objective.loss != "mse":
            scale = diffusion.huber_scale(
                self.schedule, timesteps, objective.huber_c, objective.huber_schedule
            )
        weights = diffusion.loss_weights(
            self.schedule,
            timesteps,
            objective.min_snr_gamma,
            soft_min_snr_gamma=objective.soft_min_snr_gamma,
            p2_gamma=objective.p2_gamma,
            debiased=objective.debiased,
        )
        errors = diffusion.sample_losses(prediction, wanted, mask, loss=objective.loss, scale=scale)
        return weights * errors
