"""An adapter file in another client's naming, compared with what it was, there and back."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import UserError
from tunekit.files import output
from tunekit.files.adapter import AdapterFile, Parts, like, share
from tunekit.files.cut import product_norm
from tunekit.files.names import Names, Place
from tunekit.files.opened import NewFile, Opened

if TYPE_CHECKING:
    from torch import Tensor

# Of each module's change: fp32 rounds at 6e-8, half precision (asked for by --dtype) at these.
ALLOWED = {None: 1e-6, "fp32": 1e-6, "fp16": 2e-3, "bf16": 1.5e-2}


@dataclass(frozen=True)
class Converted:
    """What `convert` did. there, back: the worst module's error as a share of its change, between
    the file and its conversion, and between the file and the conversion converted back."""

    path: Path
    source: str
    layout: str
    base: str
    modules: int
    kinds: tuple[str, ...]
    there: float
    back: float
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what was done, for people."""
        return [
            *self.remarks,
            f"{self.path}: {self.modules} modules ({', '.join(self.kinds)}) from {self.source} to "
            f"{self.layout}, named by {self.base}",
            f"compared module by module: the change of every weight is that of the file "
            f"(off by {self.there:.1e} at most), and again when converted back ({self.back:.1e})",
        ]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {**vars(self), "path": str(self.path)}


def convert(
    path: Path,
    layout: str,
    *,
    out: Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write an adapter file in the naming of `layout` ("diffusers" or "kohya").

    out: the file; None: beside the source, as NAME-LAYOUT.safetensors. base: whose modules it
    changes, see `sources.find_base`. dtype: of the tensors, as `Output`. Raises UserError for what
    cannot be read or carried whole, and where the comparison fails; the file is not there then.
    """
    new = NewFile(
        out or path.with_name(f"{path.stem}-{layout}.safetensors"), layout, dtype, overwrite
    )
    new.check()
    opened = Opened.by(new, path, base)
    names, out = opened.names, new.path
    file = opened.file(path)
    kinds = set()
    done = f"converted from {file.layout} to {layout}"
    # It is the same adapter, so that its title, recipe and all that is its own stay.
    metadata = output.described(names, opened.family.facts(), path.stem, file.metadata, done)
    with contextlib.ExitStack() as held:
        result = held.enter_context(opened.output())
        for place, factors in file.kinds().items():
            parts = file.read(place)
            result.refuse(parts.kind, factors, str(path))
            kinds.add(parts.kind)
            result.add(place, parts)
        near = Path(held.enter_context(tempfile.TemporaryDirectory(".part", ".", out.parent)))
        result.path = near / out.name
        result.finish(metadata)
        there = _compare(file, AdapterFile(result.path, names))
        turned = _turned(result.path, near / "back.safetensors", file.layout, names)
        back = _compare(file, AdapterFile(turned, names))
        for error, way in ((there, "conversion"), (back, "conversion and back")):
            if not error <= ALLOWED[dtype]:
                raise UserError(
                    f"{path}: the {way} changes weights by up to {error:.1e} of their change: "
                    "nothing was written"
                )
        result.path.replace(out)
    return Converted(
        out,
        file.layout,
        layout,
        names.label,
        result.modules,
        tuple(sorted(kinds)),
        there,
        back,
        (*file.remarks, *result.remarks),
    )


def _turned(path: Path, out: Path, layout: str, names: Names) -> Path:
    """Write a file in another layout, whether or not a client would read it."""
    file = AdapterFile(path, names)
    with output.Output(out, layout, names, None) as result:
        for place in file.places:
            result.add(place, file.read(place))
        result.finish({})
    return out


def _compare(one: AdapterFile, other: AdapterFile) -> float:
    """Return the worst module's error, as a share of its change."""
    assert one.places.keys() >= other.places.keys()
    return max(
        _difference(one, other, place) if place in other.places else _left_out(one, place)
        for place in one.places
    )


def _left_out(one: AdapterFile, place: Place) -> float:
    """Return 0 where a module does not change: joined with others it then has no rank left."""
    parts = one.read(place)
    still = parts.plain and not bool(parts.factors["up"].any())
    return (
        0.0
        if still and not bool(parts.factors.get("diff_b", parts.factors["up"]).any())
        else math.inf
    )


def _difference(one: AdapterFile, other: AdapterFile, place: Place) -> float:
    """Return how far two files are apart on a module.

    What depends on the weight is compared before it meets it: the product, and each factor that
    acts on the weight by itself.
    """
    ours, theirs = one.read(place), other.read(place)
    worst = [0.0]
    alone = ["diff_b", "magnitude", "oft_blocks"]
    for name in alone:
        if (name in ours.factors) != (name in theirs.factors):
            return math.inf
        if name in ours.factors:
            worst.append(_off(ours.factors[name].flatten(), theirs.factors[name].flatten()))
    if {"oft_blocks"} <= ours.factors.keys() and ours.alpha != theirs.alpha:
        return math.inf
    bare = [_without(parts, alone) for parts in (ours, theirs)]
    if all(parts.plain for parts in bare):
        worst.append(_products_off(*(parts.pair(one.names.shape(place)) for parts in bare)))
    elif bare[0].factors:
        stand_in = like(one.names, place)
        worst.append(
            _off(*(f.change(place, p, stand_in) for f, p in zip((one, other), bare, strict=True)))
        )
    return max(worst)


def _without(parts: Parts, names: list[str]) -> Parts:
    left = {name: part for name, part in parts.factors.items() if name not in names}
    return Parts(left, parts.alpha, parts.kind)


def _products_off(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return `_off` of two low-rank products, of which neither is ever made."""
    import torch

    up, down = torch.cat([one[0], -other[0]], 1), torch.cat([one[1], other[1]])
    return share(product_norm(up, down), product_norm(*one))


def _off(one: Tensor, other: Tensor) -> float:
    wide = one.float()
    return share(float((wide - other.float()).norm()), float(wide.norm()))
