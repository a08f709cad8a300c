"""An adapter as a plain LoRA of another rank, whatever kind it is; and what that loses."""

from __future__ import annotations

from pathlib import Path

from tunekit.errors import UserError
from tunekit.files import output
from tunekit.files.adapter import Parts
from tunekit.files.cut import Keep, cut_factors, cut_matrix
from tunekit.files.opened import NewFile, Opened
from tunekit.files.report import Report, Row
from tunekit.progress import Reporter, Silent


def resize(
    path: Path,
    new: NewFile,
    keep: Keep,
    *,
    base: str | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Write the adapter at `path` as a plain LoRA with as much of every module as `keep` says.

    What depends on the base's weights (DoRA, OFT, BOFT) is reckoned on those of `base`, see
    `sources.find_base`. Differences of norms and biases stay whole, which kohya's naming alone can
    carry. Raises UserError as its parts do.
    """
    new.check()
    if keep == Keep():
        raise UserError("name --rank, --energy or --frobenius: how much of every module is kept")
    opened = Opened.by(new, path, base)
    file = opened.file(path)
    rows: list[Row] = []
    still = []
    done = f"resized from {path.name}"
    with opened.output() as result:
        with (reporter or Silent()).stage("resize", len(file.places)) as tick:
            for place in file.places:
                tick()
                parts, shape = file.read(place), opened.names.shape(place)
                whole = {f: t for f, t in parts.factors.items() if f == "diff_b" or len(shape) == 1}
                if whole:
                    result.refuse("differences of whole tensors", frozenset(whole), str(path))
                    result.add(place, Parts(whole, None, "whole"))
                if parts.factors.keys() == whole.keys():
                    continue
                if parts.plain:
                    cut = cut_factors(*parts.pair(shape), keep)
                else:
                    cut = cut_matrix(file.change(place, parts, opened.weight(place, parts)), keep)
                if not cut.norm:
                    still.append(".".join(place))
                    continue
                rows.append(Row.of(".".join(place), file.rank(place), cut))
                result.add(place, output.lora(cut.up, cut.down))
        if still:
            result.remarks.append(
                f"{len(still)} modules change nothing and are left out, such as {still[0]}"
            )
        result.finish(opened.described(file.metadata, done))
    return Report(new.path, done, tuple(rows), (*file.remarks, *result.remarks))
