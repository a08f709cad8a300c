"""The change of a weight that a set of factors stands for: pure functions, a formula a kind.

Every function returns what is added to the weight, in the weight's shape. Kernels are taken as
matrices [out, in * height * width]. LyCORIS is Yeh et al. 2023, "Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def low_rank(up: Tensor, down: Tensor) -> Tensor:
    """Return up @ down: [out, r] and [r, in], or kernels [out, r, 1, 1] and [r, in, h, w]."""
    product = up.flatten(1) @ down.flatten(1)
    return product.reshape(up.shape[0], *down.shape[1:])


def hadamard(parts: Mapping[str, Tensor]) -> Tensor:
    """Return (w1_a @ w1_b) * (w2_a @ w2_b), the product of LoHa: [out, in]."""
    one = parts["hada_w1_a"] @ parts["hada_w1_b"]
    return one * (parts["hada_w2_a"] @ parts["hada_w2_b"])


def kronecker(parts: Mapping[str, Tensor]) -> Tensor:
    """Return w1 (x) w2, the product of LoKr: [out, in] or [out, in, h, w]; halves may be products.

    w1: [a, c]. w2: [b, d] or a kernel [b, d, h, w]; a product's kernel is flat, [b, d * h * w].
    """
    import torch

    for half in ("lokr_w1", "lokr_w2"):
        if half not in parts and not {f"{half}_a", f"{half}_b"} <= parts.keys():
            raise ValueError(f"it has no whole {half}")
    one, two = (
        parts[half] if half in parts else parts[f"{half}_a"] @ parts[f"{half}_b"]
        for half in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(one[(...,) + (None,) * (two.ndim - 2)], two.contiguous())


def cayley(blocks: Tensor) -> Tensor:
    """Return R - I for each block's rotation R = (I + Q)(I - Q)^-1, with Q = block - block^T.

    blocks: [..., b, b]. Without the identity, beside which a small turn would be rounded away.
    """
    import torch

    skew = blocks - blocks.mT
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    turned: Tensor = torch.linalg.solve(one - skew, 2 * skew, left=False)
    return turned


def rotate(turns: Tensor, rows: Tensor) -> Tensor:
    """Return how rows change when blocks of them are turned: [k, b, b] (R - I), [k * b, ...].

    Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (OFT); on the
    rows of the weight, by R transposed, as LyCORIS' diag-oft and its readers do.
    """
    import torch

    blocks = rows.reshape(*turns.shape[:2], *rows.shape[1:])
    return torch.einsum("knm,kn...->km...", turns, blocks).flatten(0, 1)


def butterfly(turns: Tensor, rows: Tensor) -> Tensor:
    """Return how rows change by turn after turn, each joining rows twice as far apart.

    turns: [m, k, b, b] (R - I). Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via
    Butterfly Factorization" (BOFT); in the order of LyCORIS and its readers: factor i takes the
    rows of two runs of 2^i * b / 2 in turn, turns blocks of b, and puts them back.
    """
    import torch

    size, rest = turns.shape[-1], rows.shape[1:]
    change = torch.zeros_like(rows)
    for number, factor in enumerate(turns):
        run = 2**number * (size // 2)
        woven = (rows + change).reshape(-1, 2, run, *rest).transpose(1, 2).reshape(-1, size, *rest)
        turned = torch.einsum("bij,bj...->bi...", factor, woven)
        change = change + turned.reshape(-1, run, 2, *rest).transpose(1, 2).reshape(rows.shape)
    return change


def change(
    parts: Mapping[str, Tensor], alpha: float | None, weight: Tensor, strength: float = 1.0
) -> Tensor:
    """Return what a file's factors add to `weight`: float32, of its shape.

    parts: the factors of one module by the names of `tunekit.factors.group`, without its alpha.
    alpha: the file's; None: the rank, where the kind has one. strength: draw with so many times the
    change; a magnitude goes this share of its way. Raises ValueError for factors that are no
    kind's, or another weight's.
    """
    wide = {name: tensor.float().to(weight.device) for name, tensor in parts.items()}
    magnitude = wide.pop("magnitude", None)
    # Before anything is multiplied: a file of a megabyte can stand for a matrix of terabytes.
    if (planned := _planned(wide)) > weight.numel():
        raise ValueError(f"its change has {planned:,} numbers, not {weight.numel():,}")
    if wide.keys() == {"oft_blocks"} and magnitude is None:
        turn = butterfly if wide["oft_blocks"].ndim == 4 else rotate
        delta, rank = turn(cayley(_held(wide["oft_blocks"], alpha)), weight.float()), None
    else:
        delta, rank = product(wide)
    if delta.numel() != weight.numel():
        raise ValueError(f"its change has the shape {list(delta.shape)}, not {list(weight.shape)}")
    scale = alpha / rank if rank is not None and alpha is not None else 1.0
    delta = delta.reshape(weight.shape) * (scale * strength)
    return delta if magnitude is None else directed(magnitude, weight.float(), delta, strength)


def product(wide: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """Return what factors multiply to, and the rank that an alpha is divided by (None: no alpha).

    For every kind whose change does not depend on the weight. Raises ValueError for other factors.
    """
    names = set(wide)
    if names == {"diff"}:
        return wide["diff"], None
    if names == {"down", "up"}:
        return low_rank(wide["up"], wide["down"]), wide["down"].shape[0]
    if names == {"down", "mid", "up"}:
        return low_rank(wide["up"], joined(wide["mid"], wide["down"])), wide["down"].shape[0]
    if names == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        return hadamard(wide), wide["hada_w1_b"].shape[0]
    if names and all(name.startswith("lokr_w") for name in names):
        # Only a half that is a product has a rank; two whole ones are read without a scale.
        ranks = (wide[n].shape[0] for n in ("lokr_w2_b", "lokr_w1_b") if n in wide)
        return kronecker(wide), next(ranks, None)
    raise ValueError(f"{', '.join(sorted(names))} are no factors of a kind this reads")


def _planned(wide: Mapping[str, Tensor]) -> int:
    """Return how many numbers the largest product of the factors has."""
    if any(tensor.ndim == 0 for tensor in wide.values()):
        raise ValueError("a factor is a single number")

    def numbers(left: str, right: str) -> int:
        if not {left, right} <= wide.keys():
            return 1
        return len(wide[left]) * (wide[right].numel() // max(1, len(wide[right])))

    lokr = [
        wide[half].numel() if half in wide else numbers(f"{half}_a", f"{half}_b")
        for half in ("lokr_w1", "lokr_w2")
    ]
    hada = [numbers(f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2)]
    return max(numbers("up", "down"), *hada, lokr[0] * lokr[1])


def joined(mid: Tensor, down: Tensor) -> Tensor:
    """Return a kernel [r, in, h, w] for mid [r, r, h, w] after down [r, in, 1, 1] (LoCon, CP)."""
    import torch

    return torch.einsum("rshw,si->rihw", mid, down.flatten(1))


def directed(magnitude: Tensor, weight: Tensor, delta: Tensor, strength: float = 1.0) -> Tensor:
    """Return a DoRA's change: weight + delta, each output of another length, less the weight.

    magnitude: [out] or [out, 1, ...] (Liu et al. 2024); [1, in, ...] is a length for each input, as
    older LyCORIS has it. strength: the share of its way that it goes from the weight's own length.
    """
    import torch

    whole = weight + delta
    one = [1] * (weight.ndim - 2)
    if magnitude.numel() == len(weight) and magnitude.shape[0] == len(weight):
        axes, shape = tuple(range(1, weight.ndim)), (-1, 1, *one)
    elif magnitude.ndim > 1 and magnitude.numel() == weight.shape[1]:
        axes, shape = (0, *range(2, weight.ndim)), (1, -1, *one)
    else:
        raise ValueError(f"its magnitude has the shape {list(magnitude.shape)}")
    own = torch.linalg.vector_norm(weight, dim=axes).reshape(shape)
    length = own + strength * (magnitude.reshape(shape) - own)
    share: Tensor = length / torch.linalg.vector_norm(whole, dim=axes).reshape(shape)
    return whole * share - weight


def _held(blocks: Tensor, most: float | None) -> Tensor:
    """Return blocks whose skew part is no longer than `most`; None and 0 hold nothing back."""
    length = float((blocks - blocks.mT).norm())
    return blocks * (most / length) if most and length > most else blocks
