"""Low-rank adaptation: a change of rank r beside each chosen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", by the peft library. A layer
computes W x + (alpha / rank) B A x; A starts random, B at zero, so nothing changes at first.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit import seeding
from tunekit.adapters.base import Adapter, match_modules
from tunekit.errors import UserError
from tunekit.optim import ParameterGroup
from tunekit.schema import AdapterSettings, also

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from tunekit.families.base import Family

_NAME = "tunekit"  # what peft calls this adapter inside the modules
Preset = Literal["attention", "attention+mlp", "full"]
Patterns = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class LoraSettings(AdapterSettings):
    """What `adapter: {kind: lora}` takes."""

    kind: Literal["lora"] = Field("lora", description="Low-rank adaptation (LoRA).")
    rank: int = Field(
        16,
        ge=1,
        le=1024,
        description="Rank of the change to each weight, 1 to 1024: how much can be learned, and "
        "the size of the file.",
        json_schema_extra=also("r", "dim", "network_dim", "lora_rank", "linear"),
    )
    alpha: float | None = Field(
        None,
        gt=0,
        le=4096,
        description="The change is multiplied with alpha / rank, above 0 to 4096; null: alpha = "
        "rank. Exported files have this multiplied in.",
        json_schema_extra=also("lora_alpha", "network_alpha", "linear_alpha"),
    )
    targets: Preset | Patterns = Field(
        "attention",
        description="Which weights of the denoiser change: `attention`, `attention+mlp`, `full` "
        "(these and the convolutions), or a list of regular expressions for the ends of module "
        "names, such as [attn2.to_k, attn2.to_v].",
        json_schema_extra=also("target_modules", "lora_layers", "network_args"),
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each layer's inputs hidden from the change in training, 0 to 1 "
        "(1 excluded).",
        json_schema_extra=also("lora_dropout", "network_dropout"),
    )
    text_encoder: bool = Field(
        False,
        description="Whether the text encoder learns too, at train.text_encoder_learning_rate.",
        json_schema_extra=also("train_text_encoder", "network_train_text_encoder"),
    )
    text_encoder_rank: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Rank in the text encoder, 1 to 1024, at the same alpha / rank; null: as rank.",
        json_schema_extra=also("text_encoder_dim"),
    )
    text_encoder_targets: Preset | Patterns | None = Field(
        None,
        description="Which weights of the text encoder change, as targets; null: the preset of "
        "targets, or `attention` where that is a list.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("targets", "text_encoder_targets"):
            value = getattr(self, field)
            for pattern in value if isinstance(value, tuple) else ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f'{field}: "{pattern}" is not a regular expression: {error}'
                    ) from None
        if not self.text_encoder:
            for field in ("text_encoder_rank", "text_encoder_targets"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} is set, but text_encoder is false")
        return self

    def trains_text_encoder(self) -> bool:
        return self.text_encoder

    def scaling(self) -> float:
        """Return alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Lora(Adapter):
    """LoRA layers of peft inside the family's own modules."""

    Settings: ClassVar[type[AdapterSettings]] = LoraSettings

    def __init__(self, family: Family, settings: LoraSettings, layers: dict[str, dict[str, Any]]):
        self._family = family
        self._settings = settings
        self._layers = layers  # component -> module name -> peft's layer

    @classmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        assert isinstance(settings, LoraSettings), settings
        components = {"denoiser": family.denoiser}
        if settings.text_encoder:
            components |= family.text_encoders
        # All patterns are resolved before anything is changed.
        plans = {name: _plan(family, settings, name, module) for name, module in components.items()}
        layers = {
            name: _inject(module, *plans[name], settings) for name, module in components.items()
        }
        for component, made in layers.items():
            for name, layer in made.items():
                _initialise(layer, seed, f"lora/{component}/{name}")
        adapter = cls(family, settings, layers)
        adapter.train(False)
        return adapter

    @property
    def trains_text_encoder(self) -> bool:
        return self._settings.text_encoder

    def _factors(self) -> dict[tuple[str, str, str], nn.Parameter]:
        """Return (component, module, "lora_A" or "lora_B") -> the factor's weight."""
        return {
            (component, name, factor): getattr(layer, factor)[_NAME].weight
            for component, layers in self._layers.items()
            for name, layer in layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{component}.{name}.{factor}.weight": weight
            for (component, name, factor), weight in self._factors().items()
        }

    def parameter_groups(self) -> list[ParameterGroup]:
        factors = self._factors()
        return [
            ParameterGroup(
                component,
                [weight for (of, _, _), weight in factors.items() if of == component],
                "learning_rate" if component == "denoiser" else "text_encoder_learning_rate",
            )
            for component in self._layers
        ]

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        if layout != "diffusers":
            raise UserError(f'export.layouts: {self.kind} is not written as "{layout}" yet')
        settings = self._settings
        tensors = {}
        for (component, name, factor), weight in self._factors().items():
            # The factor alpha / rank goes into B and the file says nothing of alpha: then every
            # reader, with or without diffusers' own metadata, takes alpha = rank and is right.
            scaling = settings.scaling() if factor == "lora_B" else 1.0
            key = f"{self._family.client_name(layout, component, name)}.{factor}.weight"
            tensors[key] = weight.detach().float().cpu().clone() * scaling
        metadata = {
            "tunekit.adapter": self.kind,
            "tunekit.rank": str(settings.rank),
            "tunekit.trained_alpha": str(settings.rank * settings.scaling()),
            "tunekit.components": ",".join(self._layers),
        }
        return tensors, metadata

    def set_scale(self, scale: float) -> None:
        for layers in self._layers.values():
            for layer in layers.values():
                layer.set_scale(_NAME, scale)

    def train(self, mode: bool = True) -> None:
        if not self._settings.dropout:
            return  # hundreds of layers, and nothing in them to switch
        for layers in self._layers.values():
            for layer in layers.values():
                layer.lora_dropout[_NAME].train(mode)

    def detach(self) -> None:
        for component, layers in self._layers.items():
            module = self._family.component(component)
            configs: Any = module.peft_config
            assert list(configs) == [_NAME], f"another adapter is on top: {list(configs)}"
            for name, layer in layers.items():
                module.set_submodule(name, layer.get_base_layer())
            del module.peft_config
        self._layers = {}


