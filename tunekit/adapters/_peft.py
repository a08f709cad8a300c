"""Kinds whose layers are peft's: how they get into a model, are saved, scaled and taken out."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from tunekit.adapters._targets import Targeted, by_pattern, grouped
from tunekit.adapters.base import Adapter
from tunekit.schema import also

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from tunekit.families.base import Family
    from tunekit.optim import ParameterGroup

NAME = "tunekit"  # what peft calls an adapter of ours inside the modules
Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0, le=4096)]
Plan = dict[str, list[str]]


class Ranked(Targeted):
    """Settings of a kind whose change of each weight has a rank."""

    rank: Rank = Field(
        16,
        description="Rank of the change to each weight, 1 to 1024: how much can be learned, and "
        "the size of the file.",
        json_schema_extra=also("r", "dim", "network_dim", "lora_rank", "linear"),
    )
    alpha: Alpha | None = Field(
        None,
        description="The change is multiplied with alpha / rank, above 0 to 4096; null: alpha = "
        "rank. Exported files say it in the way that their readers understand.",
        json_schema_extra=also("lora_alpha", "network_alpha", "linear_alpha"),
    )
    rank_pattern: Mapping[str, Rank] = Field(
        default_factory=dict,
        description="Another rank for the modules that a regular expression names: it matches the "
        r"end of a name such as denoiser.mid_block.attentions.0.proj_in, as `denoiser\.mid_block"
        r"\..*` and `proj_in` do.",
        json_schema_extra=also("rank_dict", "block_dims", "network_reg_dims"),
    )
    alpha_pattern: Mapping[str, Alpha] = Field(
        default_factory=dict,
        description="Another alpha for the modules that a regular expression names, as "
        "rank_pattern.",
        json_schema_extra=also("alpha_dict", "block_alphas"),
    )
    text_encoder_rank: Rank | None = Field(
        None,
        description="Rank in the text encoder, 1 to 1024, at the same alpha / rank; null: as rank.",
        json_schema_extra=also("text_encoder_dim"),
    )

    _text_only: ClassVar[tuple[str, ...]] = ("text_encoder_targets", "text_encoder_rank")

    def ranks(self, plan: Plan) -> dict[str, int]:
        """Return each module's rank, by "component.module"."""
        usual = {
            f"{component}.{name}": self.rank
            if component == "denoiser"
            else self.text_encoder_rank or self.rank
            for component, names in plan.items()
            for name in names
        }
        return usual | by_pattern(plan, self.rank_pattern, "rank_pattern")

    def alphas(self, plan: Plan) -> dict[str, float]:
        """Return each module's alpha, by "component.module"."""
        ranks = self.ranks(plan)
        usual = {}
        for name, rank in ranks.items():
            text = self.text_encoder_rank is not None and not name.startswith("denoiser.")
            # The text encoder's own rank is at the same alpha / rank.
            share = self.text_encoder_rank / self.rank if text and self.text_encoder_rank else 1.0
            usual[name] = float(rank) if self.alpha is None else self.alpha * share
        return usual | by_pattern(plan, self.alpha_pattern, "alpha_pattern")


