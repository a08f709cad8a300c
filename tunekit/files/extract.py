"""The difference of two bases as an adapter: what tuning did to each weight, at a lower rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunekit.errors import UserError
from tunekit.files import output
from tunekit.files.cut import Keep, cut_matrix
from tunekit.files.names import Names, Place
from tunekit.files.opened import NewFile, Opened
from tunekit.files.report import Report, Row
from tunekit.files.sources import Weights, base_called, check_config, outline
from tunekit.files.sources import targets as targeted
from tunekit.modelcard import portable
from tunekit.progress import Reporter, Silent

if TYPE_CHECKING:
    from torch import Tensor


def extract(
    tuned: str,
    original: str,
    new: NewFile,
    keep: Keep,
    *,
    targets: str = "full",
    config: str | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Write tuned - original as a LoRA: the nearest of its rank to each weight's difference.

    tuned, original: folders, Hub ids or files of one family; files are described by the folder
    `config`. targets: a preset of the family, as in
    recipes; what changed outside it is told and left out. Raises UserError where the two are not
    of one form, or nothing in the targets differs.
    """
    new.check()
    if keep == Keep():
        raise UserError("name --rank, --energy or --frobenius: how much of every module is kept")
    check_config(config, original, tuned)
    base, later = (base_called(model, config) for model in (original, tuned))
    opened = Opened(new, base)
    family, before = opened.family, opened.weights
    other = outline(later)
    if type(other) is not type(family):
        raise UserError(f"{tuned}: is {other.name}, and {original} is {family.name}")
    after = Weights(later, other, Names(other))
    chosen = targeted(family, targets)
    rows: list[Row] = []
    left: list[tuple[str, float]] = []
    pairs = list(_pairs(before, after))
    done = f"extracted from {portable(tuned)} less {portable(original)}"
    with opened.output() as result:
        with (reporter or Silent()).stage("extract", len(pairs)) as tick:
            for name, place, which in pairs:
                tick()
                change = _difference(before, after, name)
                norm = float(change.norm())
                if not norm:
                    continue
                if place is None or place not in chosen or which != "weight":
                    left.append((".".join(name), norm))
                    continue
                cut = cut_matrix(change, keep)
                rows.append(Row.of(".".join(place), None, cut))
                result.add(place, output.lora(cut.up, cut.down))
        result.finish(opened.described({}, done))
    remarks = (*before.remarks, *after.remarks, *result.remarks)
    return Report(new.path, done, tuple(rows), remarks, tuple(left))


def _pairs(before: Weights, after: Weights) -> Iterator[tuple[tuple[str, str], Place | None, str]]:
    """Yield (component, wide name), place and which of every tensor that both bases have."""
    for component, table in before.tables.items():
        others = after.tables[component]
        odd = sorted(table.keys() ^ others.keys())
        if odd:
            holder = before if odd[0] in table else after
            raise UserError(
                f"{before.label} and {after.label} are not of one form: {odd[0]} of {component} is "
                f"only in {holder.label}"
            )
        for wide, (file, entry) in table.items():
            other, one = others[wide]
            shapes = file.forms[entry.name].shape, other.forms[one.name].shape
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{before.label} and {after.label} are not of one form: {wide} of {component} "
                    f"is {list(shapes[0])} and {list(shapes[1])}"
                )
            yield (component, wide), entry.place, entry.which


def _difference(before: Weights, after: Weights, name: tuple[str, str]) -> Tensor:
    component, wide = name
    (one, first), (two, second) = before.tables[component][wide], after.tables[component][wide]
    return two.read(second.name).float() - one.read(first.name).float()
