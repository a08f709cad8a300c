"""From a base and adapters to pictures: what `tunekit generate`, training samples and scripts call.

Pictures are drawn one at a time, from noise made on the CPU: what a picture looks like never
depends on which others are drawn with it. The samples of a training run go through the same code.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tunekit
from tunekit import checkpoint, embeddings, families, tokens
from tunekit.data.captions import fill
from tunekit.errors import UserError
from tunekit.export import sha256
from tunekit.families.base import PromptCutWarning
from tunekit.loading import VerificationError, load_file, peft_layers, undisturbed
from tunekit.modelcard import portable
from tunekit.pictures import grid, read_settings, save_png
from tunekit.runfolder import RECIPE, RunFolder
from tunekit.schema import BUNDLED, Base
from tunekit.schema_tokens import RANDOM

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from pydantic import JsonValue

    from tunekit.adapters import Adapter
    from tunekit.families import Family

__all__ = [
    "DrawSettings",
    "Drawn",
    "Painter",
    "default_device",
    "grid",
    "load",
    "read_settings",
    "save_png",
]

AdapterSource = str | Path | tuple[str | Path, float]
_STATE = "adapter"  # the set of tensors in a checkpoint that the adapter's kind reads


@dataclass(frozen=True)
class DrawSettings:
    """How a picture is drawn.

    steps: denoising steps, 1 to 1000. guidance_scale: classifier-free guidance, 1 none, 0 to 100.
    scheduler: by name ("ddim", "euler", ...); None: the base's own. negative_prompt: what not to
    show; needs guidance above 1. width, height: pixels, multiples of what the family says; None:
    the base's own size. scale: strength of the adapters, 1 as trained, 0 the untouched base, at
    most 10 either way. Raises UserError for numbers outside of these ranges.
    """

    steps: int = 25
    guidance_scale: float = 5.0
    scheduler: str | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise UserError(f"steps: {self.steps} is not in 1 to 1000")
        if not 0 <= self.guidance_scale <= 100:
            raise UserError(f"guidance_scale: {self.guidance_scale:g} is not in 0 to 100")
        if not -10 <= self.scale <= 10:
            raise UserError(f"scale: {self.scale:g} is not in -10 to 10")
        if self.negative_prompt and self.guidance_scale <= 1:
            raise UserError(
                f"negative_prompt: does nothing at guidance_scale {self.guidance_scale:g}; "
                "set a guidance above 1"
            )


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
    """

    def __init__(
        self,
        family: Family,
        set_scale: Callable[[float], None] | None = None,
        adapters: Sequence[dict[str, JsonValue]] = (),
    ) -> None:
        self.settings = DrawSettings()
        self.words: tuple[str, str] | None = None
        self.family = family
        self._set_scale = set_scale
        self._adapters = list(adapters)

    @classmethod
    def of(cls, family: Family, adapter: Adapter | None = None) -> Painter:
        """Return a painter that draws with live modules, such as those in training.

        adapter: what is attached to `family`, for settings with another `scale` than 1. Drawing
        changes nothing of the training: modes and strength are afterwards as they were.
        """
        described: list[dict[str, JsonValue]] = []
        if adapter is not None:
            described.append({"name": adapter.kind, "weight": 1.0})
        return cls(family, adapter.set_scale if adapter is not None else None, described)

    def draw(self, prompt: str, seed: int, settings: DrawSettings | None = None) -> Image.Image:
        """Return the picture of `prompt` from `seed`; the same arguments give the same pixels.

        seed: 0 to 2^63 - 1. With the same seed, diffusers' own pipeline draws the same picture.
        Raises UserError for a size the family cannot draw, an unknown scheduler, or a model whose
        picture is not a number (NaN); a prompt longer than the model reads gives a warning.
        """
        return self._draw(self._filled(prompt), seed, settings or self.settings)[0]

    def draw_many(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings | None = None,
    ) -> Iterator[Drawn]:
        """Draw each prompt with each seed, and yield every picture as soon as it is there."""
        settings = settings or self.settings
        total = len(prompts) * len(seeds)
        filled = [self._filled(prompt) for prompt in prompts]
        pairs = ((prompt, seed) for prompt in filled for seed in seeds)
        for number, (prompt, seed) in enumerate(pairs, 1):
            image, stored = self._draw(prompt, seed, settings)
            yield Drawn(image, prompt, seed, stored, number, total)

    def _filled(self, prompt: str) -> str:
        return prompt if self.words is None else fill(prompt, *self.words)

    def _draw(
        self, prompt: str, seed: int, settings: DrawSettings
    ) -> tuple[Image.Image, dict[str, JsonValue]]:
        import torch

        family = self.family
        width = self._edge("width", settings.width)
        height = self._edge("height", settings.height)
        if not 0 <= seed < 2**63:
            raise UserError(f"seed: {seed} is not in 0 to 2^63 - 1")
        for text in (prompt, settings.negative_prompt):
            if cut := family.cut_words(text):
                told = f'the model never sees the end of this prompt: "{cut}" (of "{text}")'
                warnings.warn(told, PromptCutWarning, stacklevel=3)
        with (
            _tolerating_old_numpy_calls(),
            undisturbed(family, family.vae),
            self._at(settings.scale),
        ):
            pipeline = family.pipeline(settings.scheduler)
            pipeline.set_progress_bar_config(disable=True)
            try:
                pixels = pipeline(
                    **family.drawing(prompt, settings.negative_prompt, settings.guidance_scale),
                    num_inference_steps=settings.steps,
                    width=width,
                    height=height,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="np",
                ).images[0]
            except (IndexError, ValueError) as fault:
                if settings.scheduler is None or isinstance(fault, UserError):
                    raise
                said = f"{settings.scheduler} cannot draw in {settings.steps} steps"
                raise UserError(f"scheduler: {said}: {' '.join(str(fault).split())}") from fault
        stored: dict[str, JsonValue] = {
            "prompt": prompt,
            "negative_prompt": settings.negative_prompt,
            "seed": seed,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "scheduler": settings.scheduler or type(pipeline.scheduler).__name__,
            "width": width,
            "height": height,
            "scale": settings.scale,
            "base": portable(family.label),
            "adapters": list(self._adapters),
            "version": tunekit.__version__,
        }
        return _to_image(pixels, stored), stored

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
    def _at(self, scale: float) -> Iterator[None]:
        if self._set_scale is None:
            if scale != 1:
                raise UserError(f"scale: {scale:g} scales nothing: no adapter is loaded")
            yield
            return
        self._set_scale(scale)
        try:
            yield
        finally:
            self._set_scale(1.0)


