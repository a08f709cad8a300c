"""The factors in adapter files: every trainer's names for them, and what they multiply to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import safeconfig
from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Every spelling of a factor that trainers write: PEFT, kohya, diffusers before PEFT, LyCORIS.
_SPELLINGS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_embedding_A": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_embedding_B": "up",
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("hada_t1", "hada_t2", "lokr_t2", "oft_blocks", "oft_R")},
    **{name: name for name in ("diff", "diff_b")},
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{f"lokr_w{n}{part}": f"lokr_w{n}{part}" for n in (1, 2) for part in ("", "_a", "_b")},
}
_KEY = re.compile(
    r"^(?P<module>.+)(?:\.|_(?=lora\.))(?P<factor>"  # to_q_lora.down: diffusers before PEFT
    + "|".join(sorted(map(re.escape, _SPELLINGS), key=len, reverse=True))
    + r")(?:\.default)?(?:\.weight)?$"
)


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted module: `norm` is the Frobenius norm of its weight change, alpha / rank included.

    rank and alpha are None where the file does not say, or says no number; norm is None where it is
    no number, and where this reader cannot compute it (`kind` OFT, tensor-decomposed convolutions).
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    norm: float | None


def group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """Sort tensors into {module: {factor: tensor}}, and the names that are no factor.

    Factors go by one name each, whatever the file calls them: "down" and "up" for LoRA.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key in sorted(tensors):
        match = _KEY.match(key)
        if match:
            parts = grouped.setdefault(match["module"], {})
            parts[_SPELLINGS[match["factor"]]] = tensors[key]
        else:
            unread.append(key)
    return grouped, tuple(unread)


def read_module(
    path: Path, name: str, parts: Mapping[str, Tensor], scales: Mapping[str, object]
) -> ModuleInfo:
    """Describe the module `name`, made of `parts` (see `group`), from the file at `path`.

    scales: what diffusers' own metadata says (see `adapter_metadata`). Raises UserError for shapes
    that no adapter has, and for factors that cannot be multiplied.
    """
    rank = check_module(path, name, parts)
    alpha = float(parts["alpha"]) if "alpha" in parts else declared_alpha(name, rank, scales)
    if alpha is not None and not math.isfinite(alpha):
        alpha = None
    scale = alpha / rank if alpha is not None and rank else 1.0
    norm = _norm(parts, scale)
    known = norm is not None and math.isfinite(norm)
    return ModuleInfo(name, kind_of(parts), rank, alpha, norm if known else None)


def check_module(path: Path, name: str, parts: Mapping[str, Tensor]) -> int | None:
    """Return the rank of the module `name` where its kind has one; see `read_module`."""
    for factor, tensor in parts.items():
        if tensor.numel() == 0 or tensor.ndim not in _dimensions(factor):
            shape = list(tensor.shape)
            raise UserError(f"{path}: {name} ({factor}) has the shape {shape}: no adapter has that")
        if tensor.is_complex():
            raise UserError(f"{path}: {name} ({factor}) holds complex numbers: no adapter does")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        shape = list(parts["alpha"].shape)
        raise UserError(f"{path}: the alpha of {name} has the shape {shape}, not one number")
    return _rank(path, name, parts)


def _dimensions(factor: str) -> tuple[int, ...]:
    """Return how many dimensions a factor may have: two of a matrix, up to five of a kernel."""
    if factor in ("down", "up"):
        return (2, 4)
    if factor == "mid":
        return (4,)
    if factor.startswith(("hada_w", "lokr_w")):
        return (2,) if factor.endswith(("_a", "_b")) else (2, 4)
    return (0, 1, 2, 3, 4, 5)


_LARGEST = 2**28  # numbers of a weight; some bytes of a file could ask for all memory there is
_STRIP = 2**22  # numbers at a time
_PAIRS = (
    ("down", "up"),
    *((f"{start}w{n}_b", f"{start}w{n}_a") for start in ("hada_", "lokr_") for n in (1, 2)),
)


def _rank(path: Path, name: str, parts: Mapping[str, Tensor]) -> int | None:
    """Return the inner size of the module's factors; the two of each pair must agree on it."""
    ranks = []
    for down, up in _PAIRS:
        if down in parts and up in parts and parts[down].shape[0] != parts[up].shape[1]:
            raise UserError(
                f"{path}: the factors of {name} cannot be multiplied: "
                f"{list(parts[up].shape)} by {list(parts[down].shape)}"
            )
        if down in parts:
            ranks.append(int(parts[down].shape[0]))
        elif up in parts:
            ranks.append(int(parts[up].shape[1]))
    return ranks[0] if ranks else None


