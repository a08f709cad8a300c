"""The weights themselves: the whole denoiser, or chosen parts of it, learn without a detour.

Ruiz et al. 2023, "DreamBooth" (the whole denoiser); Kumari et al. 2023, "Custom Diffusion" (keys
and values of cross-attention alone: targets [attn2.to_k, attn2.to_v]). Copies train; what is
exported is the difference to the base, which keeps its digits in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunekit.adapters._targets import Patterns, Preset, Targeted, by_pattern, grouped
from tunekit.adapters.base import WeightsAdapter, match_modules
from tunekit.errors import UserError
from tunekit.schema import AdapterSettings, also

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from tunekit.families.base import Family
    from tunekit.optim import ParameterGroup

_FACTORS = {"weight": "diff", "bias": "diff_b"}  # what files call the two differences


class FullSettings(Targeted):
    """What `adapter: {kind: full}` takes."""

    kind: Literal["full"] = Field("full", description="The weights themselves learn.")
    targets: Literal["all"] | Preset | Patterns = Field(  # type: ignore[assignment]
        "all",
        description="What learns in the denoiser: `all` of it, the weights and biases of "
        "`attention`, `attention+mlp` or `full` (these and the convolutions), or a list of "
        "regular expressions for the ends of module names: [attn2.to_k, attn2.to_v] is Custom "
        "Diffusion.",
        json_schema_extra=also("target_modules", "trainable_modules"),
    )
    text_encoder_targets: Preset | Patterns | None = Field(
        None,
        description="What learns in the text encoder, as targets; null: its attention and MLPs, "
        "which are all that files can hold.",
    )

    trains_weights: ClassVar[bool] = True

    def layout_fault(self, layout: str) -> str | None:
        if layout == "kohya":
            return None
        return (
            "diffusers has no loader for differences of whole weights: use kohya, which ComfyUI, "
            "A1111 and tunekit read"
        )

    def quantize_fault(self, kind: str) -> str | None:
        return (
            f"{kind} leaves the weights too few digits to learn themselves: leave it out, or "
            "choose an adapter kind that learns beside them"
        )

    def choose(self, family: Family) -> dict[str, list[str]]:
        """Return the names of the modules that learn, by component; UserError as usual."""
        plan = {}
        for component, module in self.components(family).items():
            owners = {n: m for n, m in module.named_modules() if _own(m)}
            if component == "denoiser":
                chosen, presets, key = self.targets, family.presets, "adapter.targets"
                if chosen == "all":
                    plan[component] = sorted(owners)
                    continue
            else:
                chosen = self.text_encoder_targets or "full"
                presets = family.text_presets(component)
                key = "adapter.text_encoder_targets"
            patterns = presets[chosen] if isinstance(chosen, str) else chosen
            plan[component] = match_modules(
                module, patterns, tuple({type(m) for m in owners.values()}), key
            )
        return plan


class Full(WeightsAdapter):
    """Copies of the chosen modules' parameters, in the places of the base's own."""

    Settings: ClassVar[type[AdapterSettings]] = FullSettings

    def __init__(self, family: Family, settings: FullSettings, plan: dict[str, list[str]]):
        from torch import nn

        self._family, self._settings, self._scale = family, settings, 1.0
        self._components = tuple(plan)
        self._rates = by_pattern(plan, settings.learning_rate_scale, "learning_rate_scale")
        # (component, module, parameter) -> the module, the base's parameter, the one that learns
        self._held: dict[tuple[str, str, str], tuple[nn.Module, Any, nn.Parameter]] = {}
        for component, names in plan.items():
            for name in names:
                module = family.component(component).get_submodule(name)
                for which, before in _own(module).items():
                    copy = nn.Parameter(before.detach().clone())
                    self._held[component, name, which] = (module, before, copy)
        self.set_scale(1.0)

    @classmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        import torch

        assert isinstance(settings, FullSettings), settings
        plan = settings.choose(family)
        by_pattern(plan, settings.learning_rate_scale, "learning_rate_scale")
        for component, names in plan.items():
            for name in names:
                module = family.component(component).get_submodule(name)
                for which, before in _own(module).items():
                    assert not before.requires_grad, "an adapter is attached already"
                    if before.dtype != torch.float32:
                        raise UserError(
                            f"base.dtype: {component}.{name}.{which} is held in "
                            f"{str(before.dtype).removeprefix('torch.')}, and weights that learn "
                            "themselves need all their digits: set base.dtype: fp32 (and "
                            "train.precision: bf16, to be fast), and no quantized base"
                        )
                    if which not in _FACTORS:
                        raise UserError(
                            f"adapter.targets: {component}.{name} has a parameter {which}, which "
                            "no adapter file can hold: choose other targets"
                        )
        return cls(family, settings, plan)

    @property
    def trains_text_encoder(self) -> bool:
        return self._settings.text_encoder

    def trained(self) -> dict[str, nn.Parameter]:
        return {".".join(place): own for place, (_, _, own) in self._held.items()}

    def parameter_groups(self) -> list[ParameterGroup]:
        return grouped(
            [
                (component, own, self._rates.get(f"{component}.{name}", 1.0))
                for (component, name, _), (_, _, own) in self._held.items()
            ],
            self._components,
        )

    def _differences(self) -> dict[tuple[str, str, str], Callable[[], Tensor]]:
        """Return what gives each change at strength 1, of parameters that did change."""
        return {
            place: partial(_difference, before, own)
            for place, (_, before, own) in self._held.items()
            if not own.equal(before)
        }

    def changes(self) -> dict[str, Callable[[Family], Tensor]]:
        return {
            f"{component}.{name}{'' if which == 'weight' else f'.{which}'}": partial(
                _since, self._held[component, name, which][2], self._scale, component, name, which
            )
            for component, name, which in self._differences()
        }

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        if fault := self._settings.layout_fault(layout):
            raise UserError(f"export.layouts: {fault}")
        tensors = {
            f"{self._family.client_name(layout, component, name)}.{_FACTORS[which]}": change()
            for (component, name, which), change in self._differences().items()
        }
        return tensors, {
            "tunekit.adapter": self.kind,
            "tunekit.components": ",".join(self._components),
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"algo": self.kind}),
        }

    def set_scale(self, scale: float) -> None:
        from torch import nn

        self._scale = scale
        for (_, _, which), (module, before, own) in self._held.items():
            put: Any = own if scale == 1 else before
            if scale not in (0, 1):
                between = before + scale * (own.detach() - before)
                put = nn.Parameter(between, requires_grad=False)
            setattr(module, which, put)

    def train(self, mode: bool = True) -> None:
        """Nothing here is only for training."""

    def retake(self) -> None:
        self._held = {
            place: (module, None, getattr(module, place[-1]))
            for place, (module, _, _) in self._held.items()
        }

    def detach(self) -> None:
        for (_, _, which), (module, before, _) in self._held.items():
            setattr(module, which, before)
        self._held = {}


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that are not those of its submodules."""
    return dict(module.named_parameters(recurse=False))


def _difference(before: Tensor, own: Tensor) -> Tensor:
    return (own.detach() - before.detach()).float().cpu()


def _since(
    own: Tensor, scale: float, component: str, name: str, which: str, family: Family
) -> Tensor:
    """Return what was learned since a base that was not trained: `scale` times as strong."""
    from tunekit.changes.layers import bare, untouched

    module = bare(family.component(component).get_submodule(name))
    return _difference(untouched(module, which), own) * scale
