"""Whether a saved optimizer state is whole: what each optimizer keeps of a parameter, in what size.

Without this a state that lost its moments would be taken up as that of an optimizer just built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# What is always kept for a parameter that was stepped, by the optimizer's class.
_KEPT: dict[str, tuple[str, ...]] = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "AdamW8bit": ("step", "state1", "state2"),
    "Adafactor": ("step", "RMS"),
    "CAME": ("RMS", "exp_avg"),
    "Lion": ("exp_avg",),
    "Lion8bit": ("step", "state1"),
    "Muon": ("momentum_buffer",),
    "Prodigy": ("s", "p0", "exp_avg", "exp_avg_sq"),
    "ScheduleFreeAdamW": ("z", "exp_avg_sq"),
}
# And for a group of them.
_KEPT_OF_GROUP: dict[str, tuple[str, ...]] = {
    "CAME": ("step",),
    "Lion": ("step",),
    "Prodigy": ("d_hat", "d_de_nom", "d_numerator"),
    "ScheduleFreeAdamW": ("step",),
}
# Of two dimensions and more these keep rows and columns of what others keep whole.
_FACTORED = {"Adafactor": ("exp_avg_sq",), "CAME": ("exp_avg_sq", "exp_avg_res")}
# A number for each of the parameter's.
ALIKE = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2", "z"}
)
_BLOCK = 256  # numbers that share a scale in bitsandbytes' 8 bits, and entries of their table


def missing(optimizer: Optimizer, place: int, parameter: Tensor, held: Mapping[str, Any]) -> str:
    """Return what the state `held` of a stepped parameter lacks; "" where it is whole.

    place: the parameter's, for what is said.
    """
    kind = type(optimizer).__name__
    assert kind in _KEPT, kind
    wanted = list(_KEPT[kind])
    for name in _FACTORED.get(kind, ()):
        if parameter.ndim >= 2:
            wanted += [f"{name}_row", f"{name}_col"]
        elif name == "exp_avg_sq":
            wanted.append(name)
    for number in ("1", "2"):
        state = held.get(f"state{number}")
        if state is not None and not state.is_floating_point():  # in 8 bits
            wanted += [f"absmax{number}", f"qmap{number}"]
    lacking = [name for name in wanted if name not in held]
    return f"{' and '.join(lacking)} of parameter {place}" if lacking else ""


def missing_of_group(optimizer: Optimizer, place: int, held: Mapping[str, Any]) -> str:
    """Return what is lacking of a group in which a parameter was stepped; "" where nothing is."""
    kept = _KEPT_OF_GROUP.get(type(optimizer).__name__, ())
    lacking = [name for name in kept if name not in held]
    return f"{' and '.join(lacking)} of group {place}" if lacking else ""


def fits(name: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a tensor may be what is kept under this name for this parameter of `group`."""
    size, shape = value.numel(), tuple(parameter.shape)
    if name in ALIKE:
        return size == parameter.numel()
    if name in ("s", "p0"):  # p0 of a parameter of zeros is one of them
        part = math.ceil(parameter.numel() / int(group.get("slice_p", 1)))
        return size == part or (name == "p0" and size == 1)
    if name.endswith("_row"):
        return tuple(value.shape) == shape[:-1]
    if name.endswith("_col"):
        return tuple(value.shape) == (*shape[:-2], *shape[-1:])
    if name.startswith("absmax"):
        return size == math.ceil(parameter.numel() / _BLOCK)
    if name.startswith("qmap"):
        return size == _BLOCK
    return name in ("step", "RMS") and size == 1


def group_of(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """Return the group that a parameter of `optimizer` is in."""
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    return next(g for g in groups if any(p is parameter for p in g["params"]))
