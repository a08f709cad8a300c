"""From a run or an adapter file to pictures: what `tunekit generate` and `tunekit.load` do."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import inference, outofmemory
from tunekit.drawing import Wanted, settings_of
from tunekit.errors import UserError, did_you_mean
from tunekit.inference import Drawn, Painter
from tunekit.mounted import AdapterSource, sources
from tunekit.pictures import SUFFIXES, grid, save, save_png
from tunekit.request import Plan, plan
from tunekit.request import Request as Request
from tunekit.runfolder import RECIPE
from tunekit.schema import BUNDLED, Base

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from pydantic import JsonValue

say = logging.getLogger("tunekit").warning
GRID = "grid.png"
_FOLDER = Path("generated")
_OWN = ("prompt", "seed", "batch")  # what differs from picture to picture


@dataclass(frozen=True)
class Generated:
    """The folder, its pictures in the order they were drawn, and the grid of all of them."""

    folder: Path
    pictures: tuple[Path, ...]
    grid: Path


def load(
    base: str | Path | Base | None = None,
    adapters: AdapterSource | Iterable[AdapterSource] = (),
    device: str | torch.device | None = None,
    controlnet: str | Path | None = None,
) -> Painter:
    """Return a painter that draws as `tunekit generate` does: of a run, of files, or of a base.

    base: a run's folder, whose base and exported adapter are taken, or a base: `toybox`, a
    diffusers folder, a Hub id, a section of a recipe; None: the one that the only adapter says,
    `toybox` without adapters. adapters: one or several, as of `inference.load`. A run, or an only
    adapter, also says the painter's `settings` (size, steps, guidance) and the words that its
    ``draw`` fills into {trigger} and {class}. Its `swap` puts other adapters on the same base.
    controlnet: as of `inference.load`.

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
    found, adapters = request.resolved()
    if base is not None:
        named = base if isinstance(base, Base) else found.named(str(base))
        found = replace(found, base=named)
    painter = inference.load(found.required(), adapters, device, controlnet=controlnet)
    painter.settings = settings_of(found.values())
    if found.data is not None:
        painter.words = (found.data.trigger, found.data.class_noun)
    return painter


def generate(
    request: Request,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Callable[[Drawn], object] | None = None,
    note: Callable[[str], object] = say,
    form: str = "png",
) -> Generated:
    """Draw what is asked for into a folder of pictures with their settings inside, and a grid.

    out: default ``generated/NAME-001`` (or the next free number) in the working directory, never in
    the run's own folder, which ``train --overwrite`` clears. overwrite: whether `out` may hold
    pictures of an earlier call; those of the same name are replaced. progress: called with every
    picture once it is written. note: told what differs from a picture that is drawn again.
    form: png, or jpeg or webp; the grid is a PNG.

    Raises UserError where something is missing, unsafe, unknown or contradictory, and
    OutOfMemoryError; nothing is written before everything has been loaded.
    """
    if form not in SUFFIXES:
        raise UserError(
            f'format: must be {", ".join(SUFFIXES)}, not "{form}"{did_you_mean(form, SUFFIXES)}'
        )
    decided = plan(request)
    folder = _folder(out, decided.name, overwrite)
    drawn: list[Drawn] = []
    paths = []
    with outofmemory.told_drawing("while the base was loaded", decided.base.quantize):
        painter = inference.load(
            decided.base, decided.adapters, device, identify=True, controlnet=decided.controlnet
        )
    for difference in _differences(decided, painter.about):
        note(difference)
    with _memory_told(decided, painter.family.default_resolution):
        for picture in painter.draw_all(decided.wanted):
            number, ending = picture.number, SUFFIXES[form]
            name = f"{number:03d}-{_slug(picture.prompt)}-seed{picture.seed}{ending}"
            folder.mkdir(parents=True, exist_ok=True)
            save(picture.image, folder / name, picture.settings)
            paths.append(folder / name)
            drawn.append(picture)
            if progress is not None:
                progress(picture)
    if decided.again is not None and decided.unchanged:
        note(decided.again.compared(drawn[0].image))
    save_png(_sheet(drawn, decided.wanted), folder / GRID, _shared(drawn))
    return Generated(folder, tuple(paths), folder / GRID)


