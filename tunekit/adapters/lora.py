"""Low-rank adaptation: a change of rank r beside each chosen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", by the peft library. A layer
computes W x + (alpha / rank) B A x; A starts random, B at zero, so nothing changes at first.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit import seeding
from tunekit.adapters import _starts
from tunekit.adapters._peft import NAME, PeftAdapter, Plan, Ranked
from tunekit.changes.joined import by_module, join
from tunekit.errors import UserError
from tunekit.schema import AdapterSettings, also

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from tunekit.families.base import Family

_STARTED = ("pissa", "olora")  # these add something to the weight from the start on
_MAGNITUDE = "lora_magnitude_vector"
_DOWN = ".lora_A.weight"


class LoraSettings(Ranked):
    """What `adapter: {kind: lora}` takes."""

    kind: Literal["lora"] = Field("lora", description="Low-rank adaptation (LoRA).")
    dora: bool = Field(
        False,
        description="Whether each output's magnitude learns apart from its direction (DoRA, Liu "
        "et al. 2024). Only files in the diffusers layout draw it as it was trained.",
        json_schema_extra=also("use_dora", "dora_wd", "weight_decompose"),
    )
    rslora: bool = Field(
        False,
        description="Whether the change is multiplied with alpha / sqrt(rank) in place of alpha / "
        "rank (rsLoRA, Kalajdzievski 2023), so that high ranks learn as fast as low ones. "
        "Exported so that every client draws it right.",
        json_schema_extra=also("use_rslora", "rs_lora", "rank_stabilized"),
    )
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = Field(
        "default",
        description="Where the factors start: `default` (A as a layer's weights, B zero), "
        "`gaussian` (A normal, B zero), `pissa` or `olora` (in the weight's own strongest "
        "directions), `orthogonal` (both random, product zero; an even rank).",
        json_schema_extra=also("init_lora_weights", "init_weights"),
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each layer's inputs hidden from the change in training, 0 to 1 "
        "(1 excluded).",
        json_schema_extra=also("lora_dropout", "network_dropout"),
    )
    rank_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the ranks left out of each layer and picture in training, 0 to 1 "
        "(1 excluded); the others are strengthened to make up for them.",
    )
    loraplus_ratio: float = Field(
        1.0,
        ge=1,
        le=1000,
        description="How many times the learning rate B learns at (LoRA+, Hayou et al. 2024), 1 "
        "to 1000, usually 16.",
        json_schema_extra=also("loraplus_lr_ratio", "lora_plus_ratio"),
    )

    @model_validator(mode="after")
    def _suits(self) -> Self:
        if self.dora and self.init in _STARTED:
            raise ValueError(
                f"init {self.init} starts beside the weight and dora learns the magnitude of both "
                "together, which no file holds: choose init default or gaussian, or dora false"
            )
        if self.dora and self.rank_dropout:
            raise ValueError(
                "rank_dropout is not computed with dora, whose magnitude would answer to ranks "
                "that are left out: use dropout"
            )
        if self.init in _STARTED and (self.dropout or self.rank_dropout):
            raise ValueError(
                f"init {self.init} starts in the weight's own directions, and dropout would hide "
                "a part of the weight itself: leave one of them out"
            )
        ranks = [self.rank, self.text_encoder_rank or 2, *self.rank_pattern.values()]
        odd = [rank for rank in ranks if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init orthogonal needs even ranks, not {odd[0]}")
        return self

    def layout_fault(self, layout: str) -> str | None:
        if layout == "kohya" and self.dora:
            return (
                "no client draws dora from kohya's naming as it was trained (diffusers drops the "
                "magnitude, ComfyUI divides by another norm, 10 to 16 % off): use diffusers"
            )
        return None


class Lora(PeftAdapter):
    """LoRA layers of peft inside the family's own modules."""

    Settings: ClassVar[type[AdapterSettings]] = LoraSettings
    FACTORS = ("lora_A", "lora_B", _MAGNITUDE)

    def __init__(self, family: Family, settings: Any, layers: dict[str, dict[str, Any]]):
        super().__init__(family, settings, layers)
        self._dropping = _RankDropout(settings.rank_dropout)
        if settings.rank_dropout:
            for made in layers.values():
                for layer in made.values():
                    layer.lora_A[NAME].register_forward_hook(self._dropping)

    @classmethod
    def config(cls, settings: Any, **shared: Any) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            lora_alpha=shared.pop("alpha"),
            lora_dropout=settings.dropout,
            use_dora=settings.dora,
            use_rslora=settings.rslora,
            **shared,
        )

    @classmethod
    def check(cls, family: Family, settings: Any, plan: Plan, ranks: Mapping[str, int]) -> None:
        for full, rank in ranks.items():
            component, _, name = full.partition(".")
            module: Any = family.component(component).get_submodule(name)
            into = getattr(module, "in_features", 0) or math.prod(module.weight.shape[1:])
            out = getattr(module, "out_features", 0) or module.weight.shape[0]
            limit = _starts.most(settings.init, (out, into))
            if limit is not None and rank > limit:
                raise UserError(
                    f"adapter.rank: init {settings.init} takes the directions of the weight, and "
                    f"{full} has {limit}, fewer than {rank}: lower the rank, or set another for "
                    "it in adapter.rank_pattern"
                )

    @classmethod
    def initialise(cls, layer: Any, settings: Any, seed: int, purpose: str) -> None:
        """Draw A from the seed and the module's name; B is zero, or both are where they start."""
        import torch
        from torch import nn

        # What trains is held in fp32, also on a base in half precision.
        a, b = layer.lora_A[NAME].float().weight, layer.lora_B[NAME].float().weight
        random = seeding.generator(seed, purpose)
        with torch.no_grad():
            if settings.init in _STARTED:
                _start(layer, settings.init)
                return
            b.zero_()
            if settings.init == "orthogonal":
                _put(layer, _starts.orthogonal(a.flatten(1).shape[1], len(b), len(a), random))
            elif settings.init == "gaussian":
                first = torch.empty(a.shape)
                a.copy_(nn.init.normal_(first, std=1 / layer.r[NAME], generator=random))
            else:
                first = torch.empty(a.shape)
                a.copy_(nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=random))
            if settings.dora:
                layer.lora_magnitude_vector[NAME].float()

    @classmethod
    def stored(cls, factor: str) -> str:
        return f"{factor}.weight"

    def rate_scale(self, factor: str) -> float:
        ratio: float = self._settings.loraplus_ratio if factor == "lora_B" else 1.0
        return ratio

    def _scaling(self, module: str) -> float:
        """Return what B A is multiplied with, whatever `set_scale` says."""
        rank = self._ranks[module]
        rslora: bool = self._settings.rslora
        alpha: float = self._alphas[module]
        return alpha / (math.sqrt(rank) if rslora else rank)

    def _exported(self, component: str, name: str) -> tuple[Tensor, Tensor, float]:
        """Return A, B and what their product is multiplied with: float32 CPU copies."""
        a, b = (
            self._factors[component, name, factor].detach().float().cpu().clone()
            for factor in ("lora_A", "lora_B")
        )
        scaling = self._scaling(f"{component}.{name}")
        start = getattr(self._layers[component][name], "start", None)
        if start is None:
            return a, b, scaling
        a0, b0 = (factor.cpu() for factor in start)
        down, up = _starts.difference(
            a.flatten(1), scaling * b.flatten(1), a0.flatten(1), scaling * b0.flatten(1)
        )
        return down.reshape(-1, *a.shape[1:]), up.reshape(len(up), -1, *b.shape[2:]), 1.0

    def _common_alpha(self) -> float:
        """Return the one alpha of a file's modules; what differs from it goes into B.

        diffusers 0.42 looks for another alpha than the usual one of a file under attention modules'
        former names, does not find it, and takes the usual one.
        """
        alphas = {
            scaling * len(a)
            for component, layers in self._layers.items()
            for a, _, scaling in (self._exported(component, name) for name in layers)
        }
        return alphas.pop() if len(alphas) == 1 else float(self._settings.rank)

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        import torch

        kohya = layout == "kohya"
        if fault := self._settings.layout_fault(layout):
            raise UserError(f"export.layouts: {fault}")
        tensors: dict[str, Tensor] = self._joined() if kohya else {}
        joined = by_module(self._family.joints) if kohya else {}
        common = self._common_alpha()
        for component, layers in self._layers.items():
            for name in layers:
                if component == "denoiser" and name in joined:
                    continue
                key = self._family.client_name(layout, component, name)
                a, b, scaling = self._exported(component, name)
                if kohya:
                    # Everyone multiplies with alpha / rank, also where it was alpha / sqrt(rank).
                    tensors[f"{key}.lora_down.weight"] = a
                    tensors[f"{key}.lora_up.weight"] = b * (scaling * len(a) / common)
                    tensors[f"{key}.alpha"] = torch.tensor(common)
                    continue
                # The factor goes into B: then every reader, with or without diffusers' own
                # metadata, takes alpha = rank and is right.
                tensors[f"{key}.lora_A.weight"] = a
                tensors[f"{key}.lora_B.weight"] = b * scaling
                magnitude = self._factors.get((component, name, _MAGNITUDE))
                if magnitude is not None:
                    # transformers looks for it under another name than diffusers
                    end = "" if component == "denoiser" else ".weight"
                    tensors[f"{key}.{_MAGNITUDE}{end}"] = magnitude.detach().float().cpu().clone()
        facts = self.facts()
        if kohya:
            facts |= self.kohya_facts("networks.lora")
        else:
            facts["lora_adapter_metadata"] = _said_to_diffusers(tensors)
        return tensors, facts

    def _joined(self) -> dict[str, Tensor]:
        """Return the tensors of modules that sd-scripts joins, or calls by its own names."""
        import torch

        tensors = {}
        own = self._layers.get("denoiser", {})
        for joint in self._family.joints:
            held, scales = {}, {}
            for module in joint.modules:
                if module in own:
                    down, up, scales[module] = self._exported("denoiser", module)
                    held[module] = {"down": down, "up": up}
            if not held:
                continue
            made, scale = join(joint, held, scales)
            tensors[f"{joint.kohya}.lora_down.weight"] = made["down"]
            tensors[f"{joint.kohya}.lora_up.weight"] = made["up"]
            tensors[f"{joint.kohya}.alpha"] = torch.tensor(scale * len(made["down"]))
        return tensors

    def facts(self) -> dict[str, str]:
        # In the terms of alpha / rank, which is what files are read by.
        first = next(iter(self._ranks))
        trained = self._settings.rank * self._scaling(first)
        return super().facts() | {"tunekit.trained_alpha": str(trained)}

    @classmethod
    def change(cls, layer: Any) -> Tensor:
        delta = super().change(layer)
        start = getattr(layer, "start", None)
        if start is None:
            return delta
        a0, b0 = (factor.cpu().flatten(1) for factor in start)
        less: Tensor = delta - (b0 @ a0).reshape(delta.shape) * layer.scaling[NAME]
        return less

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self._dropping.training = mode
        if self._settings.dropout:
            for layers in self._layers.values():
                for layer in layers.values():
                    layer.lora_dropout[NAME].train(mode)