def _norm(parts: Mapping[str, Tensor], scale: float) -> float | None:
    """Return the Frobenius norm of a module's change, or None where unknown.

    scale: what the factors' product is multiplied with; whole differences are as they stand.
    """
    wide = {factor: tensor.double() for factor, tensor in parts.items() if factor != "alpha"}
    whole = [float(wide.pop(factor).norm()) for factor in ("diff", "diff_b") if factor in wide]
    if whole and not wide:
        return math.hypot(*whole)
    product = _factors_norm(wide)
    return None if product is None else math.hypot(product * scale, *whole)


def _factors_norm(wide: Mapping[str, Tensor]) -> float | None:
    """Return the norm of what the factors multiply to, or None where unknown."""
    if {"down", "up"} <= wide.keys():
        # else a chain of kernels
        pointwise = "mid" not in wide and all(size == 1 for size in wide["up"].shape[2:])
        return _product_norm(wide["up"], wide["down"]) if pointwise else None
    if any(name.endswith(("_t1", "_t2")) for name in wide):
        return None
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= wide.keys():
        return _hadamard_norm(wide)
    halves = []
    for half in ("lokr_w1", "lokr_w2"):
        if half in wide:
            halves.append(float(wide[half].norm()))
        elif f"{half}_a" in wide and f"{half}_b" in wide:
            halves.append(_product_norm(wide[f"{half}_a"], wide[f"{half}_b"]))
    return halves[0] * halves[1] if len(halves) == 2 else None  # |a (x) b| = |a| |b|


def _hadamard_norm(wide: Mapping[str, Tensor]) -> float | None:
    """Return |(w1_a @ w1_b) * (w2_a @ w2_b)|, a strip of rows at a time; None where none fits.

    A file of a megabyte can stand for a matrix of terabytes, so what no model has is not reckoned.
    """
    pairs = [(wide[f"hada_w{n}_a"], wide[f"hada_w{n}_b"]) for n in (1, 2)]
    (rows, width), other = ((a.shape[0], b.shape[1]) for a, b in pairs)
    if other != (rows, width) or rows * width > _LARGEST:
        return None
    strip = max(1, _STRIP // width)
    (a, b), (c, d) = pairs
    strips = (
        ((a[top : top + strip] @ b) * (c[top : top + strip] @ d)).norm()
        for top in range(0, rows, strip)
    )
    return math.hypot(*(float(norm) for norm in strips))


def _product_norm(up: Tensor, down: Tensor) -> float:
    """Return |up @ down|; of the product and the factors' Gram matrices, whatever is smaller."""
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] ** 2 > up.shape[0] * down.shape[1]:
        return float((up @ down).norm())
    squared = float(((up.T @ up) * (down @ down.T)).sum())
    return max(squared, 0.0) ** 0.5 if squared == squared else squared


def kind_of(parts: Mapping[str, Tensor]) -> str:
    """Return what a module's factors are, in a word."""
    if "oft_blocks" in parts and parts["oft_blocks"].ndim == 4:
        return "BOFT"
    for start, kind in (("hada_", "LoHa"), ("lokr_", "LoKr"), ("oft_", "OFT"), ("diff", "whole")):
        if any(factor.startswith(start) for factor in parts):
            return kind
    return "DoRA" if "magnitude" in parts else "LoRA"


def adapter_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    """Return diffusers' own adapter metadata, which carries alpha for diffusers alone."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path}: lora_adapter_metadata is not JSON ({fault})") from fault
    if not isinstance(value, dict):
        raise UserError(f"{path}: lora_adapter_metadata is not a JSON object")
    safeconfig.check(path, value)
    return value


def declared_alpha(name: str, rank: int | None, scales: Mapping[str, object]) -> float | None:
    """Return a module's alpha, to be divided by its rank, as `adapter_metadata` says it.

    As peft reads it: of patterns for the end of a name the first counts, and the alpha of rsLoRA is
    divided by the square root of the rank. None where nothing is said.
    """
    component, _, bare = name.partition(".")
    alpha = scales.get(f"{component}.lora_alpha")
    patterns = scales.get(f"{component}.alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        # As the name it stands for, never as the expression that it may be: a stranger's could run
        # for hours.
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if bare == plain or (not pattern.startswith("^") and bare.endswith(f".{plain}")):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        return None
    rooted = scales.get(f"{component}.use_rslora") is True and rank
    return float(alpha) * (math.sqrt(rank) if rooted and rank else 1.0)


def with_alpha(
    path: Path, name: str, parts: Mapping[str, Tensor], scales: Mapping[str, object]
) -> Mapping[str, Tensor]:
    """Return a module's factors with its alpha among them, where it stands in `scales` alone.

    Raises UserError as `check_module`.
    """
    if not scales or "alpha" in parts:
        return parts
    import torch

    alpha = declared_alpha(name, check_module(path, name, parts), scales)
    return parts if alpha is None else {**parts, "alpha": torch.tensor(alpha)}


def is_kohya(name: str) -> bool:
    """Say whether `name` is in the naming of kohya's sd-scripts."""
    return name.startswith(("lora_unet_", "lora_te", "lora_transformer_"))
