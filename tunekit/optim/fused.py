"""Optimizer steps inside the backward pass: a parameter at a time, its gradient gone at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from tunekit.optim.joined import Joined

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


class Stepping:
    """Lets each member of `optimizer`, which has a single parameter, step as its gradient is whole.

    So there is never more than one gradient in memory (Lv et al. 2023, "Full Parameter Fine-tuning
    for Large Language Models with Limited Resources"). The steps are those that would follow the
    backward pass: no gradient hangs on a parameter whose own is whole. `step` and `zero_grad`,
    which a loop calls after it, have nothing left to do.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, Joined), type(optimizer)
        self._members = {}
        for member in optimizer.members:
            ((parameter,),) = (group["params"] for group in member.param_groups)
            self._members[parameter] = member
        self._norms: list[Tensor] = []

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Step in backward passes meanwhile; parameters that need no gradient rest."""
        self._norms = []
        learning = [p for p in self._members if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._step) for p in learning]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self) -> None:
        """Do nothing: the steps are taken."""

    def zero_grad(self) -> None:
        """Drop what a backward pass that failed has left."""
        for parameter in self._members:
            parameter.grad = None

    def norm(self) -> float:
        """Return the norm of the whole gradient that was stepped by; not finite if a part is not.

        A parameter whose gradient is not finite was left as it was.
        """
        if not self._norms:
            return 0.0
        return float(torch.linalg.vector_norm(torch.stack(self._norms)))

    def _step(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad.detach().float())
        self._norms.append(norm)
        if math.isfinite(float(norm)):
            self._members[parameter].step()
        parameter.grad = None
