"""Kinds that turn the outputs of layers and leave their lengths and angles as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tunekit.adapters._targets import Targeted, by_pattern, grouped
from tunekit.adapters.base import Adapter
from tunekit.errors import UserError, some
from tunekit.schema import also

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from tunekit.families.base import Family
    from tunekit.optim import ParameterGroup

_UNHELD = 1000.0  # what files call alpha holds turns below a length: above any that is learned
_PLACE = "tunekit_turn"


class RotationSettings(Targeted):
    """Settings that all of them have."""

    block_size: int = Field(
        8,
        ge=2,
        le=1024,
        description="How many outputs of a layer are turned together, 2 to 1024; it divides the "
        "width of every layer that changes. Larger ones learn more.",
        json_schema_extra=also("oft_block_size", "boft_block_size"),
    )

    def layout_fault(self, layout: str) -> str | None:
        if layout == "kohya":
            return None
        return f"diffusers has no loader for {self.kind}: use kohya, which ComfyUI and tunekit read"

    def unit(self) -> int:
        """Return what a layer's width must be a multiple of."""
        return self.block_size

    def shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of the blocks for a layer with so many outputs, without b, b."""
        return (width // self.block_size,)


class RotationAdapter(Adapter):
    """A layer's output W x becomes R W x: a parameter and a hook on the family's own module.

    The base is not touched, whatever it is held in. Biases are not turned.
    """

    def __init__(self, family: Family, settings: Any, modules: dict[tuple[str, str], Any]):
        self._family, self._settings, self._modules = family, settings, modules
        self._scale = 1.0
        plan: dict[str, list[str]] = {name: [] for name in settings.components(family)}
        for component, name in modules:
            plan[component].append(name)
        self._rates = by_pattern(plan, settings.learning_rate_scale, "learning_rate_scale")
        self._handles = [module.register_forward_hook(self._turn) for module in modules.values()]

    @staticmethod
    @abstractmethod
    def turned(turns: Tensor, rows: Tensor) -> Tensor:
        """Return how rows change: [..., b, b] (R - I) on [out, n]."""

    @classmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        import torch
        from torch import nn

        plan = settings.choose(family)
        by_pattern(plan, settings.learning_rate_scale, "learning_rate_scale")
        modules: dict[tuple[str, str], Any] = {
            (component, name): family.component(component).get_submodule(name)
            for component, names in plan.items()
            for name in names
        }
        unfit = [
            f"{component}.{name} ({_width(module)})"
            for (component, name), module in modules.items()
            if _width(module) % settings.unit()
        ]
        if unfit:
            raise UserError(
                f"adapter.block_size: blocks of {settings.block_size} need widths that are "
                f"multiples of {settings.unit()}, unlike {some(unfit)}"
            )
        size = settings.block_size
        for module in modules.values():
            assert not hasattr(module, _PLACE), "an adapter is attached already"
            angles = torch.zeros(*settings.shape(_width(module)), size * (size - 1) // 2)
            module.register_parameter(_PLACE, nn.Parameter(angles.to(module.weight.device)))
        return cls(family, settings, modules)

    @property
    def trains_text_encoder(self) -> bool:
        text: bool = self._settings.text_encoder
        return text

    def trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{component}.{name}.turn": getattr(module, _PLACE)
            for (component, name), module in self._modules.items()
        }

    def parameter_groups(self) -> list[ParameterGroup]:
        return grouped(
            [
                (component, getattr(module, _PLACE), self._rates.get(f"{component}.{name}", 1.0))
                for (component, name), module in self._modules.items()
            ],
            self._settings.components(self._family),
        )

    def _blocks(self, module: Any) -> Tensor:
        """Return a module's blocks as files hold them, above the diagonal: [..., b, b]."""
        return _blocks(getattr(module, _PLACE), self._settings.block_size)

    def _turn(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Turn a layer's output: a hook. [B, C, h, w] of a convolution, else [..., C]."""
        from tunekit.changes.deltas import cayley

        if not self._scale:
            return output
        channels = 1 if output.ndim == 4 and hasattr(module, "kernel_size") else -1
        straight = output.movedim(channels, -1)
        if module.bias is not None:
            straight = straight - module.bias
        rows = straight.flatten(0, -2).T.to(getattr(module, _PLACE).dtype)
        change = self.turned(cayley(self._blocks(module)), rows).T.reshape(straight.shape)
        return output + (change.movedim(-1, channels) * self._scale).to(output.dtype)

    def changes(self) -> dict[str, Callable[[Family], Tensor]]:
        turn = partial(_change, self.turned, self._settings.block_size, self._scale)
        return {
            f"{component}.{name}": partial(turn, getattr(module, _PLACE), component, name)
            for (component, name), module in self._modules.items()
        }

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        import json

        import torch

        if fault := self._settings.layout_fault(layout):
            raise UserError(f"export.layouts: {fault}")
        tensors = {}
        for (component, name), module in self._modules.items():
            key = self._family.client_name(layout, component, name)
            blocks = self._blocks(module).detach().float().cpu()
            if float((blocks - blocks.mT).norm()) >= _UNHELD:
                raise UserError(
                    f"{component}.{name} turned further than any reader follows: the training "
                    "broke down; take an earlier checkpoint, or lower train.learning_rate"
                )
            tensors[f"{key}.oft_blocks"] = blocks
            tensors[f"{key}.alpha"] = torch.tensor(_UNHELD)
        return tensors, {
            "tunekit.adapter": self.kind,
            "tunekit.components": ",".join(self._settings.components(self._family)),
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(self._settings.block_size),
            "ss_network_alpha": str(_UNHELD),
            "ss_network_args": json.dumps({"algo": self.algorithm()}),
        }

    @classmethod
    @abstractmethod
    def algorithm(cls) -> str:
        """Return LyCORIS' name of the kind."""

    def set_scale(self, scale: float) -> None:
        self._scale = scale

    def train(self, mode: bool = True) -> None:
        """Nothing here is only for training."""

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._modules.values():
            del module._parameters[_PLACE]
        self._modules, self._handles = {}, []


def _blocks(angles: Tensor, size: int) -> Tensor:
    import torch

    rows, columns = torch.triu_indices(size, size, 1, device=angles.device)
    blocks = angles.new_zeros(*angles.shape[:-1], size, size)
    blocks[..., rows, columns] = angles
    return blocks


def _change(
    turned: Callable[[Tensor, Tensor], Tensor],
    size: int,
    scale: float,
    angles: Tensor,
    component: str,
    name: str,
    family: Family,
) -> Tensor:
    """Return how turns change the weight of a module of `family`."""
    import torch

    from tunekit.changes.deltas import cayley
    from tunekit.changes.layers import bare, weight_of

    with torch.no_grad():
        weight = weight_of(bare(family.component(component).get_submodule(name))).float()
        change = turned(cayley(_blocks(angles, size)), weight.flatten(1))
    scaled: Tensor = change.reshape(weight.shape).cpu() * scale
    return scaled


def _width(module: Any) -> int:
    return int(getattr(module, "out_features", 0) or module.out_channels)
