"""Several optimizers as one, each over parameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class Joined(Optimizer):
    """Optimizers that step together; the groups are those of all of them, one after the other."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        assert members, "nothing to join"
        super().__init__([p for m in members for g in m.param_groups for p in g["params"]], {})
        self.members = tuple(members)
        self._gather()

    def _gather(self) -> None:
        # The members' own dictionaries: a rate set here is theirs.
        self.param_groups = [group for member in self.members for group in member.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "joined optimizers take no closure"
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self._gather()
