"""From a run or an adapter file to pictures: what `tunekit generate` and `tunekit.load` do."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from tunekit import hub, inference
from tunekit.checkpoint import read_safetensors
from tunekit.data.captions import fill
from tunekit.errors import UserError, did_you_mean
from tunekit.inference import (
    AdapterSource,
    Drawn,
    DrawSettings,
    Painter,
    is_checkpoint,
    sources,
)
from tunekit.pictures import grid, save_png
from tunekit.runfolder import RECIPE, RunFolder
from tunekit.schema import BUNDLED, Base, Data, Evaluate, Quantized

if TYPE_CHECKING:
    import torch

GRID = "grid.png"
_FOLDER = Path("generated")


@dataclass(frozen=True)
class Request:
    """What to draw and with what; None: as the run, or the recipe in the adapter file, has it.

    run: a run folder; checkpoint: the name of one of its checkpoints, instead of its exported file.
    adapters: adapter files or checkpoint folders, as paths or (path, weight). base: needed where
    neither run nor files say it. quantize: as the recipe's base.quantize; None: the full base.
    prompts: ``{trigger}`` and ``{class}`` are filled in where a recipe is known, and ``{{`` is a
    brace there. seed: of the first picture of each prompt; count: pictures per prompt, each with
    the next seed. The others are those of `inference.DrawSettings`.
    """

    run: Path | None = None
    checkpoint: str | None = None
    adapters: Sequence[AdapterSource] = ()
    base: str | None = None
    quantize: str | None = None
    prompts: Sequence[str] = ()
    negative_prompt: str | None = None
    seed: int | None = None
    count: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    scale: float = 1.0
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Generated:
    """The folder, its pictures in the order they were drawn, and the grid of all of them."""

    folder: Path
    pictures: tuple[Path, ...]
    grid: Path


@dataclass(frozen=True)
class _Known:
    """What a run or a file says of how to draw with it; `name` is what its pictures go under.

    clip_skip: what was trained with, whichever base is then named.
    """

    base: Base | None = None
    data: Data | None = None
    evaluate: Evaluate | None = None
    name: str = "pictures"
    clip_skip: int | None = None


def load(
    base: str | Path | Base | None = None,
    adapters: AdapterSource | Iterable[AdapterSource] = (),
    device: str | torch.device | None = None,
) -> Painter:
    """Return a painter that draws as `tunekit generate` does: of a run, of files, or of a base.

    base: a run's folder, whose base and exported adapter are taken, or a base: `toybox`, a
    diffusers folder, a Hub id, a section of a recipe; None: the one that the only adapter says,
    `toybox` without adapters. adapters: one or several, as of `inference.load`. A run, or an only
    adapter, also says the painter's `settings` (size, steps, guidance) and the words that its
    ``draw`` fills into {trigger} and {class}.

    Raises UserError for what is not there, not safe to read, or does not fit the base.
    """
    adapters = sources(adapters)
    if isinstance(base, (str, Path)) and (Path(base) / RECIPE).is_file():
        request = Request(run=Path(base), adapters=adapters)
        base = None
    else:
        if base is None and not adapters:
            base = BUNDLED
        request = Request(adapters=adapters)
    known, adapters = _resolve(request)
    if base is not None:
        named = base if isinstance(base, Base) else _named(str(base), known)
        known = replace(known, base=named)
    painter = inference.load(_base(known), adapters, device)
    painter.settings = _settings(request, known)
    if known.data is not None:
        painter.words = (known.data.trigger, known.data.class_noun)
    return painter


def generate(
    request: Request,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Callable[[Drawn], object] | None = None,
) -> Generated:
    """Draw what is asked for into a folder of PNGs, each with its settings inside, and a grid.

    out: default ``generated/NAME-001`` (or the next free number) in the working directory, never in
    the run's own folder, which ``train --overwrite`` clears. overwrite: whether `out` may hold
    pictures of an earlier call; those of the same name are replaced. progress: called with every
    picture once it is written.

    Raises UserError where something is missing, unsafe, unknown or contradictory; nothing is
    written before everything has been loaded.
    """
    known, adapters = _resolve(request)
    base = _narrowed(_base(known), request.quantize)
    prompts = [_filled(prompt, known.data) for prompt in request.prompts or _prompts(known)]
    seeds = _seeds(request, known.evaluate)
    settings = _settings(request, known)
    folder = _folder(out, known.name, overwrite)
    painter = inference.load(base, adapters, device)
    drawn, paths = [], []
    for picture in painter.draw_many(prompts, seeds, settings):
        name = f"{picture.number:03d}-{_slug(picture.prompt)}-seed{picture.seed}.png"
        folder.mkdir(parents=True, exist_ok=True)
        save_png(picture.image, folder / name, picture.settings)
        paths.append(folder / name)
        drawn.append(picture)
        if progress is not None:
            progress(picture)
    columns = len(seeds) if len(seeds) > 1 else min(4, len(drawn))
    labels = [f"{picture.prompt} (seed {picture.seed})" for picture in drawn]
    sheet = grid([picture.image for picture in drawn], columns, labels)
    shared = {key: value for key, value in drawn[0].settings.items() if key not in _OWN}
    save_png(sheet, folder / GRID, shared | {"prompts": list(prompts), "seeds": list(seeds)})
    return Generated(folder, tuple(paths), folder / GRID)


_OWN = ("prompt", "seed")  # what differs from picture to picture


def parse_adapter(text: str) -> tuple[Path, float]:
    """Read ``PATH`` or ``PATH:WEIGHT``; UserError where WEIGHT is no number."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise UserError(
            f'{text}: there is no such file, and "{weight}" is no weight; write FILE or FILE:WEIGHT'
        ) from None


def _resolve(request: Request) -> tuple[_Known, list[AdapterSource]]:
    """Return what is known, and every adapter to load."""
    adapters = list(request.adapters)
    if request.run is not None:
        run = RunFolder.open(request.run)
        known = _of_run(run)
        own = [run.checkpoint(request.checkpoint)] if request.checkpoint else run.exported()
        adapters[:0] = own
    elif request.checkpoint is not None:
        raise UserError(f"checkpoint: {request.checkpoint} is looked for in a run; name it (--run)")
    else:
        known = _said_by_all([Path(a[0] if isinstance(a, tuple) else a) for a in adapters])
    if request.base is not None:
        known = replace(known, base=_named(request.base, known))
    return known, adapters


def _named(model: str, known: _Known) -> Base:
    """Return the base of this name, read as what is drawn with it was trained to."""
    return Base(model=model, clip_skip=known.clip_skip)


def _base(known: _Known) -> Base:
    if known.base is None:
        raise UserError(
            "base: neither a run nor the adapter file says which model to draw with; name it, such "
            f"as --base {BUNDLED}"
        )
    return known.base


def _of_run(run: RunFolder) -> _Known:
    recipe = run.recipe
    base = _full(recipe.base)
    return _Known(base, recipe.data, recipe.evaluate, recipe.name, base.clip_skip)


def _narrowed(base: Base, kind: str | None) -> Base:
    """Return the base held in few bits, where that is asked for."""
    if kind is None:
        return base
    if kind not in (kinds := get_args(Quantized)):
        raise UserError(
            f'quantize: must be {" or ".join(kinds)}, not "{kind}"{did_you_mean(kind, kinds)}'
        )
    return base.model_copy(update={"quantize": kind})


def _full(base: Base) -> Base:
    """Return a recipe's base as files are made for: what training held in few bits is whole."""
    return base.model_copy(update={"quantize": None})


def _said_by_all(paths: Sequence[Path]) -> _Known:
    """Return what files of one training say, such as an adapter and its words; else nothing."""
    if not paths or (len(paths) > 1 and not all(path.is_file() for path in paths)):
        return _Known()
    first, *others = map(_said_by, paths)
    same = all(replace(other, name=first.name) == first for other in others)
    return first if same else _Known()


def _said_by(path: Path) -> _Known:
    """Return what the recipe in a file, run or checkpoint says; nothing where none can be read."""
    if is_checkpoint(path):
        return _of_run(RunFolder.around(path))
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if not path.is_file():
        return _of_run(RunFolder.open(path))
    _, metadata = read_safetensors(path)
    text = metadata.get("tunekit.recipe")
    if text is None:
        return _Known(name=path.stem)
    try:
        tree: dict[str, Any] = json.loads(text)
        base = Base.model_validate(tree["base"])
        data = Data.model_validate(tree["data"])
        evaluate = Evaluate.model_validate(tree["evaluate"])
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as fault:
        said = " ".join(str(fault).split())[:200]
        warnings.warn(f"{path}: the recipe in it is not one I read: {said}", stacklevel=2)
        return _Known(name=path.stem)
    # Only the last name of a path was kept in the file: that is no place to look for a model, and a
    # path in it is no word of ours. Whose code is trusted, no file may say.
    named = (base.model == BUNDLED or hub.is_id(base.model)) and base.vae is None
    base = _full(base.model_copy(update={"trust_remote_code": False, "config": None}))
    return _Known(base if named else None, data, evaluate, path.stem, base.clip_skip)


def _prompts(known: _Known) -> Iterable[str]:
    if known.evaluate is None:
        raise UserError("prompt: name at least one, as in --prompt 'a red robot'")
    return known.evaluate.prompts


def _filled(prompt: str, data: Data | None) -> str:
    return prompt if data is None else fill(prompt, data.trigger, data.class_noun)


def _seeds(request: Request, evaluate: Evaluate | None) -> list[int]:
    if request.count is not None and not 1 <= request.count <= 10_000:
        raise UserError(f"count: {request.count} is not in 1 to 10000")
    if request.seed is None and request.count is None and not request.prompts and evaluate:
        return list(evaluate.seeds)
    first = request.seed if request.seed is not None else 1
    return [first + number for number in range(request.count or 1)]


def _settings(request: Request, known: _Known) -> DrawSettings:
    """Lay what is asked for over the recipe's settings, over the defaults."""
    values: dict[str, Any] = {}
    if known.evaluate is not None:
        values = {
            name: getattr(known.evaluate, name)
            for name in ("steps", "guidance_scale", "scheduler", "negative_prompt")
        }
    if known.data is not None and known.data.resolutions:
        values |= {"width": known.data.resolutions[0], "height": known.data.resolutions[0]}
    names = ("negative_prompt", "steps", "guidance_scale", "scheduler", "width", "height")
    asked = {name: getattr(request, name) for name in names}
    values |= {name: value for name, value in asked.items() if value is not None}
    return DrawSettings(**values, scale=request.scale)


def _folder(out: Path | None, name: str, overwrite: bool) -> Path:
    if out is None:
        taken = {p.name for p in _FOLDER.iterdir()} if _FOLDER.is_dir() else set()
        free = (f"{name}-{n:03d}" for n in range(1, 10**9))
        return _FOLDER / next(folder for folder in free if folder not in taken)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the pictures")
    if not overwrite and out.is_dir() and any(out.glob("*.png")):
        raise UserError(f"{out}: holds pictures already; name another folder or give --overwrite")
    return out


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:40].strip("-") or "picture"
