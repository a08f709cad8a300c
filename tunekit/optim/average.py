"""Weights that are averaged over the steps, and which of them draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tunekit.errors import UserError
from tunekit.parallel import part_as, whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def ema_decay(decay: float, step: int) -> float:
    """Return the decay of an average at `step` (0 is the first): `decay`, but less at first.

    (1 + n) / (10 + n) after n steps until that exceeds `decay`, as TensorFlow's
    ExponentialMovingAverage does it, so that the first weights are soon forgotten.
    """
    return min(decay, (2 + step) / (11 + step))


class Ema:
    """An exponential moving average of parameters (Polyak & Juditsky 1992, with forgetting)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        assert 0 <= decay < 1, decay
        self.decay = decay
        self._parameters = dict(parameters)
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step` (0 is the first)."""
        keep = ema_decay(self.decay, step)
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1 - keep)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the average: CPU copies under the parameters' names."""
        return {name: whole(value).cpu().clone() for name, value in self.average.items()}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_tensors` returned. Raises UserError where it does not fit."""
        _refuse_misfit("average of the weights", self.average, state)
        for name, value in self.average.items():
            value.copy_(part_as(state[name], value))


class Weights:
    """The weights that train and, where they differ, those that draw.

    They differ with an average (`ema`, if `ema_draws`), and with optimizers that have modes, such
    as schedule-free ones. `draw()` and `train()` exchange them bit for bit: what is drawn in
    between, and how often, has no influence on training.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        ema: Ema | None = None,
        *,
        ema_draws: bool = True,
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer: Any = optimizer
        self._ema = ema if ema_draws else None
        self._modes = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
        assert not (self._modes and self._ema), "two averages"
        self._trained: dict[str, Tensor] | None = None

    @property
    def differ(self) -> bool:
        """Whether other weights draw than train."""
        return self._modes or self._ema is not None

    @torch.no_grad()
    def draw(self) -> None:
        """Put the weights that draw into the parameters, and keep those that train."""
        if not self.differ or self._trained is not None:
            return
        self._trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        if self._ema is not None:
            self._set(self._ema.average)
            return
        self._optimizer.eval()
        drawn = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._optimizer.train()  # its mode is part of its state; only its weights are wanted
        self._set(drawn)

    @torch.no_grad()
    def train(self) -> None:
        """Put the weights that train back."""
        if self._trained is not None:
            self._set(self._trained)
            self._trained = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the weights that train, where others draw: CPU copies; {} where they are one."""
        if not self.differ:
            return {}
        held = self._trained or {name: p.detach() for name, p in self._parameters.items()}
        return {name: whole(value).cpu().clone() for name, value in held.items()}

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_tensors` returned; the parameters then hold the weights that train.

        Raises UserError where it does not fit.
        """
        if not self.differ and not state:
            return
        _refuse_misfit("trained weights", self._parameters, state)
        self._set({n: part_as(state[n], p) for n, p in self._parameters.items()})
        self._trained = None

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _refuse_misfit(what: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    wrong = sorted(
        own.keys() ^ state.keys()
        | {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}
    )
    if wrong:
        raise UserError(
            f"the saved {what} does not fit what trains now, such as {wrong[0]}; it comes from "
            "other settings"
        )
