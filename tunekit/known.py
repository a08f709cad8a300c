"""What a run, or the recipe in an adapter file, says of how to draw with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunekit import hub
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.mounted import is_checkpoint
from tunekit.runfolder import RunFolder
from tunekit.schema import BUNDLED, Base, Data, Evaluate


@dataclass(frozen=True)
class Known:
    """What a run or a file says of how to draw with it; `name` is what its pictures go under.

    clip_skip: what was trained with, whichever base is then named. absent: a model of the Hub that
    a file says, and that nobody has brought here.
    """

    base: Base | None = None
    data: Data | None = None
    evaluate: Evaluate | None = None
    name: str = "pictures"
    clip_skip: int | None = None
    absent: str | None = None

    def named(self, model: str) -> Base:
        """Return the base of this name, read as what is drawn with it was trained to."""
        return Base(model=model, clip_skip=self.clip_skip)

    def required(self) -> Base:
        """Return the base; UserError where nothing says it."""
        if self.base is None and self.absent is not None:
            raise UserError(
                f"base: the adapter file says {self.absent}, which is not on this disk, and what a "
                f"file says of itself brings nothing from the Hub: --base {self.absent} does"
            )
        if self.base is None:
            raise UserError(
                "base: neither a run nor the adapter file says which model to draw with; name it, "
                f"such as --base {BUNDLED}"
            )
        return self.base

    def values(self) -> dict[str, Any]:
        """Return what it says of settings, by their names in `DrawSettings`."""
        values: dict[str, Any] = {}
        if self.evaluate is not None:
            names = ("steps", "guidance_scale", "scheduler", "negative_prompt")
            values = {name: getattr(self.evaluate, name) for name in names}
        if self.data is not None and self.data.resolutions:
            edge = self.data.resolutions[0]
            values |= {"width": edge, "height": edge}
        return values


def of_run(run: RunFolder) -> Known:
    """Return what a run's recipe says."""
    recipe = run.recipe
    base = _full(recipe.base)
    return Known(base, recipe.data, recipe.evaluate, recipe.name, base.clip_skip)


def said_by_all(paths: Sequence[Path]) -> Known:
    """Return what files of one training say, such as an adapter and its words; else nothing."""
    if not paths or (len(paths) > 1 and not all(path.is_file() for path in paths)):
        return Known()
    first, *others = map(_said_by, paths)
    same = all(replace(other, name=first.name) == first for other in others)
    return first if same else Known()


def _said_by(path: Path) -> Known:
    """Return what the recipe in a file, run or checkpoint says; nothing where none can be read."""
    if is_checkpoint(path):
        return of_run(RunFolder.around(path))
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if not path.is_file():
        return of_run(RunFolder.open(path))
    _, metadata = read_safetensors(path)
    text = metadata.get("tunekit.recipe")
    if text is None:
        return Known(name=path.stem)
    try:
        tree: dict[str, Any] = json.loads(text)
        base = Base.model_validate(tree["base"])
        data = Data.model_validate(tree["data"])
        evaluate = Evaluate.model_validate(tree["evaluate"])
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as fault:
        said = " ".join(str(fault).split())[:200]
        warnings.warn(f"{path}: the recipe in it is not one I read: {said}", stacklevel=2)
        return Known(name=path.stem)
    # Only the last name of a path was kept in the file: that is no place to look for a model, and a
    # path in it is no word of ours. Whose code is trusted, no file may say.
    bundled, of_hub = base.model == BUNDLED, hub.is_id(base.model)
    here = bundled or (of_hub and hub.here(base.model, base.revision))
    absent = base.model if of_hub and not here else None
    named = here and base.vae is None
    base = _full(base.model_copy(update={"trust_remote_code": False, "config": None}))
    return Known(base if named else None, data, evaluate, path.stem, base.clip_skip, absent)


def _full(base: Base) -> Base:
    """Return a recipe's base as files are made for: what training held in few bits is whole."""
    return base.model_copy(update={"quantize": None})
