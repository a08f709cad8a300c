"""The verbs that look after runs: which there are, how they stand, and whether they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tunekit.cli_options import AsJson, print_json

Folder = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FOLDER]", help="A run's folder, or one that holds runs.", show_default="runs"
    ),
]


class ListsByDefault(TyperGroup):
    """A verb of verbs where whatever is none of them is what `list` takes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` before arguments that begin with no verb."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs = typer.Typer(
    cls=ListsByDefault,
    rich_markup_mode=None,
    help="List runs, with how each stands and scored; or verify what they left. "
    "`tunekit runs [FOLDER]` lists.",
)


@runs.command("list")
def list_runs(folder: Folder = None, as_json: AsJson = False) -> None:
    """Say of each run whether it goes on, how far it came, and how much it learned."""
    from tunekit.runs import DEFAULT, listed, table

    found = listed(folder or DEFAULT)
    if as_json:
        print_json([run.as_dict() for run in found])
    else:
        typer.echo("\n".join(table(found)))


@runs.command("verify")
def verify_runs(folder: Folder = None, as_json: AsJson = False) -> None:
    """Check every byte of checkpoints and exports. Where something is damaged, exit code 1."""
    from tunekit.runs import DEFAULT, verified

    found = verified(folder or DEFAULT)
    if as_json:
        print_json([run.as_dict() for run in found])
    else:
        typer.echo("\n".join(line for run in found for line in run.lines()))
    raise typer.Exit(1 if any(run.faults for run in found) else 0)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    repo: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="The model repository; made if there is none.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make it a private one, where it is made.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send what a run exported to the Hugging Face Hub: files, model card, pictures.

    The access token is the Hub's own: HF_TOKEN, or what `hf auth login` stored.
    """
    from tunekit.push import push

    sent = push(run, repo, private=private, dry_run=dry_run)
    if as_json:
        print_json(sent.as_dict())
    else:
        typer.echo("\n".join(sent.lines()))
