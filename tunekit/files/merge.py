"""What `tunekit merge` is asked for: adapters into a base, or with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunekit.errors import UserError
from tunekit.files import folder, mix
from tunekit.files.cut import Keep
from tunekit.files.folder import Merged
from tunekit.files.opened import NewFile
from tunekit.files.report import Report
from tunekit.progress import Reporter

_OF_A_BASE = ("variant", "config")
_OF_ADAPTERS = ("method", "rank", "energy", "frobenius", "density", "seed", "to")


@dataclass(frozen=True)
class Request:
    """Adapter files, each with its weight, and what becomes of them; None: what is usual.

    into_adapter: one adapter file at `out`; otherwise a base's folder. to: the file's naming. The
    others are as in `folder.merge`, `mix.Way.of` and `Keep.of`.
    """

    adapters: Sequence[tuple[Path, float]]
    out: Path
    into_adapter: bool = False
    base: str | None = None
    config: str | None = None
    variant: str | None = None
    method: str | None = None
    rank: int | None = None
    energy: float | None = None
    frobenius: float | None = None
    density: float | None = None
    seed: int | None = None
    to: str | None = None
    dtype: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise UserError for an option that means nothing to what is made."""
        for name in _OF_A_BASE if self.into_adapter else _OF_ADAPTERS:
            if getattr(self, name) is None:
                continue
            if self.into_adapter:
                raise UserError(f"--{name}: is of a base that is merged into; leave it out")
            raise UserError(f"--{name}: is for --into-adapter; a base takes every change whole")


def merge(asked: Request, reporter: Reporter | None = None) -> Merged | Report:
    """Merge adapters as it is asked for; UserError as `folder.merge` and `mix.mix`."""
    asked.check()
    if not asked.into_adapter:
        return folder.merge(
            asked.adapters,
            asked.out,
            base=asked.base,
            config=asked.config,
            variant=asked.variant,
            dtype=asked.dtype,
            overwrite=asked.overwrite,
            reporter=reporter,
        )
    keep = Keep.of(asked.rank, asked.energy, asked.frobenius)
    way = mix.Way.of(asked.method or "concat", asked.density, asked.seed, keep)
    new = NewFile(asked.out, asked.to or "kohya", asked.dtype or "fp16", asked.overwrite)
    return mix.mix(asked.adapters, new, way, keep, base=asked.base, reporter=reporter)
