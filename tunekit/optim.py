"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from tunekit.schema import Train

RateKey = Literal["learning_rate", "text_encoder_learning_rate"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: `scale` times what the recipe's key `rate` says."""

    name: str
    parameters: Sequence[nn.Parameter]
    rate: RateKey = "learning_rate"
    scale: float = 1.0


def peak_rate(train: Train, rate: RateKey) -> float:
    """Return the peak learning rate that `rate` stands for; a null one is `learning_rate`'s."""
    value: float | None = getattr(train, rate)
    return train.learning_rate if value is None else value


def build_optimizer(train: Train, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Return the optimizer of the recipe over `groups`, each with its own peak learning rate.

    AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    import torch

    assert groups, "nothing trains"
    assert all(group.parameters for group in groups), "an empty parameter group"
    assert train.optimizer == "adamw", train.optimizer
    return torch.optim.AdamW(
        [
            {"params": list(g.parameters), "lr": peak_rate(train, g.rate) * g.scale, "name": g.name}
            for g in groups
        ],
        betas=train.betas or (0.9, 0.999),
        weight_decay=train.weight_decay,
        # One kernel for all tensors: an adapter is hundreds of small ones.
        fused=True,
    )


def rate_factor(train: Train, step: int) -> float:
    """Return what the peak learning rate is multiplied with at `step` (0 is the first): 0..1.

    Over the warm-up it rises linearly and reaches 1 at the step numbered `warmup_steps`; no step is
    spent at rate 0. Then it is held, or falls towards the 0 that would follow the last step.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    done = min(1.0, done)
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if train.schedule == "linear" else 1.0


def build_schedule(train: Train, optimizer: Optimizer) -> Callable[[int], float]:
    """Return a function that sets every group's rate for a step and returns the first group's.

    The rate is a function of the step alone, so a schedule has no state to save or to miscount.
    """
    peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_rates(step: int) -> float:
        factor = rate_factor(train, step)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        return peaks[0] * factor

    return set_rates