class _RankDropout:
    """Leaves out ranks in training: a hook on A that knows nothing of the base."""

    def __init__(self, share: float) -> None:
        self._share, self.training = share, False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return A's output: [B, C, h, w] of a convolution, else [B, ..., rank]."""
        from torch.nn import functional

        if not self.training:
            return output
        if output.ndim == 4:
            return functional.dropout2d(output, self._share)
        mask = output.new_ones(len(output), *[1] * (output.ndim - 2), output.shape[-1])
        return output * functional.dropout(mask, self._share)


def _put(layer: Any, factors: tuple[Tensor, Tensor]) -> None:
    for factor, value in zip(("lora_A", "lora_B"), factors, strict=True):
        parameter = getattr(layer, factor)[NAME].weight
        parameter.copy_(value.reshape(parameter.shape))


def _start(layer: Any, init: str) -> None:
    """Let the factors start in the weight itself, and take off what they add at first."""
    from tunekit.changes.layers import weight_of

    weight, rank = weight_of(layer.get_base_layer()), layer.r[NAME]
    _put(layer, _starts.directions(init, weight, rank, layer.scaling[NAME]))
    layer.start = tuple(
        getattr(layer, factor)[NAME].weight.detach().clone() for factor in ("lora_A", "lora_B")
    )
    layer.register_forward_hook(_without_start)


