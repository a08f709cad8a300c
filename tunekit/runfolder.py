"""The folder that a run leaves: where things stand in it, and how it is read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import UserError, did_you_mean
from tunekit.schema_tokens import file_word

if TYPE_CHECKING:
    from tunekit.recipe import Recipe

RECIPE = "recipe.yaml"
PICTURES = "pictures.json"
CHECKPOINTS = "checkpoints"
EXPORT = "export"


@dataclass(frozen=True)
class RunFolder:
    """A run that was started: its folder and its resolved recipe."""

    path: Path
    recipe: Recipe

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Read the run folder at `path`.

        The recipe's paths need not exist any more: the pictures of a finished run may be gone.
        Raises UserError where there is no run, RecipeError where its recipe is broken.
        """
        if not path.is_dir():
            raise UserError(f"{path}: there is no such run folder")
        if not (path / RECIPE).is_file():
            raise UserError(f"{path}: is no run folder: it has no {RECIPE}")
        return cls(path, _read(path / RECIPE))

    @classmethod
    def around(cls, checkpoint: Path) -> RunFolder:
        """Read the run that a checkpoint folder belongs to; UserError where it stands alone."""
        run = checkpoint.resolve().parent.parent
        if not (run / RECIPE).is_file():
            raise UserError(
                f"{checkpoint}: stands in no run folder; its {RECIPE}, two folders up, says which "
                "base and adapter it belongs to"
            )
        return cls.open(run)

    def checkpoint(self, name: str) -> Path:
        """Return the checkpoint folder called `name`, such as step-000200.

        Raises UserError that names the checkpoints there are.
        """
        folder = self.path / CHECKPOINTS
        found = {p.name for p in folder.iterdir() if p.is_dir()} if folder.is_dir() else set()
        known = sorted(name for name in found if not name.startswith("."))
        if name not in known:
            there = f"there is: {', '.join(known)}" if known else "there is none"
            raise UserError(
                f'{folder}: has no checkpoint "{name}"{did_you_mean(name, known)}; {there}'
            )
        return folder / name

    def exported(self) -> list[Path]:
        """Return the files that together hold what the run taught.

        That is the adapter in the first layout, and a file for each new word. Raises UserError
        where the run has not finished, or its export was refused.
        """
        recipe, endings = self.recipe, []
        if recipe.adapter is not None:
            endings.append(str(recipe.adapter.layouts(recipe.export.layouts)[0]))
        endings += [file_word(token.name) for token in recipe.tokens]
        return [self._exported(f"{recipe.name}-{ending}.safetensors") for ending in endings]

    def _exported(self, name: str) -> Path:
        path = self.path / EXPORT / name
        if path.is_file():
            return path
        refused = path.with_name(f"{path.name}.rejected")
        if refused.is_file():
            raise UserError(f"{path}: this run's export failed its verification ({refused.name})")
        raise UserError(
            f"{self.path}: has no {EXPORT}/{path.name}: the run has not finished; draw from one of "
            f"its {CHECKPOINTS} instead, such as --checkpoint step-000200"
        )


def _read(path: Path) -> Recipe:
    from pydantic import ValidationError

    from tunekit.recipe import Recipe, RecipeError
    from tunekit.recipe_source import from_file

    source = from_file(path)
    if source.faults:
        raise RecipeError(source.faults)
    try:
        return Recipe.model_validate(source.tree)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}") from fault
