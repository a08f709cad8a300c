"""The command line of drawing: `tunekit generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunekit.cli_options import AsJson, print_json, taking

if TYPE_CHECKING:
    from tunekit.request import Request


@dataclass(frozen=True)
class Asked:
    """The options that say what is drawn, each under its name in `request.Request`."""

    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="What to draw; may be given several times. {trigger} and {class} are filled in "
            "where a recipe says them.",
            show_default="the run's own",
        ),
    ] = None
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="A file of prompts, one a line, with --w, --h, --s, --l, --d and --n behind.",
            show_default=False,
        ),
    ] = None
    run: Annotated[Path | None, typer.Option(help="A run's folder.")] = None
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="FILE[:WEIGHT[:WEIGHT]]",
            help="An adapter file; may be given several times. Weight 1 is as it was trained; a "
            "second weight is for the text encoders.",
            show_default=False,
        ),
    ] = None
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A checkpoint of the run, such as step-000200, not its export."),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(help="toybox, a folder or a Hub id.", show_default="the run's or file's"),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(help="Hold the base in few bits, such as nf4.", show_default="the full base"),
    ] = None
    picture: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PICTURE",
            help="Draw a picture of ours again, as it says itself; other options go over that.",
            show_default=False,
        ),
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option("--negative", help="What the pictures should not show.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="The first picture's seed; the next count up.")
    ] = None
    count: Annotated[int | None, typer.Option(help="Pictures a prompt.")] = None
    batch: Annotated[
        int | None,
        typer.Option(help="Pictures of a prompt drawn at a time, 1 to 64.", show_default="1"),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps, 1 to 1000.", show_default="the run's, else 25"),
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance", help="Guidance, 0 to 100; 1: none.", show_default="the run's, else 5"
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(help="Sampler, such as ddim or euler.", show_default="the run's or base's"),
    ] = None
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None
    scale: Annotated[
        float | None,
        typer.Option(
            help="Strength of the adapters; 1 as trained, 0 the base alone.", show_default="1"
        ),
    ] = None
    text_scale: Annotated[
        float | None,
        typer.Option(help="The same in the text encoders.", show_default="that of --scale"),
    ] = None
    init: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="A picture to start from.", show_default=False),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of it is drawn anew, above 0 to 1.",
            show_default="0.75; 1 with --mask or --extend",
        ),
    ] = None
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="White where it may change; what is black stays as it is.",
            show_default=False,
        ),
    ] = None
    extend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIDE=PIXELS",
            help="Draw beyond it: left, top, right or bottom; may be given several times.",
            show_default=False,
        ),
    ] = None
    controlnet: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A ControlNet on this disk, as diffusers saves it.",
            show_default=False,
        ),
    ] = None
    control_image: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="What the ControlNet is given, such as edges.",
            show_default=False,
        ),
    ] = None
    control_scale: Annotated[
        float | None, typer.Option(help="How strongly it holds, 0 to 2.", show_default="1")
    ] = None

    def request(self) -> Request:
        """Return what they ask for; UserError for an adapter or a side that cannot be read."""
        from tunekit.generate import adapter_of
        from tunekit.request import Request, sides_of

        read = {
            "prompts": self.prompts or (),
            "adapters": [adapter_of(text) for text in self.adapters or ()],
            "extend": sides_of(self.extend or ()),
        }
        return Request(**vars(self) | read)


@taking(Asked)
def generate(
    asked: Asked,
    out: Annotated[
        Path | None, typer.Option(help="The folder.", show_default="a new one in generated/")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="png, webp (every pixel kept) or jpeg.")
    ] = "png",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace pictures that are there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a folder of pictures and a grid. A run, adapter files, or the base alone draws."""
    from tunekit.generate import generate as draw

    made = draw(
        asked.request(),
        out,
        overwrite=overwrite,
        form=form,
        progress=lambda drawn: typer.echo(
            f"{drawn.number}/{drawn.total}  {drawn.prompt} (seed {drawn.seed})", err=True
        ),
        note=lambda told: typer.echo(told, err=True),
    )
    if as_json:
        pictures = [str(path) for path in made.pictures]
        print_json({"folder": str(made.folder), "pictures": pictures, "grid": str(made.grid)})
    else:
        typer.echo(str(made.grid))
