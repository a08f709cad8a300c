"""Learning rates over the steps: pure functions, so there is no state to save or to miscount."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from tunekit.schema import Train


def rate_factor(train: Train, step: int) -> float:
    """Return what the peak learning rate is multiplied with at `step` (0 is the first): 0..1.

    Over the warm-up it rises linearly and reaches 1 at the step numbered `warmup_steps`; no step is
    spent at rate 0. Then it is held, or falls towards the 0 that would follow the last step: along
    a cosine (Loshchilov & Hutter 2017, "SGDR", eq. 5 with a least rate of 0, also with warm
    restarts of equal length), a line or a power of one, or held and lowered along a line over the
    last `decay_steps` (Hu et al. 2024, "MiniCPM", section 4.2: warmup-stable-decay).
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    done = min(1.0, done)
    match train.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "cosine_with_restarts":
            return 0.5 * (1 + math.cos(math.pi * (train.cycles * done % 1))) if done < 1 else 0.0
        case "linear":
            return 1 - done
        case "polynomial":
            return math.pow(1 - done, train.power)
        case "warmup_stable_decay":
            # The default is cut to what the warm-up leaves.
            last = train.decay_steps or min(-(-train.steps // 5), train.steps - train.warmup_steps)
            return max(0.0, min(1.0, (train.steps - step) / last))
    return 1.0


def build_schedule(train: Train, optimizer: Optimizer) -> Callable[[int], float]:
    """Return a function that sets every group's rate for a step and returns the first group's.

    To be called before the first step, while the groups still have their peak rates.
    """
    peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_rates(step: int) -> float:
        factor = rate_factor(train, step)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        return peaks[0] * factor

    return set_rates
