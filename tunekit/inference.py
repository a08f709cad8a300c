"""From a base and adapters to pictures: what `tunekit generate`, training samples and scripts call.

Pictures are drawn one at a time unless batches are asked for, from noise made on the CPU: what a
picture looks like never depends on which others are drawn with it. The samples of a training run go
through the same code.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tunekit
from tunekit import families, identity
from tunekit.data.cache import fingerprint
from tunekit.data.captions import fill
from tunekit.drawing import DrawSettings, Wanted
from tunekit.errors import UserError
from tunekit.families.base import PromptCutWarning
from tunekit.guides import Control, Start, guided
from tunekit.loading import undisturbed
from tunekit.modelcard import portable
from tunekit.mounted import AdapterSource, Mounted, weighted
from tunekit.pictures import grid, read_settings, save_png
from tunekit.recorded import about_base
from tunekit.schema import BUNDLED, Base

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from pydantic import JsonValue
    from torch import nn

    from tunekit.adapters import Adapter
    from tunekit.families import Family
    from tunekit.loaded import SetScale

__all__ = [
    "Control",
    "DrawSettings",
    "Drawn",
    "Painter",
    "Start",
    "Wanted",
    "default_device",
    "grid",
    "load",
    "read_settings",
    "save_png",
]


@dataclass(frozen=True)
class Drawn:
    """The `number`th (from 1) of `total` pictures. `settings` is what `save_png` stores with it."""

    image: Image.Image
    prompt: str
    seed: int
    settings: dict[str, JsonValue]
    number: int
    total: int


class Painter:
    """A base with its adapters, ready to draw.

    Make one with `tunekit.load`, with `load`, or with `Painter.of` around a model in training.

    settings: how `draw` and `draw_many` draw where they are not told. words: a trigger and its
    class, filled into the {trigger} and {class} of prompts; None: prompts are taken as they are.
    about: what pictures say of the base.
    """

    def __init__(
        self,
        family: Family,
        set_scale: SetScale | None = None,
        adapters: Sequence[dict[str, JsonValue]] = (),
    ) -> None:
        self.settings = DrawSettings()
        self.words: tuple[str, str] | None = None
        self.family = family
        self.about: dict[str, JsonValue] = {"base": portable(family.label)}
        self._set_scale = set_scale
        self._adapters = list(adapters)
        self._mounted: Mounted | None = None
        self._controlnet: nn.Module | None = None

    @classmethod
    def of(cls, family: Family, adapter: Adapter | None = None) -> Painter:
        """Return a painter that draws with live modules, such as those in training.

        adapter: what is attached to `family`, for settings with another `scale` than 1. Drawing
        changes nothing of the training: modes and strength are afterwards as they were.
        """
        if adapter is None:
            return cls(family)

        def set_scale(scale: float, text: float | None = None) -> None:
            if text is not None and text != scale:
                raise UserError("text_scale: what is in training is drawn at one strength")
            adapter.set_scale(scale)

        return cls(family, set_scale, [{"name": adapter.kind, "weight": 1.0}])

    def swap(self, adapters: AdapterSource | Iterable[AdapterSource] = ()) -> None:
        """Draw with these adapters from now on, in the place of all that were loaded.

        The base stays as it is in memory. adapters: as of `load`; none: the base alone. Raises
        UserError as `load` does; the former adapters are then on again.
        """
        former = self._mounted.adapters if self._mounted is not None else []
        asked = weighted(adapters)
        if self._mounted is not None:
            self._mounted.remove()
        elif self._set_scale is not None:
            raise UserError("adapters: what is in training cannot be swapped")
        try:
            self._mount(Mounted(self.family, asked))
        except UserError:
            self._mount(Mounted(self.family, former))
            raise

    def _mount(self, mounted: Mounted) -> None:
        self._mounted = mounted
        self._set_scale = mounted.set_scale if mounted.adapters else None
        self._adapters = mounted.described

    def _control(self, path: Path) -> None:
        module = families.controlnet(self.family, path)
        told = fingerprint(module.state_dict(), identity.settings(module))
        self.about["controlnet"] = {"name": path.name, "sha256": told}
        self._controlnet = module

    def draw(self, prompt: str, seed: int, settings: DrawSettings | None = None) -> Image.Image:
        """Return the picture of `prompt` from `seed`; the same arguments give the same pixels.

        seed: 0 to 2^63 - 1. With the same seed, diffusers' own pipeline draws the same picture.
        Raises UserError for a size the family cannot draw, an unknown scheduler, or a model whose
        picture is not a number (NaN); a prompt longer than the model reads gives a warning.
        """
        return next(self.draw_many([prompt], [seed], settings)).image

    def draw_many(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings | None = None,
        *,
        together: int = 1,
    ) -> Iterator[Drawn]:
        """Draw each prompt with each seed, and yield every picture as soon as it is there.

        together: how many of a prompt's pictures are drawn at a time, 1 to 64: quicker on a GPU,
        and then off by rounding from what each would be alone.
        """
        settings = settings or self.settings
        yield from self.draw_all(
            [Wanted(prompt, tuple(seeds), settings, together) for prompt in prompts]
        )

    def draw_all(self, wanted: Sequence[Wanted]) -> Iterator[Drawn]:
        """Draw everything that is wanted, in order, and yield each picture as soon as it is there.

        What cannot be drawn is found before the first picture is.
        """
        filled = [self._filled(one.prompt) for one in wanted]
        for prompt, one in zip(filled, wanted, strict=True):
            self._check(prompt, one.settings)
        total, number = sum(len(one.handed_out) for one in wanted), 0
        for prompt, one in zip(filled, wanted, strict=True):
            for seeds in one.batches():
                drawn = self._draw(prompt, seeds, one.settings)
                for seed, (image, stored) in zip(seeds, drawn, strict=True):
                    if seed in one.handed_out:
                        number += 1
                        yield Drawn(image, prompt, seed, stored, number, total)

    def _filled(self, prompt: str) -> str:
        return prompt if self.words is None else fill(prompt, *self.words)

    def _check(self, prompt: str, settings: DrawSettings) -> None:
        """Raise UserError where these do not suit the base; warn of words that it never sees."""
        self._size(settings)
        if (settings.control is None) != (self._controlnet is None):
            lacks = "ControlNet is loaded" if settings.control else "picture is given to it"
            raise UserError(f"controlnet: a picture and a ControlNet go together; no {lacks}")
        if self._set_scale is None and (settings.scale != 1 or settings.text_scale is not None):
            name = "scale" if settings.scale != 1 else "text_scale"
            raise UserError(
                f"{name}: {getattr(settings, name):g} scales nothing: no adapter is loaded"
            )
        for text in (prompt, settings.negative_prompt):
            if cut := self.family.cut_words(text):
                told = f'the model never sees the end of this prompt: "{cut}" (of "{text}")'
                warnings.warn(told, PromptCutWarning, stacklevel=3)

    def _draw(
        self, prompt: str, seeds: Sequence[int], settings: DrawSettings
    ) -> list[tuple[Image.Image, dict[str, JsonValue]]]:
        """Return a picture for each seed, drawn at a time, with what is stored in it."""
        import torch

        family = self.family
        width, height = self._size(settings)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with (
            _tolerating_old_numpy_calls(),
            undisturbed(family, family.vae, *([self._controlnet] if self._controlnet else ())),
            self._at(settings),
            _seeded(family.device, seeds[0]),
        ):
            pipeline = family.pipeline(settings.scheduler)
            pipeline.set_progress_bar_config(disable=True)
            start, control = settings.start, settings.control
            pipeline, given = guided(pipeline, width, height, start, control, self._controlnet)
            try:
                pixels = pipeline(
                    **family.drawing(prompt, settings.negative_prompt, settings.guidance_scale),
                    **given,
                    num_inference_steps=settings.steps,
                    num_images_per_prompt=len(seeds),
                    generator=generators if len(seeds) > 1 else generators[0],
                    output_type="np",
                ).images
            except (IndexError, ValueError) as fault:
                if settings.scheduler is None or isinstance(fault, UserError):
                    raise
                said = f"{settings.scheduler} cannot draw in {settings.steps} steps"
                raise UserError(f"scheduler: {said}: {' '.join(str(fault).split())}") from fault
        shared: dict[str, JsonValue] = {
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "scheduler": settings.scheduler or type(pipeline.scheduler).__name__,
            "width": width,
            "height": height,
            "scale": settings.scale,
            **self.about,
            "adapters": list(self._adapters),
            "version": tunekit.__version__,
        }
        if settings.text_scale is not None:
            shared["text_scale"] = settings.text_scale
        if len(seeds) > 1:
            shared["batch"] = list(seeds)
        if start is not None:
            shared["start"] = dict(start.told)
        if control is not None:
            shared["control"] = dict(control.told)
        shared |= {"prompt": prompt, "negative_prompt": settings.negative_prompt}
        stored: list[dict[str, JsonValue]] = [{**shared, "seed": seed} for seed in seeds]
        images = [_to_image(own, told) for own, told in zip(pixels, stored, strict=True)]
        if start is not None:
            images = [_kept(image, *start.fitted(width, height)) for image in images]
        return list(zip(images, stored, strict=True))

    def _size(self, settings: DrawSettings) -> tuple[int, int]:
        """Return width and height; UserError for what the family cannot draw."""
        size = settings.width, settings.height
        if settings.start is not None and settings.start.extended:
            size = settings.start.image.size
        return self._edge("width", size[0]), self._edge("height", size[1])

    def _edge(self, name: str, pixels: int | None) -> int:
        if pixels is None:
            return self.family.default_resolution
        multiple = self.family.size_multiple
        most = self.family.most_pixels
        if pixels < multiple or pixels % multiple or pixels > most:
            near = max(multiple, round(pixels / multiple) * multiple)
            raise UserError(
                f"{name}: {pixels} is not a multiple of {multiple} in {multiple} to {most} pixels; "
                f"the nearest is {min(near, most)}"
            )
        return pixels

    @contextlib.contextmanager
    def _at(self, settings: DrawSettings) -> Iterator[None]:
        if self._set_scale is None:
            yield
            return
        self._set_scale(settings.scale, settings.text_scale)
        try:
            yield
        finally:
            self._set_scale(1.0)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let the seed decide, too, what a library draws from the global stream; that is as before.

    Some of diffusers' pipelines encode pictures so, whatever generator they are given.
    """
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _tolerating_old_numpy_calls() -> Iterator[None]:
    """Hold back what numpy says of how diffusers' schedulers call it: nobody here can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield


def _to_image(pixels: Any, settings: Mapping[str, JsonValue]) -> Image.Image:
    """Turn [H, W, 3] in 0..1 into a picture, as diffusers does, but never NaN into black."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        raise UserError(
            f'the picture of "{settings["prompt"]}" with seed {settings["seed"]} is not a number '
            f"(NaN): the adapter or the base is broken, or {settings['scheduler']} cannot draw in "
            f"{settings['steps']} steps, or the base's number format is too narrow (base.dtype)"
        )
    return Image.fromarray((pixels * 255).round().astype("uint8"))


