"""Where low-rank factors start: factors (A [r, in], B [out, r]) for a weight [out, in].

What they add to the weight at first is taken off again beside it: the base is never written. A
kernel is a matrix [out, in * height * width] here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def most(start: str, shape: tuple[int, int]) -> int | None:
    """Return the highest rank that a start has for a weight of this shape; None: any."""
    return min(shape) if start in ("pissa", "olora") else None


def directions(start: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) float32, on the CPU, whose product times `scaling` is a part of the weight.

    pissa: its principal directions (Meng et al. 2024). olora: the first rows of its QR
    decomposition (Büyükakyüz 2024).
    """
    import torch

    matrix = weight.float().cpu().flatten(1)
    if start == "pissa":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = (values[:rank] / scaling).sqrt()
        return root[:, None] * right[:rank], left[:, :rank] * root
    assert start == "olora", start
    q, r = torch.linalg.qr(matrix)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def orthogonal(into: int, out: int, rank: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (A, B), random in orthogonal spaces, so that their product is zero; an even rank.

    As peft draws them: https://datta0.github.io/posts/rethink-lora-init
    """
    import torch

    assert rank % 2 == 0, rank
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=random))
    a = (torch.randn(into, rank // 2, generator=random) @ q[0::2]).T / 10
    b = (torch.randn(out, rank // 2, generator=random) @ q[1::2]) / 10
    return a.contiguous(), b.contiguous()


def difference(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A, B) of the least rank that surely holds it, with B A = b a - b0 a0.

    All [r, in] and [out, r]. Balanced by its singular values: written side by side, [b, -b0] and
    [a; a0] would be large numbers whose rounding hides their small difference.
    """
    import torch

    up = torch.cat([b, -b0], 1).double()
    down = torch.cat([a, a0], 0).double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = values.sqrt()
    new_b, new_a = q_up @ (left * root), (root[:, None] * right) @ q_down.T
    return new_a.float(), new_b.float()
