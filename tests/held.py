"""Whether weights are still in memory, whoever holds them and under whatever name."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn


def memory_of(module: nn.Module) -> list[weakref.ref[Any]]:
    """Put each weight of `module` into memory of its own; return references that die with it."""
    found = []
    for parameter in module.parameters():
        own = parameter.detach().numpy().copy()
        parameter.data = torch.from_numpy(own)  # which keeps it for as long as anything needs it
        found.append(weakref.ref(own))
    return found
