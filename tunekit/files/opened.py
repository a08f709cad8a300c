"""What a tool that makes an adapter file begins with: the file, and a base for its names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.files import output
from tunekit.files.adapter import AdapterFile, Parts, like, metadata_of
from tunekit.files.names import Names, Place
from tunekit.files.sources import Weights, find_base, outline
from tunekit.schema import Base

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


@dataclass(frozen=True)
class NewFile:
    """The adapter file to make: whose naming (`layout`), its tensors' format (`dtype`: "fp32",
    "fp16", "bf16"; None: as each is), and whether it may replace what is at `path`."""

    path: Path
    layout: str = "kohya"
    dtype: str | None = "fp16"
    overwrite: bool = False

    def check(self) -> None:
        """Raise UserError where it cannot be made, before anything is read."""
        output.check_options(self.layout, self.dtype)
        output.check_out(self.path, self.overwrite)


class Opened:
    """A base without its weights, by whose names adapter files are read and a new one is written.

    Raises UserError for what is no base.
    """

    def __init__(self, new: NewFile, base: Base) -> None:
        self.new, self.base = new, base
        self.family = outline(base)
        self.names = Names(self.family)

    @classmethod
    def by(cls, new: NewFile, path: Path, asked: str | None) -> Self:
        """Return it with the base that is `asked` for, or else the one that the file at `path`
        names; see `sources.find_base`."""
        return cls(new, find_base(asked, metadata_of(path), path))

    def file(self, path: Path) -> AdapterFile:
        """Return an adapter file, by the base's names."""
        return AdapterFile(path, self.names)

    @functools.cached_property
    def weights(self) -> Weights:
        """The base's weights where they lie."""
        return Weights(self.base, self.family, self.names)

    def weight(self, place: Place, parts: Parts) -> Tensor:
        """Return what the change of `parts` is reckoned on: the weight, or its shape alone."""
        return self.weights.read(place) if parts.needs_weight else like(self.names, place)

    def output(self) -> output.Output:
        """Return the file in the making."""
        return output.Output(self.new.path, self.new.layout, self.names, self.new.dtype)

    def described(self, carried: Mapping[str, str], done: str) -> dict[str, str]:
        """Return the file's metadata: of another adapter than the one it `carried` on from.

        done: what was done to make it, in words.
        """
        title = self.new.path.stem
        own = output.of_another(carried)
        return output.described(self.names, self.family.facts(), title, own, done)
