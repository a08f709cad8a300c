"""How a picture is drawn: what options, lines of prompt files and earlier pictures all become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.guides import Control, Start

MOST_AT_ONCE = 64


@dataclass(frozen=True)
class DrawSettings:
    """How a picture is drawn.

    steps: denoising steps, 1 to 1000. guidance_scale: classifier-free guidance, 1 none, 0 to 100.
    scheduler: by name ("ddim", "euler", ...); None: the base's own. negative_prompt: what not to
    show; needs guidance above 1. width, height: pixels, multiples of what the family says; None:
    the base's own size. scale: strength of the adapters, 1 as trained, 0 the untouched base, at
    most 10 either way; text_scale: the same of their parts in text encoders; None: as `scale`.
    start: a picture to start from, and where it may change; control: one that the ControlNet holds
    the drawing to. Raises UserError for numbers outside of these ranges.
    """

    steps: int = 25
    guidance_scale: float = 5.0
    scheduler: str | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    scale: float = 1.0
    text_scale: float | None = None
    start: Start | None = None
    control: Control | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise UserError(f"steps: {self.steps} is not in 1 to 1000")
        if not 0 <= self.guidance_scale <= 100:
            raise UserError(f"guidance_scale: {self.guidance_scale:g} is not in 0 to 100")
        for name in ("scale", "text_scale"):
            scale = getattr(self, name)
            if scale is not None and not -10 <= scale <= 10:
                raise UserError(f"{name}: {scale:g} is not in -10 to 10")
        if self.start is not None and int(self.steps * self.start.strength) < 1:
            raise UserError(
                f"strength: {self.start.strength:g} of {self.steps} steps is none: draw in more "
                "steps, or at a higher strength"
            )
        if self.negative_prompt and self.guidance_scale <= 1:
            raise UserError(
                f"negative_prompt: does nothing at guidance_scale {self.guidance_scale:g}; "
                "set a guidance above 1"
            )


@dataclass(frozen=True)
class Wanted:
    """Pictures of one prompt, a seed each. together: how many are drawn at a time, 1 to 64.

    Those of one batch differ by rounding from what each would be alone. only: of these seeds the
    pictures are handed out; none: of all.
    """

    prompt: str
    seeds: tuple[int, ...]
    settings: DrawSettings = field(default_factory=DrawSettings)
    together: int = 1
    only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise UserError(f"seed: {seed} is not in 0 to 2^63 - 1")
        if not 1 <= self.together <= MOST_AT_ONCE:
            raise UserError(f"batch: {self.together} is not in 1 to {MOST_AT_ONCE}")

    @property
    def handed_out(self) -> tuple[int, ...]:
        """The seeds whose pictures are handed out, in order."""
        return tuple(seed for seed in self.seeds if not self.only or seed in self.only)

    def batches(self) -> list[tuple[int, ...]]:
        """Return the seeds that are drawn at a time, in order."""
        step = self.together
        return [self.seeds[start : start + step] for start in range(0, len(self.seeds), step)]


def settings_of(*layers: Mapping[str, Any]) -> DrawSettings:
    """Return the settings that these values make, the later over the earlier; None: not said.

    Raises UserError as `DrawSettings` does.
    """
    values = {name: value for layer in layers for name, value in layer.items() if value is not None}
    return DrawSettings(**values)