@contextlib.contextmanager
def _tolerating_old_numpy_calls() -> Iterator[None]:
    """Hold back what numpy says of how diffusers' schedulers call it: nobody here can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield


def _to_image(pixels: Any, settings: dict[str, JsonValue]) -> Image.Image:
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


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    base: str | Base = BUNDLED,
    adapters: AdapterSource | Iterable[AdapterSource] = (),
    device: str | torch.device | None = None,
) -> Painter:
    """Return a painter: a base with adapters on top.

    base: `toybox`, a diffusers folder, a Hub id, or a recipe's base section. adapters: one or
    several, each a path or (path, weight), where weight 1 is the strength it was trained at and a
    path is an exported ``.safetensors`` file, a finished run's folder, or a checkpoint folder
    inside a run (at most one of these). device: None: a GPU if there is one.

    Raises UserError for what is not there, not safe to read, or does not fit the base.
    """
    pairs = [pair for source in sources(adapters) for pair in _pairs(source)]
    _refuse_together([path for path, _ in pairs])
    section = base if isinstance(base, Base) else Base(model=base)
    family = families.load(section, device if device is not None else default_device())
    if not pairs:
        return Painter(family)
    pairs.sort(key=lambda pair: _turn(pair[0]))
    setters = [_put(family, number, *pair) for number, pair in enumerate(pairs)]
    for component in (family.denoiser, *family.text_encoders.values()):
        component.requires_grad_(False)

    def set_scale(scale: float) -> None:
        for setter in setters:
            setter(scale)

    set_scale(1.0)
    for layer in peft_layers(family).values():
        layer.set_adapter(list(layer.scaling), inference_mode=True)
    return Painter(family, set_scale, [_described(path, weight) for path, weight in pairs])


def sources(adapters: AdapterSource | Iterable[AdapterSource]) -> list[AdapterSource]:
    """Return adapters as a list, a single one too."""
    if isinstance(adapters, (str, Path)):
        return [adapters]
    if isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], (int, float)):
        return [adapters]
    return list(adapters)


def _pairs(source: AdapterSource) -> list[tuple[Path, float]]:
    path, weight = source if isinstance(source, tuple) else (source, 1.0)
    if not math.isfinite(weight):
        raise UserError(f"{path}: the weight {weight} is not a number")
    found = Path(path)
    if not found.exists():
        raise UserError(f"{path}: there is no such file")
    if found.is_dir() and not is_checkpoint(found):
        return [(exported, weight) for exported in RunFolder.open(found).exported()]
    if found.is_file() and is_checkpoint(found.parent):
        return [(found.parent, weight)]
    return [(found, weight)]


def _turn(path: Path) -> int:
    """Return when a file or checkpoint is loaded, the lowest first.

    New words first: diffusers makes the vocabulary larger, which a checkpoint puts its own beside.
    Then the checkpoint: it looks for the base's own modules, which files' layers would hide.
    """
    if is_checkpoint(path):
        return 1
    return 0 if embeddings.contents(path)[0] else 2


def _refuse_together(paths: Sequence[Path]) -> None:
    """Raise UserError for what cannot be loaded into one base."""
    states = [path for path in paths if is_checkpoint(path)]
    if len(states) > 1:
        raise UserError(
            f"{states[1]}: only one checkpoint can be drawn with at a time; combine exported files"
        )
    for path in paths if states else ():
        if not is_checkpoint(path) and embeddings.contents(path) == (True, True):
            raise UserError(
                f"{path}: is a bundle, which cannot be drawn with beside a checkpoint: give the "
                "files of its words and its adapter"
            )


def is_checkpoint(path: Path) -> bool:
    """Say whether `path` is a checkpoint's folder; that it is whole is checked when it is read."""
    return (path / checkpoint.MANIFEST).is_file() and not (path / RECIPE).is_file()