def _without_start(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Take off what the first factors add: a hook on peft's layer."""
    from torch.nn import functional

    from tunekit.changes.layers import apply

    a0, b0 = layer.start
    inner = apply(layer.get_base_layer(), a0, args[0].to(a0.dtype))
    added = functional.conv2d(inner, b0) if b0.ndim == 4 else functional.linear(inner, b0)
    less: Tensor = output - (added * layer.scaling[NAME]).to(output.dtype)
    return less


def _said_to_diffusers(tensors: Mapping[str, Tensor]) -> str:
    """Return diffusers' adapter metadata of tensors in its naming: peft's settings, alpha = rank.

    They are what diffusers finds in the tensors without it: the metadata must not say more.
    """
    ranks: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        if key.endswith(_DOWN):
            component, _, module = key.removesuffix(_DOWN).partition(".")
            # Text encoders have this level in files; in memory it depends on the library's version.
            ranks.setdefault(component, {})[module.removeprefix("text_model.")] = len(tensor)
    dora = any(_MAGNITUDE in key for key in tensors)
    told: dict[str, Any] = {}
    for component, modules in ranks.items():
        rank = statistics.mode(modules.values())
        # peft takes a pattern for any name that ends so: FLUX's proj_out for those of its blocks.
        start = "" if component.startswith("text_encoder") else "^"
        others = {f"{start}{module}": own for module, own in modules.items() if own != rank}
        told |= {
            f"{component}.{name}": value
            for name, value in {
                "r": rank,
                "lora_alpha": rank,
                "rank_pattern": others,
                "alpha_pattern": others,
                "target_modules": sorted(modules),
                "use_dora": dora,
            }.items()
        }
    return json.dumps(told, sort_keys=True)
