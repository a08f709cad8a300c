"""The command line: each verb parses, calls and prints. What is called is imported in the verb."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tunekit import cli_data, cli_files, cli_generate, cli_runs
from tunekit.cli_options import AsJson, Overrides, RecipeFile, print_json
from tunekit.errors import UserError

app = typer.Typer(
    name="tunekit",
    help="Teach a diffusion model one new thing from a handful of pictures, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take longer to import than plain help takes to print
)
# A disk that is full or may not be written to is for the user to mend, whoever ran into it.
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
# So is a name that leads nowhere.
_MENDABLE |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
LATEST = "latest"


def main() -> NoReturn:
    """Run the command line. A user's fault is told in plain lines on stderr, with exit code 2."""
    try:
        app(_with_latest(sys.argv[1:]))
    except UserError as exc:
        from tunekit.data.records import printable
        from tunekit.redaction import without_secrets

        # What is named in it may be anybody's: a file's name may hold what drives a terminal.
        # So may a secret be: a password in a URL, or a token.
        told = without_secrets(str(exc))
        typer.echo("\n".join(map(printable, told.split("\n"))), err=True)
    except OSError as exc:
        if exc.errno not in _MENDABLE:
            raise
        typer.echo(f"{exc.filename or 'tunekit'}: {exc.strerror}", err=True)
    else:
        sys.exit(0)
    sys.exit(2)


def _with_latest(arguments: list[str]) -> list[str]:
    """Return the arguments with `--resume` as `--resume LATEST` where no checkpoint follows it.

    A recipe file that follows it is the recipe: checkpoints are folders, such as step-000200.
    """
    words: list[str] = []
    for number, word in enumerate(arguments):
        words.append(word)
        after = arguments[number + 1] if number + 1 < len(arguments) else "-"
        recipe = Path(after).suffix.lower() in (".yaml", ".yml")
        if word == "--resume" and (after.startswith("-") or "=" in after or recipe):
            words.append(LATEST)
    return words


def _version(wanted: bool) -> None:
    if wanted:
        import tunekit

        typer.echo(tunekit.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder.", show_default="runs/NAME of the recipe"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is there already.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[CHECKPOINT]",
            help="Go on with the run that is there, from its last checkpoint or the one named.",
            show_default=False,
        ),
    ] = None,
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume though the recipe is another one.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train with so many processes on this machine, which share every batch out; "
            "where there are GPUs, one on each.",
            show_default="1",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Teach what a recipe says. The adapter, samples, scores and a report stay in a folder."""
    from tunekit import launch, ranks
    from tunekit.interrupts import Interrupted
    from tunekit.run import Request, train_as

    if (processes or 1) > 1 and ranks.started() == 1:
        options = {"--out": out, "--resume": resume, "--processes": processes}
        flags = {"--overwrite": overwrite, "--allow-changed": allow_changed, "--json": as_json}
        raise typer.Exit(launch.train(recipe, overrides or (), options, flags))
    point = resume is not None if resume in (None, LATEST) else resume
    asked = Request(recipe, overrides or (), out, overwrite, point, allow_changed)
    try:
        with ranks.joined(processes) as own:
            run = train_as(own, asked)
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(stopped.exit_code) from None
    except ranks.RankLostError as lost:
        if not lost.watched:
            typer.echo(str(lost), err=True)
        raise typer.Exit(lost.exit_code) from None
    if run is None:  # one of several processes, of which the first tells
        return
    if as_json:
        print_json(run.as_dict())
    else:
        typer.echo("\n".join(run.lines()))


@app.command()
def validate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the recipe with every default written out.")
    ] = False,
) -> None:
    """Check a recipe. What it names on this disk is looked at, nothing is loaded."""
    from tunekit.recipe import dump_yaml, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    typer.echo(dump_yaml(loaded) if show else f"{recipe}: is valid", nl=not show)


@app.command()
def schema(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print tables for people, not JSON for editors.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes. It has every key's meaning, unit, range and default."""
    if as_markdown:
        from tunekit.reference import markdown

        typer.echo(markdown(), nl=False)
    else:
        from tunekit.recipe import json_schema

        print_json(json_schema())


app.command()(cli_data.inspect)
app.command()(cli_data.plan)
app.command()(cli_data.caption)
app.add_typer(cli_data.cache, name="cache")
app.add_typer(cli_runs.runs, name="runs")
app.command()(cli_runs.push)
app.command()(cli_files.convert)
app.command()(cli_files.merge)
app.command()(cli_files.extract)
app.command()(cli_files.resize)
app.command()(cli_generate.generate)


@app.command()
def info(
    file: cli_files.File,
    base: Annotated[
        str | None,
        typer.Option(help="toybox, a folder or a Hub id: compare the names with its modules."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe an adapter file. Says kind, ranks, norms, metadata, and what looks wrong in it."""
    from tunekit.info import describe

    described = describe(file, base)
    if as_json:
        print_json(described.as_dict())
    else:
        typer.echo("\n".join(described.lines()))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Describe this machine and installation. Where something is missing, the exit code is 1."""
    from tunekit.doctor import examine

    report = examine()
    if as_json:
        print_json(report.as_dict())
    else:
        typer.echo("\n".join(report.lines()))
    raise typer.Exit(0 if report.ok else 1)
