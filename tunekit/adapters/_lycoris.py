"""Kinds of LyCORIS by peft's layers: products other than B A, read from kohya's naming."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tunekit import seeding
from tunekit.adapters._peft import NAME, PeftAdapter, Plan, Ranked
from tunekit.errors import UserError
from tunekit.schema import also

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunekit.families.base import Family


class LycorisSettings(Ranked):
    """Settings that all of them have."""

    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Chance that a layer's change is left out of a training step, 0 to 1 (1 "
        "excluded).",
        json_schema_extra=also("module_dropout"),
    )

    def layout_fault(self, layout: str) -> str | None:
        if layout == "kohya":
            return None
        return f"diffusers has no loader for {self.kind}: use kohya, which ComfyUI and tunekit read"

    def quantize_fault(self, kind: str) -> str | None:
        if kind != "nf4":
            return None
        return f"peft computes {self.kind} beside weights of a shape, and {kind} packs it away"


class LycorisAdapter(PeftAdapter):
    """A kind whose factors go into a file as they are, with an alpha."""

    @classmethod
    @abstractmethod
    def draw(cls, factor: str, first: Tensor, held: set[str], random: torch.Generator) -> None:
        """Fill `first` with a factor's first values; held: the factors that the layer has."""

    @classmethod
    def check(cls, family: Family, settings: Any, plan: Plan, ranks: Mapping[str, int]) -> None:
        for component, names in plan.items():
            for name in names:
                weight: Any = family.component(component).get_submodule(name).weight
                # packed, in no shape of its own
                if not weight.is_floating_point() and weight.shape[1] == 1:
                    raise UserError(
                        f"adapter.kind: {cls.kind} on packed weights such as {component}.{name} "
                        "is nothing that peft computes: hold the base in bf16, or choose another "
                        "kind"
                    )

    @classmethod
    def initialise(cls, layer: Any, settings: Any, seed: int, purpose: str) -> None:
        """Draw the factors, one of them zero, so that nothing changes at first."""
        import torch

        own = {factor for factor in cls.FACTORS if NAME in getattr(layer, factor)}
        for factor in sorted(own):
            parameter = getattr(layer, factor)[NAME]
            first = torch.empty(parameter.shape)
            with torch.no_grad():
                cls.draw(factor, first, own, seeding.generator(seed, f"{purpose}/{factor}"))
            # What trains is held in fp32, also on a base in half precision.
            parameter.data = first.to(parameter.device)

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        import torch

        if fault := self._settings.layout_fault(layout):
            raise UserError(f"export.layouts: {fault}")
        tensors: dict[str, Tensor] = {}
        for component, layers in self._layers.items():
            for name in layers:
                key = self._family.client_name(layout, component, name)
                own = {
                    factor: self._factors[component, name, factor].detach().float().cpu().clone()
                    for factor in self.FACTORS
                    if (component, name, factor) in self._factors
                }
                module = f"{component}.{name}"
                alpha, rank = self._alphas[module], self._ranks[module]
                alpha = self.settle(own, alpha, rank)
                tensors |= {f"{key}.{factor}": tensor for factor, tensor in own.items()}
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
        facts = self.facts() | self.kohya_facts("lycoris.kohya")
        return tensors, facts | {"ss_network_args": self.network_args()}

    def settle(self, factors: dict[str, Tensor], alpha: float, rank: int) -> float:
        """Return the alpha to write; what a reader would not multiply goes into the factors."""
        return alpha

    def network_args(self) -> str:
        """Return ss_network_args, a JSON object of strings."""
        import json

        return json.dumps({"algo": self.kind})
