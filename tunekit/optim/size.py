"""How many bytes an optimizer keeps for a parameter, and a checkpoint for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunekit.optim.build import ParameterGroup
    from tunekit.schema import Train

_FLOAT = 4
# bitsandbytes: tensors of fewer numbers keep 32 bits, others 8 with a float32 for each block.
_SMALL, _BLOCK = 4096, 256
_WHOLE = {"adamw": 2, "schedulefree_adamw": 2, "lion": 1, "prodigy": 4}
_TABLE = 256 * _FLOAT  # what 8 bits stand for, saved with each state of them
_ENTRY = 256  # bytes of a tensor's name, shape and place in a file's header, at most
_BESIDE = 100_000  # what is remembered beside tensors, and the manifest
_EIGHT = {"adamw8bit": 2, "paged_adamw8bit": 2, "lion8bit": 1}


def state_bytes(train: Train, groups: Sequence[ParameterGroup]) -> list[int]:
    """Return the bytes of each tensor of the state, after the first step."""
    found = []
    for group in groups:
        for parameter in group.parameters:
            found += _of(train, tuple(parameter.shape), group.rows)
    return found


def saved_bytes(train: Train, groups: Sequence[ParameterGroup]) -> list[int]:
    """Return the bytes of each tensor of a checkpoint: weights that draw and train, and states."""
    weights = [_FLOAT * p.numel() for group in groups for p in group.parameters]
    averaged = train.ema is not None and train.ema_export
    both = train.optimizer == "schedulefree_adamw" or averaged  # others draw than train
    copies = 1 + both + (train.ema is not None)
    return [*weights * copies, *state_bytes(train, groups)]


def disk_bytes(train: Train, groups: Sequence[ParameterGroup]) -> int:
    """Return the bytes of a checkpoint's folder: those of `saved_bytes`, and what describes them.

    Never less than it is; more by what names are shorter than they may be.
    """
    held, shapes = saved_bytes(train, groups), [p.shape for g in groups for p in g.parameters]
    tables = _EIGHT.get(train.optimizer, 0) * sum(math.prod(shape) >= _SMALL for shape in shapes)
    # Of each parameter also its shape, how often it was stepped, and other numbers.
    entries = len(held) + tables + 4 * len(shapes)
    return sum(held) + _TABLE * tables + _ENTRY * entries + _BESIDE


def _of(train: Train, shape: tuple[int, ...], rows: bool) -> list[int]:
    name, count = train.optimizer, math.prod(shape)
    if copies := _WHOLE.get(name):
        return [_FLOAT * count] * copies
    if copies := _EIGHT.get(name):
        if count < _SMALL:
            return [_FLOAT * count] * copies
        return [count, _FLOAT * math.ceil(count / _BLOCK)] * copies
    if name == "muon":
        return [_FLOAT * count] * (1 if len(shape) == 2 and not rows else 2)
    assert name in ("adafactor", "came"), name
    factors = [math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1]))]
    second = [_FLOAT * size for size in factors] if len(shape) >= 2 else [_FLOAT * count]
    if name == "adafactor":
        first = train.optimizer_args.get("beta1") is not None
        return [*second, *([_FLOAT * count] if first else [])]
    # CAME keeps how steady the update is, in factors as well, beside the update itself.
    return [_FLOAT * count, *second, *(second if len(shape) >= 2 else [])]
