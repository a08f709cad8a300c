"""The verbs about files: convert, merge, extract, resize."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.cli_options import AsJson, print_json, taking

if TYPE_CHECKING:
    from tunekit.files.merge import Request

File = Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors adapter file.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="toybox, a folder or a Hub id.", show_default="the file's"),
]
Config = Annotated[
    str | None,
    typer.Option(help="A folder that describes a base which is one file.", show_default=False),
]
Layout = Annotated[str, typer.Option("--to", help="Whose naming: diffusers or kohya.")]
Dtype = Annotated[str, typer.Option(help="Number format: fp16, bf16 or fp32.")]
OwnDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Number format: fp16, bf16 or fp32.", show_default="as it is"),
]
Rank = Annotated[int | None, typer.Option(help="Rank of each module, at most.")]
Energy = Annotated[
    float | None, typer.Option(help="Keep this share of each module's squared norm, 0 to 1.")
]
Frobenius = Annotated[
    float | None, typer.Option(help="Keep this share of each module's norm, 0 to 1.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there under that name already.")
]


def convert(
    file: File,
    to: Layout,
    out: Annotated[
        Path | None, typer.Option(help="The new file.", show_default="FILE-LAYOUT.safetensors")
    ] = None,
    base: BaseOption = None,
    dtype: OwnDtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Rename an adapter file for another client. Checked there and back, weight by weight."""
    from tunekit.files.convert import convert

    _show(convert(file, to, out=out, base=base, dtype=dtype, overwrite=overwrite), as_json)


@dataclass(frozen=True)
class Merging:
    """The options of `tunekit merge`, each under its name in `files.merge.Request`."""

    adapters: Annotated[
        list[str],
        typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapter files; weight 1 is as trained."),
    ]
    out: Annotated[Path, typer.Option(help="The folder, or the file with --into-adapter.")]
    into_adapter: Annotated[
        bool, typer.Option("--into-adapter", help="Merge into one adapter file, not into the base.")
    ] = False
    base: BaseOption = None
    config: Config = None
    variant: Annotated[
        str | None, typer.Option(help="Weight variant of the base, such as fp16.")
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="Of adapters: concat, svd, ties, dare_linear, dare_ties.", show_default="concat"
        ),
    ] = None
    rank: Rank = None
    energy: Energy = None
    frobenius: Frobenius = None
    density: Annotated[
        float | None, typer.Option(help="Share of the numbers that TIES and DARE keep, 0 to 1.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Of what DARE draws.", show_default="0")] = None
    to: Annotated[
        str | None,
        typer.Option(help="Of adapters: diffusers or kohya.", show_default="kohya"),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format: fp16, bf16 or fp32.", show_default="the base's; adapters: fp16"
        ),
    ] = None
    overwrite: Overwrite = False

    def request(self) -> Request:
        """Return what they ask for; UserError for a weight that is no number."""
        from tunekit.files.merge import Request
        from tunekit.generate import parse_adapter

        return Request(**vars(self) | {"adapters": [parse_adapter(text) for text in self.adapters]})


@taking(Merging)
def merge(asked: Merging, as_json: AsJson = False) -> None:
    """Merge adapters into a base, or with each other. Writes a diffusers folder or a file."""
    from tunekit.files.merge import merge
    from tunekit.progress import OnScreen

    _show(merge(asked.request(), OnScreen()), as_json)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A folder, Hub id or file.")],
    original: Annotated[
        str, typer.Option("--from", metavar="ORIGINAL", help="What it was tuned from.")
    ],
    out: Annotated[Path, typer.Option(help="The adapter file.")],
    rank: Rank = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    targets: Annotated[
        str, typer.Option(help="attention, attention+mlp or full, as adapter.targets.")
    ] = "full",
    config: Config = None,
    to: Layout = "kohya",
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a LoRA of what tuning did to a base. Says what the rank loses, module by module."""
    from tunekit.files.cut import Keep
    from tunekit.files.extract import extract
    from tunekit.files.opened import NewFile
    from tunekit.progress import OnScreen

    made = extract(
        tuned,
        original,
        NewFile(out, to, dtype, overwrite),
        Keep.of(rank, energy, frobenius),
        targets=targets,
        config=config,
        reporter=OnScreen(),
    )
    _show(made, as_json)


def resize(
    file: File,
    out: Annotated[Path, typer.Option(help="The new file.")],
    rank: Rank = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    to: Layout = "kohya",
    base: BaseOption = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a plain LoRA of another rank of any adapter. Says what is kept, module by module."""
    from tunekit.files.cut import Keep
    from tunekit.files.opened import NewFile
    from tunekit.files.resize import resize
    from tunekit.progress import OnScreen

    new, keep = NewFile(out, to, dtype, overwrite), Keep.of(rank, energy, frobenius)
    _show(resize(file, new, keep, base=base, reporter=OnScreen()), as_json)


def _show(made: Any, as_json: bool) -> None:
    if as_json:
        print_json(made.as_dict())
    else:
        typer.echo("\n".join(made.lines()))
