"""What several verbs of the command line take and print alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, TypeVar

import typer

Options = TypeVar("Options")

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


def taking(
    options: type[Options],
) -> Callable[[Callable[Concatenate[Options, ...], None]], Callable[..., None]]:
    """Hand a verb, as its first argument, the options that a dataclass declares, one a field.

    Its other parameters are options of its own, and come after those.
    """

    def of(verb: Callable[Concatenate[Options, ...], None]) -> Callable[..., None]:
        fields = inspect.signature(options, eval_str=True).parameters
        own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]

        @functools.wraps(verb)
        def typed(**given: Any) -> None:
            verb(options(**{name: given.pop(name) for name in fields}), **given)

        shown: Any = typed  # what typer reads a verb's options from
        shown.__signature__ = inspect.Signature([*fields.values(), *own])
        shown.__annotations__ = {p.name: p.annotation for p in (*fields.values(), *own)}
        return typed

    return of
