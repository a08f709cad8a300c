"""An optimizer's state as plain tensors by name: nothing is pickled, and nothing is rounded.

torch's own `load_state_dict` turns every state tensor into the parameter's number format, which
8-bit states do not survive; here each keeps its own.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.optim.fits import ALIKE, fits, group_of, missing, missing_of_group

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

# Python's numbers are written as tensors that hold them exactly.
_KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float}


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return all that `optimizer` has learned so far: CPU tensors that share no memory.

    The names are "tensor/M.I.NAME" for parameter I (counted over the groups) of member M (0, but
    for optimizers made of several), "int/...", "float/..." and "bool/..." for Python's numbers, and
    "group-tensor/M.G.NAME" and so on for those of group G. "shape/M.I" and "kind/M.CLASS" say what
    it belongs to, and "none/M.I" that nothing was learned for a parameter, which no step has moved.
    Settings, such as the learning rate, are not part of it: the recipe's hold.
    """
    import torch

    found = _belonging(optimizer)
    for member, one in enumerate(members(optimizer)):
        for place, parameter in enumerate(_parameters(one)):
            held = one.state.get(parameter, {})
            # In one order in every process: those that hold parts gather them one by one.
            for name, value in sorted(held.items()):
                _put(found, "", f"{member}.{place}.{name}", value)
            if not held:
                found[f"none/{member}.{place}"] = torch.zeros(1, dtype=torch.uint8)
        settings = _settings(one)
        for place, group in enumerate(one.param_groups):
            for name, value in group.items():
                if name not in settings:
                    _put(found, "group-", f"{member}.{place}.{name}", value)
    return found


def load_state_tensors(optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Take up what `state_tensors` returned, in an optimizer just built with the same settings.

    Raises UserError, before anything is changed, where the state is of another optimizer or of
    other parameters, or a part of it is missing.
    """
    from tunekit.parallel import part_as

    own = _belonging(optimizer)
    said = {key: value for key, value in state.items() if key.startswith(("shape/", "kind/"))}
    if own.keys() != said.keys() or any(own[k].tolist() != said[k].tolist() for k in own):
        raise UserError(
            "the saved optimizer state does not fit: it is of another optimizer or of other "
            "parameters than this recipe's"
        )
    parts = list(members(optimizer))
    parameters = [list(_parameters(one)) for one in parts]
    learned = {k: v for k, v in state.items() if k not in said and not k.startswith("none/")}
    for key, value in learned.items():
        _refuse_misfit(key, value, parts, parameters)
    _refuse_gaps(state, learned, optimizer)
    for key in learned:
        kind, member, place, name = _parsed(key)
        if kind.startswith("group-"):
            parts[member].param_groups[place][name] = _value(kind, state[key], None)
            continue
        parameter = parameters[member][place]
        device = None if _counts_on_cpu(parts[member], parameter, name) else parameter.device
        value = _value(kind, state[key], device)
        if name in ALIKE:
            value = part_as(value, parameter)
        parts[member].state[parameter][name] = value


def has_stepped(state: Mapping[str, Tensor]) -> bool:
    """Return whether anything was learned for a parameter in what `state_tensors` returned."""
    return any(key.partition("/")[0] in ("tensor", *_KINDS) for key in state)


def _belonging(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return which kind of optimizer this is, and the shapes of its parameters."""
    import torch

    found = {}
    for member, one in enumerate(members(optimizer)):
        found[f"kind/{member}.{type(one).__name__}"] = torch.zeros(1, dtype=torch.uint8)
        for place, parameter in enumerate(_parameters(one)):
            shape = torch.tensor(parameter.shape or (1,), dtype=torch.int64)
            found[f"shape/{member}.{place}"] = shape
    return found


def _refuse_misfit(
    key: str, value: Tensor, parts: Sequence[Optimizer], parameters: Sequence[Sequence[Tensor]]
) -> None:
    """Raise UserError for a tensor under a name that was never written, or of another size."""
    right = re.fullmatch(r"(group-)?(tensor|bool|int|float)/\d+\.\d+\..+", key) is not None
    if right:
        kind, member, place, name = _parsed(key)
        held = [one.param_groups for one in parts] if kind.startswith("group-") else parameters
        right = member < len(held) and place < len(held[member])
        if right and kind == "tensor":
            own = parameters[member][place]
            right = fits(name, value, own, group_of(parts[member], own))
        elif not kind.endswith("tensor"):
            right = right and value.numel() == 1
    if not right:
        raise UserError(f"the saved optimizer state does not fit: {key} is none of this recipe's")


def _refuse_gaps(
    state: Mapping[str, Tensor], learned: Mapping[str, Tensor], optimizer: Optimizer
) -> None:
    """Raise UserError where something is not there that every saved state has."""
    held: defaultdict[tuple[bool, int, int], dict[str, Tensor]] = defaultdict(dict)
    for key, value in learned.items():
        kind, member, place, name = _parsed(key)
        held[kind.startswith("group-"), member, place][name] = value
    lacking = [key for key in state_tensors(optimizer) if key[:6] == "group-" and key not in state]
    for member, one in enumerate(members(optimizer)):
        place = 0
        for number, group in enumerate(one.param_groups):
            stepped = False
            for parameter in group["params"]:
                if f"none/{member}.{place}" not in state:
                    lacking.append(missing(one, place, parameter, held[False, member, place]))
                    stepped = True
                place += 1
            if stepped:
                lacking.append(missing_of_group(one, number, held[True, member, number]))
    if said := next(filter(None, lacking), ""):
        raise UserError(f"the saved optimizer state is not whole: it has no {said}")


def _parsed(key: str) -> tuple[str, int, int, str]:
    kind, _, rest = key.partition("/")
    member, place, name = rest.split(".", 2)
    return kind, int(member), int(place), name


def _value(kind: str, tensor: Tensor, device: torch.device | None) -> Any:
    kind = kind.removeprefix("group-")
    if kind in _KINDS:
        return _KINDS[kind](tensor.item())
    return tensor.clone().to(device) if device is not None else tensor.clone()


def _counts_on_cpu(optimizer: Optimizer, parameter: Tensor, name: str) -> bool:
    """Return whether this is one of torch's step counts, which wait on the CPU unless fused."""
    if name != "step":
        return False
    group = group_of(optimizer, parameter)
    return not (group.get("fused") or group.get("capturable"))


def members(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers that `optimizer` is made of: itself, for all but joined ones."""
    return getattr(optimizer, "members", (optimizer,))


def _put(found: dict[str, Tensor], prefix: str, key: str, value: Any) -> None:
    import torch

    from tunekit.parallel import whole

    if isinstance(value, torch.Tensor):
        found[f"{prefix}tensor/{key}"] = whole(value.detach()).cpu().clone()
        return
    if value is None or (prefix and not isinstance(value, bool | int | float)):
        return  # of a group: a setting that no parameter of the constructor names
    assert isinstance(value, bool | int | float), (key, type(value))
    kind = type(value).__name__
    dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}[kind]
    found[f"{prefix}{kind}/{key}"] = torch.tensor(value, dtype=dtype)


def _settings(optimizer: Optimizer) -> frozenset[str]:
    """Return what of a group is set when the optimizer is made, and so never learned."""
    return frozenset({"params", "name", *inspect.signature(type(optimizer).__init__).parameters})


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