def _memory_told(decided: Plan, own: int) -> contextlib.AbstractContextManager[None]:
    """Say what lowers it where memory runs out. own: edge of the base's pictures in pixels."""
    settings = [one.settings for one in decided.wanted]
    together = max(min(one.together, len(one.seeds)) for one in decided.wanted)
    sizes = [(one.width or own, one.height or own) for one in settings]
    width, height = max(sizes, key=math.prod)
    what = f"while drawing ({together} at a time of {width}x{height} pixels)"
    size: tuple[int, int] | None = (width, height)
    if any(one.start is not None and one.start.extended for one in settings):
        what, size = f"while drawing ({together} at a time)", None  # which no option changes
    return outofmemory.told_drawing(what, decided.base.quantize, together, size)


def _differences(decided: Plan, about: Mapping[str, JsonValue]) -> list[str]:
    """Return in words what is not as it was when a picture that is drawn again was drawn.

    about: what pictures now say of the base. Raises UserError for another base than the picture's,
    unless the user named it.
    """
    if decided.again is None:
        return []
    other = decided.again.base_differs(str(about["base_sha256"]))
    if other is not None and not decided.named:
        raise UserError(f"{other}: name one with --base to draw on it all the same")
    guides = decided.again.guides_differ(decided.wanted[0].settings, about.get("controlnet"))
    adapters = decided.again.differences(decided.adapters)
    return [*([other] if other else ()), *adapters, *guides]


def _sheet(drawn: Sequence[Drawn], wanted: Sequence[Wanted]) -> Image.Image:
    """Return all pictures in one: a row for each prompt where each has as many seeds."""
    counts = {len(one.handed_out) for one in wanted}
    most = max(counts)
    columns = most if len(counts) == 1 and most > 1 else min(4, len(drawn))
    labels = [f"{picture.prompt} (seed {picture.seed})" for picture in drawn]
    return grid([picture.image for picture in drawn], columns, labels)


def _shared(drawn: Sequence[Drawn]) -> dict[str, JsonValue]:
    """Return what is stored in the grid: what all pictures share, and their prompts and seeds."""
    first, *others = (picture.settings for picture in drawn)
    shared = {
        key: value
        for key, value in first.items()
        if key not in _OWN and all(other.get(key) == value for other in others)
    }
    prompts: list[JsonValue] = [*dict.fromkeys(picture.prompt for picture in drawn)]
    seeds: list[JsonValue] = [*dict.fromkeys(picture.seed for picture in drawn)]
    return {**shared, "prompts": prompts, "seeds": seeds}


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


def adapter_of(text: str) -> AdapterSource:
    """Read ``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT:WEIGHT``, the second for text encoders.

    Raises UserError where a weight is no number.
    """
    path, weight = parse_adapter(text)
    if str(path) == text:
        return path
    rest, colon, first = str(path).rpartition(":")
    if not colon or path.exists():
        return path, weight
    path, whole = parse_adapter(f"{rest}:{first}")
    return path, (whole, weight)


def _folder(out: Path | None, name: str, overwrite: bool) -> Path:
    if out is None:
        taken = {p.name for p in _FOLDER.iterdir()} if _FOLDER.is_dir() else set()
        free = (f"{name}-{n:03d}" for n in range(1, 10**9))
        return _FOLDER / next(folder for folder in free if folder not in taken)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the pictures")
    if not overwrite and out.is_dir() and _pictures(out):
        raise UserError(f"{out}: holds pictures already; name another folder or give --overwrite")
    return out


def _pictures(folder: Path) -> bool:
    return any(path.suffix in SUFFIXES.values() for path in folder.iterdir())


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:40].strip("-") or "picture"