def _kept(image: Image.Image, before: Image.Image, mask: Image.Image | None) -> Image.Image:
    """Return what was drawn where the mask is white, and what was there before elsewhere."""
    from PIL import Image

    return image if mask is None else Image.composite(image, before, mask)


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    base: str | Base = BUNDLED,
    adapters: AdapterSource | Iterable[AdapterSource] = (),
    device: str | torch.device | None = None,
    *,
    identify: bool = False,
    controlnet: str | Path | None = None,
) -> Painter:
    """Return a painter: a base with adapters on top.

    base: `toybox`, a diffusers folder, a Hub id, or a recipe's base section. adapters: one or
    several, each a path or (path, weight), where weight 1 is the strength it was trained at, or
    (path, (weight, weight in the text encoders)); a path is an exported ``.safetensors`` file, a
    finished run's folder, or a checkpoint folder inside a run (at most one of these). device: None:
    a GPU if there is one. identify: whether pictures say the base's fingerprint, for which all of
    its weights are read once. controlnet: a ControlNet's folder on this disk, which holds what is
    drawn to the picture in `DrawSettings.control`.

    Raises UserError for what is not there, not safe to read, or does not fit the base.
    """
    asked = weighted(adapters)
    section = base if isinstance(base, Base) else Base(model=base)
    family = families.load(section, device if device is not None else default_device())
    painter = Painter(family)
    if settings := about_base(section):
        painter.about["base_settings"] = settings
    if identify:
        painter.about["base_sha256"] = identity.of_drawing(family)
    if controlnet is not None:
        painter._control(Path(controlnet))
    painter._mount(Mounted(family, asked))
    return painter
