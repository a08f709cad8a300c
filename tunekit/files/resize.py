"""An adapter as a plain LoRA of another rank, whatever kind it is; and what that loses."""

from __future__ import annotations

from pathlib import Path

from tunekit.errors import UserError
from tunekit.files import output, sources
from tunekit.files.adapter import AdapterFile, Parts, metadata_of
from tunekit.files.cut import Keep, cut_factors, cut_matrix
from tunekit.files.names import Names
from tunekit.files.report import Report, Row
from tunekit.progress import Reporter, Silent


def resize(
    path: Path,
    out: Path,
    keep: Keep,
    *,
    layout: str = "kohya",
    dtype: str | None = "fp16",
    base: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Report:
    """Write the adapter at `path` as a plain LoRA with as much of every module as `keep` says.

    What depends on the base's weights (DoRA, OFT, BOFT) is reckoned on those of `base`, see
    `sources.find_base`. Differences of norms and biases stay whole, which kohya's naming alone can
    carry. Raises UserError as its parts do.
    """
    output.check_out(out, overwrite)
    if keep == Keep():
        raise UserError("name --rank, --energy or --frobenius: how much of every module is kept")
    chosen = sources.find_base(base, metadata_of(path), path)
    family = sources.outline(chosen)
    names = Names(family)
    file, needed = AdapterFile(path, names), sources.Needed(chosen, family, names)
    rows: list[Row] = []
    still = []
    done = f"resized from {path.name}"
    with output.Output(out, layout, names, dtype) as result:
        with (reporter or Silent()).stage("resize", len(file.places)) as tick:
            for place in file.places:
                tick()
                parts, shape = file.read(place), names.shape(place)
                whole = {f: t for f, t in parts.factors.items() if f == "diff_b" or len(shape) == 1}
                if whole:
                    result.refuse("differences of whole tensors", frozenset(whole), str(path))
                    result.add(place, Parts(whole, None, "whole"))
                if parts.factors.keys() == whole.keys():
                    continue
                if parts.plain:
                    cut = cut_factors(*parts.pair(shape), keep)
                else:
                    cut = cut_matrix(file.change(place, parts, needed.weight(place, parts)), keep)
                if not cut.norm:
                    still.append(".".join(place))
                    continue
                rows.append(Row.of(".".join(place), file.rank(place), cut))
                result.add(place, output.lora(cut.up, cut.down))
        if still:
            result.remarks.append(
                f"{len(still)} modules change nothing and are left out, such as {still[0]}"
            )
        result.finish(output.described(names, family.facts(), out.stem, file.metadata, done))
    return Report(out, done, tuple(rows), (*file.remarks, *result.remarks))
