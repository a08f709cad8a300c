"""What several verbs of the command line take and print alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Other values for keys of the recipe, such as train.steps=500.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]


def print_json(value: Any) -> None:
    """Print a result as JSON, as people read it."""
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
