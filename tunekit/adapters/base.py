"""The contract of an adapter kind: what trains, and how it is named, saved and taken off again."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.errors import UserError, some

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from tunekit.families.base import Family
    from tunekit.optim import ParameterGroup
    from tunekit.schema import AdapterSettings

__all__ = ["Adapter", "WeightsAdapter", "match_modules"]


class Adapter(ABC):
    """Trainable parameters attached to a family's frozen modules; one instance is one attachment.

    The base's own tensors are never written: `detach` gives back the base bit for bit.
    """

    kind: ClassVar[str]
    """The registered name: the file's name, set by the class's definition."""
    Settings: ClassVar[type[AdapterSettings]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rpartition(".")[2]

    @classmethod
    @abstractmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        """Put trainable parameters into the denoiser, and into the text encoders if asked.

        Their first values depend on `seed` and the module's name alone. Raises UserError where the
        settings name modules that the family does not have.
        """

    @property
    @abstractmethod
    def trains_text_encoder(self) -> bool:
        """Whether prompts must be encoded anew in every step."""

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the live parameters under names that stay the same from version to version."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the same parameters, grouped by learning rate; the denoiser's come first."""

    @abstractmethod
    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors in a client's naming, and the metadata that describes them.

        float32 CPU tensors that share no memory with what trains, whatever `set_scale` says.
        Raises UserError for a layout that cannot carry this kind or this family.
        """

    @abstractmethod
    def changes(self) -> dict[str, Callable[[Family], Tensor]]:
        """Return what gives the change of each weight of a base: float32 on the CPU, of its shape.

        Under "component.module" for a module's weight and "component.module.bias" for its bias.
        The base is one that was not trained. They hold nothing of the base that was, and not this
        adapter: both may go.
        """

    @abstractmethod
    def set_scale(self, scale: float) -> None:
        """Draw with `scale` times what was learned: 1 as trained, 0 the untouched base."""

    @abstractmethod
    def train(self, mode: bool = True) -> None:
        """Switch what only training has, such as dropout, on or off. Attached, it is off."""

    def begin_step(self, step: int, steps: int) -> None:  # noqa: B027 - most need not know
        """Be told of each step (0 is the first) of `steps`, before its pictures are seen."""

    def end_step(self) -> None:  # noqa: B027
        """Be told that the optimizer has taken its step."""

    @abstractmethod
    def detach(self) -> None:
        """Take everything off: the family's modules are again what they were before `attach`."""

    def state(self) -> dict[str, Tensor]:
        """Return what was trained: float32 CPU copies under the names of `trained`."""
        from tunekit.parallel import whole

        held = self.trained().items()
        return {name: whole(p.detach()).float().cpu().clone() for name, p in held}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned; nothing is changed unless every tensor fits.

        Raises UserError that names tensors missing, unknown or of another shape.
        """
        import torch

        from tunekit.parallel import part_as

        own = self.trained()
        faults = [
            *_list("has no", own.keys() - state.keys()),
            *_list("holds unknown", state.keys() - own.keys()),
            *_list(
                "has another shape of",
                (
                    f"{name} ({tuple(state[name].shape)}, here {tuple(own[name].shape)})"
                    for name in own.keys() & state.keys()
                    if state[name].shape != own[name].shape
                ),
            ),
        ]
        if faults:
            raise UserError(
                f"the saved {self.kind} state does not fit this adapter: it {'; '.join(faults)}; "
                "it comes from another base or other adapter settings"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(part_as(state[name], parameter))

    def parameter_count(self) -> int:
        """Return how many numbers train."""
        return sum(p.numel() for p in self.trained().values())


class WeightsAdapter(Adapter):
    """A kind that trains the base's weights in their own places; its settings say `trains_weights`.

    Several processes can hold such weights in parts (`train.fsdp`).
    """

    @abstractmethod
    def retake(self) -> None:
        """Take up the parameters that now stand in the place of those that train: their parts.

        What only drawing and export need is let go.
        """


def _list(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{what} {some(found)}"] if found else []


def match_modules(
    module: nn.Module, patterns: Sequence[str], kinds: tuple[type[nn.Module], ...], key: str
) -> list[str]:
    """Return the sorted dotted names of submodules of the given kinds that a pattern names.

    A pattern is a regular expression for the end of a name, from a dot on: `to_q` and
    `attn2\\.to_(k|v)` both find `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`'s kin.
    Raises UserError, naming `key`, for a pattern that finds nothing.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, kinds)]
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", n)}
        if not hits:
            ends = sorted({_end(name) for name in names})
            raise UserError(
                f'{key}: "{pattern}" is the end of no module name of this base; '
                f"names end in {', '.join(ends[:24])}"
            )
        found |= hits
    return sorted(found)


def _end(name: str) -> str:
    """Return the last part of a dotted name, and the one before where the last is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