class PeftAdapter(Adapter):
    """Layers of peft inside the family's own modules."""

    FACTORS: ClassVar[tuple[str, ...]]
    """The attributes of peft's layer that may hold parameters of an adapter."""

    def __init__(self, family: Family, settings: Any, layers: dict[str, dict[str, Any]]):
        from tunekit.changes.layers import strength_setter

        self._family = family
        self._settings = settings
        self._layers = layers  # component -> module name -> peft's layer
        self._plan: Plan = {component: list(made) for component, made in layers.items()}
        self._ranks = settings.ranks(self._plan)
        self._alphas = settings.alphas(self._plan)
        self._rates = by_pattern(self._plan, settings.learning_rate_scale, "learning_rate_scale")
        self._factors = self._find_factors()  # once: drawing may put others in their place
        self._setters = [
            strength_setter(layer, NAME) for made in layers.values() for layer in made.values()
        ]

    @classmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        # All patterns are resolved before anything is changed.
        plan = settings.choose(family)
        ranks, alphas = settings.ranks(plan), settings.alphas(plan)
        by_pattern(plan, settings.learning_rate_scale, "learning_rate_scale")
        components = settings.components(family)
        cls.check(family, settings, plan, ranks)
        layers = {
            component: _inject(
                components[component],
                names,
                lambda **shared: cls.config(settings, **shared),
                [ranks[f"{component}.{name}"] for name in names],
                [alphas[f"{component}.{name}"] for name in names],
            )
            for component, names in plan.items()
        }
        for component, made in layers.items():
            for name, layer in made.items():
                cls.initialise(layer, settings, seed, f"{cls.kind}/{component}/{name}")
        adapter = cls(family, settings, layers)
        adapter.train(False)
        return adapter

    @classmethod
    @abstractmethod
    def config(cls, settings: Any, **shared: Any) -> Any:
        """Return peft's configuration; shared: target_modules, rank_pattern and so on, and r."""

    @classmethod
    @abstractmethod
    def initialise(cls, layer: Any, settings: Any, seed: int, purpose: str) -> None:
        """Give the layer's parameters their first values, float32, from the seed and purpose."""

    @classmethod
    def check(cls, family: Family, settings: Any, plan: Plan, ranks: Mapping[str, int]) -> None:
        """Raise UserError where these settings do not suit these modules; nothing is changed."""

    @property
    def trains_text_encoder(self) -> bool:
        text: bool = self._settings.text_encoder
        return text

    def _find_factors(self) -> dict[tuple[str, str, str], nn.Parameter]:
        """Return (component, module, factor) -> the live parameter."""
        found = {}
        for component, layers in self._layers.items():
            for name, layer in layers.items():
                for factor in self.FACTORS:
                    held = getattr(layer, factor)
                    if NAME in held:
                        inner = held[NAME]
                        found[component, name, factor] = getattr(inner, "weight", inner)
        return found

    def trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{component}.{name}.{self.stored(factor)}": parameter
            for (component, name, factor), parameter in self._factors.items()
        }

    @classmethod
    def stored(cls, factor: str) -> str:
        """Return what a factor is called in a state."""
        return factor

    def rate_scale(self, factor: str) -> float:
        """Return the factor on the learning rate that all parameters of one name have."""
        return 1.0

    def parameter_groups(self) -> list[ParameterGroup]:
        return grouped(
            [
                (
                    component,
                    parameter,
                    self._rates.get(f"{component}.{name}", 1.0) * self.rate_scale(factor),
                )
                for (component, name, factor), parameter in self._factors.items()
            ],
            self._layers,
        )

    def changes(self) -> dict[str, Callable[[Family], Tensor]]:
        return {
            f"{component}.{name}": partial(_on, _apart(layer), self.change, component, name)
            for component, layers in self._layers.items()
            for name, layer in layers.items()
        }

    @classmethod
    def change(cls, layer: Any) -> Tensor:
        """Return what is added to a layer's weight, float32 on the CPU."""
        from tunekit.changes.layers import peft_change

        return peft_change(layer, NAME)

    def facts(self) -> dict[str, str]:
        """Return what metadata says of the tensors in every layout."""
        named = set(self._ranks.values())
        return {
            "tunekit.adapter": self.kind,
            "tunekit.rank": "Dynamic" if len(named) > 1 else str(*named),
            "tunekit.components": ",".join(self._layers),
        }

    def kohya_facts(self, network: str) -> dict[str, str]:
        """Return the metadata by which kohya's tools know a network's form."""
        settings = self._settings
        alpha = settings.rank if settings.alpha is None else settings.alpha
        return {
            "ss_network_module": network,
            "ss_network_dim": str(settings.rank),
            "ss_network_alpha": str(float(alpha)),
        }

    def set_scale(self, scale: float) -> None:
        for setter in self._setters:
            setter(scale)

    def train(self, mode: bool = True) -> None:
        for layers in self._layers.values():
            for layer in layers.values():
                layer.training = mode  # the layer's own flag: the base inside stays in eval mode

    def detach(self) -> None:
        for component, layers in self._layers.items():
            module = self._family.component(component)
            configs: Any = module.peft_config
            assert list(configs) == [NAME], f"another adapter is on top: {list(configs)}"
            for name, layer in layers.items():
                module.set_submodule(name, layer.get_base_layer())
            del module.peft_config
        self._layers = {}


def _apart(layer: Any) -> Any:
    """Return a peft layer that shares what learned, and holds no module of the base."""
    alone = copy.copy(layer)
    alone._modules = {k: part for k, part in layer._modules.items() if k != "base_layer"}
    return alone


def _on(
    alone: Any, change: Callable[[Any], Tensor], component: str, name: str, family: Family
) -> Tensor:
    """Return what such a layer adds to the weight of a module of `family`."""
    from tunekit.changes.layers import bare

    alone.base_layer = bare(family.component(component).get_submodule(name))
    try:
        return change(alone)
    finally:
        del alone.base_layer


def _inject(
    module: nn.Module,
    names: list[str],
    config: Callable[..., Any],
    ranks: list[int],
    alphas: list[float],
) -> dict[str, Any]:
    """Put peft's layers into the named submodules and return them by name."""
    import torch
    from peft import inject_adapter_in_model

    assert not getattr(module, "peft_config", None), "an adapter is attached already"
    usual, strength = ranks[0], alphas[0]
    shared = {
        "r": usual,
        # One expression for exactly these modules: peft takes a list as endings of names.
        "target_modules": "|".join(re.escape(name) for name in names),
        "rank_pattern": {
            f"^{re.escape(n)}": r for n, r in zip(names, ranks, strict=True) if r != usual
        },
        "alpha_pattern": {
            f"^{re.escape(n)}": a for n, a in zip(names, alphas, strict=True) if a != strength
        },
    }
    # peft draws first values from the global stream, on the CPU; ours follow.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config(alpha=strength, **shared), module, adapter_name=NAME)
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    for (name, layer), rank in zip(layers.items(), ranks, strict=True):
        assert NAME in layer.r, f"peft left {name} out"
        assert layer.r[NAME] == rank, (name, layer.r[NAME], rank)
    return layers
