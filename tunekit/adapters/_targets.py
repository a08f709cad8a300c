"""Which modules an adapter changes, and what patterns of module names say of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from tunekit.adapters.base import match_modules
from tunekit.errors import UserError
from tunekit.optim import ParameterGroup
from tunekit.schema import AdapterSettings, also

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

    from tunekit.families.base import Family

T = TypeVar("T")
Preset = Literal["attention", "attention+mlp", "full"]
Patterns = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Factor = Annotated[float, Field(gt=0, le=1000)]


def expression(pattern: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f'"{pattern}" is not a regular expression: {error}') from None
    return pattern


class Targeted(AdapterSettings):
    """Settings of a kind that changes chosen modules."""

    targets: Preset | Patterns = Field(
        "attention",
        description="Which weights of the denoiser change: `attention`, `attention+mlp`, `full` "
        "(these and the convolutions), or a list of regular expressions for the ends of module "
        "names, such as [attn2.to_k, attn2.to_v].",
        json_schema_extra=also("target_modules", "lora_layers", "network_args"),
    )
    text_encoder: bool = Field(
        False,
        description="Whether the text encoder learns too, at train.text_encoder_learning_rate.",
        json_schema_extra=also("train_text_encoder", "network_train_text_encoder"),
    )
    text_encoder_targets: Preset | Patterns | None = Field(
        None,
        description="Which weights of the text encoder change, as targets; null: the preset of "
        "targets, or `attention` where that is a list.",
    )
    learning_rate_scale: Mapping[str, Factor] = Field(
        default_factory=dict,
        description="Factor on the learning rate of the modules that a regular expression names, "
        "above 0 to 1000, such as {attn2.to_v: 2}; see rank_pattern for what it matches.",
        json_schema_extra=also("block_lr", "layerwise_lr"),
    )

    _text_only: ClassVar[tuple[str, ...]] = ("text_encoder_targets",)
    """Settings that mean nothing while text_encoder is false."""

    @field_validator("targets", "text_encoder_targets")
    @classmethod
    def _expressions(cls, value: Any) -> Any:
        for pattern in value if isinstance(value, tuple) else ():
            expression(pattern)
        return value

    @field_validator("learning_rate_scale", "rank_pattern", "alpha_pattern", check_fields=False)
    @classmethod
    def _keys(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for pattern in value:
            expression(pattern)
        return value

    @model_validator(mode="after")
    def _needs_text_encoder(self) -> Self:
        if not self.text_encoder:
            for field in self._text_only:
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} is set, but text_encoder is false")
        return self

    def trains_text_encoder(self) -> bool:
        return self.text_encoder

    def components(self, family: Family) -> dict[str, nn.Module]:
        """Return the components that change, by name; the denoiser first."""
        found = {"denoiser": family.denoiser}
        return found | (family.teachable if self.text_encoder else {})

    def choose(self, family: Family) -> dict[str, list[str]]:
        """Return the names of the Linears and convolutions that change, by component.

        Raises UserError for a pattern that finds nothing; changes nothing.
        """
        from torch import nn

        plan = {}
        for component, module in self.components(family).items():
            text = component != "denoiser"
            key = "adapter.text_encoder_targets" if text else "adapter.targets"
            presets = family.text_presets(component) if text else family.presets
            fallback = self.targets if isinstance(self.targets, str) else "attention"
            chosen = (self.text_encoder_targets or fallback) if text else self.targets
            patterns = presets[chosen] if isinstance(chosen, str) else chosen
            plan[component] = match_modules(module, patterns, (nn.Linear, nn.Conv2d), key)
        return plan


def by_pattern(
    plan: Mapping[str, Iterable[str]], values: Mapping[str, T], key: str
) -> dict[str, T]:
    """Return what patterns say of modules: {"component.module": value} for those that one names.

    A pattern is a regular expression for the end of "component.module", from a dot on. Raises
    UserError, naming `key`, where one finds none of the plan's modules or two say different things.
    """
    names = [f"{component}.{name}" for component, found in plan.items() for name in found]
    said: dict[str, T] = {}
    by: dict[str, str] = {}
    for pattern, value in values.items():
        hits = [name for name in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)]
        if not hits:
            raise UserError(
                f'adapter.{key}: "{pattern}" is the end of no name among the modules that change, '
                f"such as {names[0]}"
            )
        for name in hits:
            if name in said and said[name] != value:
                raise UserError(
                    f'adapter.{key}: "{by[name]}" and "{pattern}" both name {name} and say '
                    f"{said[name]} and {value}: make one of them narrower"
                )
            said[name], by[name] = value, pattern
    return said


def grouped(
    parameters: Sequence[tuple[str, nn.Parameter, float]], components: Iterable[str]
) -> list[ParameterGroup]:
    """Return parameters by component and factor on the learning rate; the denoiser's come first.

    parameters: (component, parameter, factor).
    """
    groups = []
    for component in components:
        own = [(p, scale) for of, p, scale in parameters if of == component]
        rate: Any = "learning_rate" if component == "denoiser" else "text_encoder_learning_rate"
        for scale in sorted({scale for _, scale in own}, key=lambda scale: (scale != 1, scale)):
            name = component if scale == 1 else f"{component} x{scale:g}"
            chosen = [p for p, factor in own if factor == scale]
            groups.append(ParameterGroup(name, chosen, rate, scale))
    return groups
