"""Random numbers derived from (seed, purpose, step) instead of drawn from one running stream.

A stream's position would have to be saved to resume exactly, and every change in order or worker
count would shift it. Derived numbers need neither.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, step: int = 0) -> int:
    """Return a number in 0..2**63-1 that depends on all three arguments and on nothing else.

    `purpose` names the use ("noise", "timesteps", "order"), so that two uses of one seed never
    share their numbers. For `random.Random` and numpy as well as for torch.
    """
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(
    seed: int, purpose: str, step: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a torch generator on `device`, seeded with `derive(seed, purpose, step)`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, purpose, step))
