"""The verbs before a run: inspect, plan, caption, and what is cached."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from tunekit.cli_options import AsJson, Overrides, RecipeFile, print_json


def inspect(
    target: Annotated[
        Path, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, or pictures alone.")
    ],
    overrides: Overrides = None,
    trigger: Annotated[str | None, typer.Option(help="data.trigger, for a folder.")] = None,
    class_noun: Annotated[
        str | None, typer.Option("--class", help="data.class, for a folder.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels.", show_default="the recipe's; 512 for a folder")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a contact sheet to this .html file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at the pictures before training. Exit code 2 where training would refuse them."""
    from tunekit.inspection import inspect
    from tunekit.progress import OnScreen

    with contextlib.ExitStack() as held:  # the page and the table read the pictures once more
        found = inspect(
            target,
            overrides or (),
            trigger=trigger,
            class_noun=class_noun,
            resolution=resolution,
            reporter=OnScreen(),
            held=held,
        )
        if html is not None:
            found.save(html)
        if as_json:
            print_json(found.as_dict())
        else:
            typer.echo("\n".join(found.lines()))
    raise typer.Exit(0 if found.ok else 2)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Prepare the run, take five steps, and tell the time."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run will train and take. Memory is told, and what would lower it."""
    from tunekit.plan import plan
    from tunekit.progress import OnScreen

    made = plan(recipe, overrides or (), probe=probe, reporter=OnScreen())
    if as_json:
        print_json(made.as_dict())
    else:
        typer.echo("\n".join(made.lines()))
    raise typer.Exit(0 if made.ok else 2)


def caption(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of pictures, .parquet file, .tar shard, or dataset on the Hub.",
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="The captioner's own settings, such as model=FOLDER.",
            show_default=False,
        ),
    ] = None,
    captioner: Annotated[
        str, typer.Option(help="Who looks: ranking, image_text or tagger.")
    ] = "ranking",
    out: Annotated[
        Path | None,
        typer.Option(help="A .jsonl file.", show_default="where the folder's captions stand"),
    ] = None,
    instruction: Annotated[
        str, typer.Option(help="What to describe, for captioners that follow one.")
    ] = "",
    trigger: Annotated[str, typer.Option(help="Put this word before the class noun.")] = "",
    class_noun: Annotated[
        str, typer.Option("--class", help="What the subject is; what makes it itself is left out.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write new captions over those that are there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write captions for pictures that have none, for review. A stopped command goes on."""
    from tunekit.captioning import caption
    from tunekit.progress import OnScreen

    reporter = OnScreen()
    made = caption(
        source,
        captioner,
        options or (),
        out=out,
        instruction=instruction,
        trigger=trigger,
        class_noun=class_noun,
        overwrite=overwrite,
        reporter=reporter,
    )
    if as_json:
        print_json(made.as_dict())
        return
    for line in made.lines():
        typer.echo(line)
    for remark in made.told():
        reporter.note(remark)


cache = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="What is kept between runs: encoded pictures and words, pictures of streams and classes.",
)


@cache.command("ls")
def list_cache(as_json: AsJson = False) -> None:
    """Say what the cache holds, and how much it may."""
    from tunekit.data.cache import Cache
    from tunekit.data.upkeep import as_dict, lines

    kept = Cache()
    held = kept.usage()
    if as_json:
        print_json(as_dict(kept.root, held))
    else:
        typer.echo("\n".join(lines(kept.root, held)))


@cache.command("prune")
def prune_cache(
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What may stay, such as 10GB.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove what was not used for, such as 30d.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what was used longest ago. Without an option, down to the size that runs keep to."""
    from tunekit.data.cache import Cache
    from tunekit.data.upkeep import wanted

    pruned = Cache().prune(*wanted(max_size, older_than, everything))
    if as_json:
        print_json(pruned.as_dict())
    else:
        typer.echo(str(pruned))