def _put(family: Family, number: int, path: Path, weight: float) -> Callable[[float], None]:
    """Put an adapter into `family` and return what sets its strength."""
    if is_checkpoint(path):
        recipe = RunFolder.around(path).recipe
        state = checkpoint.read(path).tensors.get(_STATE)
        if state is None:
            raise UserError(f"{path}: holds no {_STATE}.safetensors")
        # Where a word started is in the checkpoint; a file that it started at may be gone.
        words = [
            token.model_copy(update={"init": RANDOM}) if token.init_file else token
            for token in recipe.tokens
        ]
        noun, seed = recipe.data.class_noun, recipe.train.seed
        adapter = tokens.attach(family, recipe.adapter, words, noun, seed)
        adapter.load_state(state)
        return lambda scale: adapter.set_scale(scale * weight)
    name = f"tunekit_file_{number}"
    try:
        loaded = load_file(family, path, name)
    except VerificationError as fault:
        raise UserError(f"{path}: {fault.said}") from fault
    return lambda scale: loaded.set_scale(scale * weight)


def _described(path: Path, weight: float) -> dict[str, JsonValue]:
    """Return what a picture's settings say of an adapter: enough to find the same one again."""
    if is_checkpoint(path):
        run = path.resolve().parent.parent.name
        return {"name": f"{run}/{path.name}", "weight": weight}
    return {"name": path.name, "weight": weight, "sha256": sha256(path)}
