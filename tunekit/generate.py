"""A folder of pictures and a grid, drawn with a run, an adapter file, or the base alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import UserError
from tunekit.schema import BUNDLED, Base

if TYPE_CHECKING:
    from tunekit.inference import DrawSettings
    from tunekit.progress import Reporter
    from tunekit.runfolder import RunFolder

GENERATED = Path("generated")
COLUMNS = 4


@dataclass(frozen=True)
class Wish:
    """What to draw, and with what. None: as the run was evaluated, else `DrawSettings`' default.

    run: a run's folder; checkpoint: one of its checkpoints by name, instead of its export.
    adapters: files as (path, weight). prompts: in a run's, {trigger} and {class} are filled in.
    Each prompt is drawn with `count` seeds from `seed` on. out: a folder to make.
    """

    prompts: Sequence[str]
    run: Path | None = None
    checkpoint: str | None = None
    adapters: Sequence[tuple[Path, float]] = ()
    base: str | None = None
    negative_prompt: str | None = None
    seed: int = 0
    count: int = 4
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    scale: float = 1.0
    out: Path | None = None


@dataclass(frozen=True)
class Generated:
    """What was written."""

    folder: Path
    pictures: tuple[Path, ...]
    grid: Path

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        pictures = [str(path) for path in self.pictures]
        return {"folder": str(self.folder), "pictures": pictures, "grid": str(self.grid)}


def generate(wish: Wish, reporter: Reporter | None = None) -> Generated:
    """Draw what is wished for, one picture at a time, and a grid of them all.

    Raises UserError, before anything is drawn, where the wish contradicts itself, something it
    names is not there, or the folder to write to holds something already.
    """
    from tunekit.inference import grid, load, save_png
    from tunekit.progress import Silent
    from tunekit.runfolder import RunFolder

    if wish.count < 1:
        raise UserError(f"--count: must be at least 1, not {wish.count}")
    if wish.run is not None and wish.adapters:
        raise UserError("--run and --adapter: give one of them")
    if wish.checkpoint is not None and wish.run is None:
        raise UserError("--checkpoint names a checkpoint of a run: give --run too")
    run = RunFolder.open(wish.run) if wish.run is not None else None
    prompts = [_filled(prompt, run) for prompt in wish.prompts]
    settings = _settings(wish, run)
    folder = _folder(wish)

    adapters = list(wish.adapters)
    if run is not None:
        which = run.checkpoint(wish.checkpoint) if wish.checkpoint else run.exported()
        adapters = [(which, 1.0)]
    base: str | Base = wish.base or (run.recipe.base if run is not None else BUNDLED)
    painter = load(base, adapters)

    images, labels, paths = [], [], []
    seeds = range(wish.seed, wish.seed + wish.count)
    with (reporter or Silent()).stage("drawing", len(prompts) * wish.count) as tick:
        for drawn in painter.draw_many(prompts, seeds, settings):
            path = folder / f"{drawn.number:03d}-{_slug(drawn.prompt)}-{drawn.seed}.png"
            save_png(drawn.image, path, drawn.settings)
            images.append(drawn.image)
            labels.append(f"{drawn.prompt} ({drawn.seed})")
            paths.append(path)
            tick(drawn.prompt)
    sheet = folder / "grid.png"
    columns = wish.count if len(prompts) > 1 else COLUMNS
    save_png(grid(images, columns, labels), sheet, {"prompts": [*prompts], "seeds": [*seeds]})
    return Generated(folder, tuple(paths), sheet)


def _filled(prompt: str, run: RunFolder | None) -> str:
    if "{trigger}" not in prompt and "{class}" not in prompt:
        return prompt  # other braces are the user's own
    if run is None:
        raise UserError(f'--prompt: "{prompt}" has a placeholder, which only --run can fill')
    data = run.recipe.data
    return prompt.replace("{trigger}", data.trigger).replace("{class}", data.class_noun)


def _settings(wish: Wish, run: RunFolder | None) -> DrawSettings:
    """Return how to draw: as wished, else as the run was evaluated, else by default."""
    from tunekit.inference import DrawSettings

    names = ("negative_prompt", "steps", "guidance_scale", "scheduler")
    chosen = {name: getattr(wish, name) for name in names}
    chosen |= {"width": wish.width, "height": wish.height}
    if run is not None:
        recipe = run.recipe
        usual = {name: getattr(recipe.evaluate, name) for name in names}
        usual |= {"width": recipe.data.resolution, "height": recipe.data.resolution}
        chosen = {name: usual[name] if value is None else value for name, value in chosen.items()}
    given = {name: value for name, value in chosen.items() if value is not None}
    return DrawSettings(**given, scale=wish.scale)


def _folder(wish: Wish) -> Path:
    """Return the folder to write to: the one wished for, or a new one under `generated`."""
    if wish.out is not None:
        if wish.out.exists() and not wish.out.is_dir():
            raise UserError(f"--out: {wish.out} is a file")
        if wish.out.is_dir() and any(wish.out.iterdir()):
            raise UserError(f"--out: {wish.out} holds something already; name a new folder")
        return wish.out
    source = wish.run or next((path for path, _ in wish.adapters), Path(wish.base or BUNDLED))
    number = 1
    while (folder := GENERATED / f"{source.resolve().stem}-{number:02d}").exists():
        number += 1
    return folder


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