def _plan(
    family: Family, settings: LoraSettings, component: str, module: nn.Module
) -> tuple[list[str], int]:
    """Return the names of the modules to change in a component, and the rank."""
    from torch import nn

    if component == "denoiser":
        chosen, rank, presets = settings.targets, settings.rank, family.lora_presets
        key = "adapter.targets"
    else:
        fallback = settings.targets if isinstance(settings.targets, str) else "attention"
        chosen = settings.text_encoder_targets or fallback
        rank = settings.text_encoder_rank or settings.rank
        presets = family.text_lora_presets
        key = "adapter.text_encoder_targets"
    patterns = presets[chosen] if isinstance(chosen, str) else chosen
    return match_modules(module, patterns, (nn.Linear, nn.Conv2d), key), rank


def _inject(
    module: nn.Module, names: list[str], rank: int, settings: LoraSettings
) -> dict[str, Any]:
    """Put peft's layers into the named submodules and return them by name."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    assert not getattr(module, "peft_config", None), "an adapter is attached already"
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * settings.scaling(),
        lora_dropout=settings.dropout,
        # One expression for exactly these modules: peft takes a list as endings of names.
        target_modules="|".join(re.escape(name) for name in names),
    )
    # peft draws first values from the global stream, on the CPU; ours follow.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module, adapter_name=_NAME)
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():
        assert _NAME in layer.r, f"peft left {name} out"
    return layers


def _initialise(layer: Any, seed: int, purpose: str) -> None:
    """Draw A as torch draws a Linear's weight, from the seed and the module's name; B is zero."""
    import torch
    from torch import nn

    # What trains is held in fp32, also on a base in half precision.
    a, b = layer.lora_A[_NAME].float().weight, layer.lora_B[_NAME].float().weight
    first = torch.empty(a.shape)
    nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=seeding.generator(seed, purpose))
    with torch.no_grad():
        a.copy_(first)
        b.zero_()
