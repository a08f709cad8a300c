"""What a loaded file is, whichever loader it went through, and how to leave no trace meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.families import Family


class VerificationError(UserError):
    """A check of an adapter file failed. `check` is its name, `said` what was found."""

    def __init__(self, check: str, said: str) -> None:
        super().__init__(f'verification failed at "{check}": {said}')
        self.check, self.said = check, said


class SetScale(Protocol):
    """Draws with `scale` times what is held; text: in the text encoders, None: there too."""

    def __call__(self, scale: float, text: float | None = None) -> None: ...


def scale_of(name: str, scale: float, text: float | None) -> float:
    """Return the strength of what "component.module" names."""
    return scale if text is None or name.startswith("denoiser.") else text


@dataclass(frozen=True, eq=False)
class Loaded:
    """A file at work in a family.

    tensors: how many of its tensors were taken up, alphas not counted: all. changes: what gives
    the present change of each weight, as `Adapter.changes`. rounding: how far, as a norm, the
    change of a weight moves where every number of the file is off by this much. set_scale: draw
    with this many times what the file holds; 0 is the untouched base. remove: take it off again;
    what was loaded later goes first.
    """

    tensors: int
    changes: Mapping[str, Callable[[], Tensor]]
    rounding: Callable[[str, float], float]
    set_scale: SetScale
    remove: Callable[[], None]


@contextlib.contextmanager
def undisturbed(family: Family, *others: nn.Module) -> Iterator[None]:
    """Compute as in inference and leave no trace: eval mode, no gradient, no autocast.

    Whatever was in training mode is again afterwards. The libraries' warnings are held back
    meanwhile: what they would say of an adapter or a prompt is checked here, or said by us.
    `others`: modules besides denoiser and text encoders.
    """
    import torch
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    components = [family.denoiser, *family.text_encoders.values(), *others]
    training = [m for component in components for m in component.modules() if m.training]
    levels = [log.get_verbosity() for log in logs]
    try:
        for module in training:
            module.training = False
        for log in logs:
            log.set_verbosity_error()
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        for module in training:
            module.training = True


def combined(parts: Sequence[Loaded]) -> Loaded:
    """Return several files, or several parts of one, as if they were one."""
    if len(parts) == 1:
        return parts[0]
    owners = {name: part for part in parts for name in part.changes}

    def set_scale(scale: float, text: float | None = None) -> None:
        for part in parts:
            part.set_scale(scale, text)

    def remove() -> None:
        for part in reversed(parts):
            part.remove()

    return Loaded(
        sum(part.tensors for part in parts),
        {name: change for part in parts for name, change in part.changes.items()},
        lambda name, floor: owners[name].rounding(name, floor),
        set_scale,
        remove,
    )
