"""Adapters merged with each other: one file that changes weights as all of them do together.

TIES is Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models"; DARE is Yu et
al. 2023, "Language Models are Super Mario"; both by peft's functions, on the weights' changes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import seeding
from tunekit.errors import UserError, did_you_mean
from tunekit.files import output
from tunekit.files.adapter import AdapterFile, Parts
from tunekit.files.cut import Cut, Keep, cut_factors, cut_matrix, product_norm
from tunekit.files.names import Place
from tunekit.files.opened import NewFile, Opened
from tunekit.files.report import Report, Row
from tunekit.progress import Reporter, Silent

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("concat", "svd", "ties", "dare_linear", "dare_ties")
_SEEDED = ("dare_linear", "dare_ties")
_DENSE = ("ties", *_SEEDED)


@dataclass(frozen=True)
class Way:
    """How changes become one. density: the share of numbers that TIES and DARE keep of each."""

    method: str = "concat"
    density: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, method: str, density: float | None, seed: int | None, keep: Keep) -> Way:
        """Check what a user asks for."""
        if method not in METHODS:
            near = did_you_mean(method, METHODS)
            raise UserError(f"--method: {method} is none of {', '.join(METHODS)}{near}")
        if (density is not None) != (method in _DENSE):
            wants = "needs --density" if density is None else "has no --density"
            raise UserError(f"--method: {method} {wants}: the share of numbers that are kept")
        if density is not None and not 0 < density <= 1:
            raise UserError(f"--density: {density:g} is no share: above 0, at most 1")
        if seed is not None and method not in _SEEDED:
            raise UserError(f"--seed: {method} draws nothing; it is for {', '.join(_SEEDED)}")
        if (keep == Keep()) != (method == "concat"):
            raise UserError(
                "--method: concat is exact and keeps all ranks; svd lowers them"
                if method == "concat"
                else f"--method: {method} needs --rank, --energy or --frobenius: how much of the "
                "sum is kept"
            )
        return cls(method, density, seed or 0)

    def joined(self, changes: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
        """Return one change for those of several adapters to a weight."""
        import torch

        sizes = torch.tensor(weights, dtype=torch.float32)
        if self.method not in _DENSE:
            return torch.stack([c * w for c, w in zip(changes, weights, strict=True)]).sum(0)
        from peft.utils import merge_utils

        with _drawing(self.seed, name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density")  # of 1: nothing is pruned
            merge: Callable[..., Tensor] = getattr(merge_utils, self.method)
            return merge(list(changes), sizes, self.density)


@contextlib.contextmanager
def _drawing(seed: int, name: str) -> Iterator[None]:
    """Have peft, which draws from the global stream, draw for this module alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(seed, f"dare/{name}"))
        yield


def mix(
    adapters: Sequence[tuple[Path, float]],
    new: NewFile,
    way: Way,
    keep: Keep,
    *,
    base: str | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Write one adapter file that does what several do together, each at its weight.

    way: how the changes become one; concat puts plain LoRAs' factors side by side and is exact.
    keep: how much is left by the others. base: as `sources.find_base`; its weights are needed only
    where an adapter's change depends on them. Raises UserError where the files do not fit one base.
    """
    new.check()
    opened = Opened.by(new, adapters[0][0], base)
    files = [(opened.file(path), weight) for path, weight in adapters]
    mixer = _Mixer(files, way, keep, opened)
    places = [place for place in opened.names.modules if any(place in f.places for f, _ in files)]
    rows: list[Row] = []
    told = ", ".join(f"{path.name} x {weight:g}" for path, weight in adapters)
    done = f"merged by {way.method}: {told}"
    with opened.output() as result:
        with (reporter or Silent()).stage("merge", len(places)) as tick:
            for place in places:
                made = mixer.module(place, rows)
                if made is not None:
                    result.refuse(made.kind, frozenset(made.factors), new.path.name)
                    result.add(place, made)
                tick()
        result.finish(opened.described(_common(files), done))
    remarks = [*(r for f, _ in files for r in f.remarks), *result.remarks]
    return Report(new.path, done, tuple(rows), tuple(remarks))


def _common(files: Sequence[tuple[AdapterFile, float]]) -> dict[str, str]:
    """Return the metadata that all files agree on; what differs is true of none."""
    first, *others = (file.metadata for file, _ in files)
    return {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}


@dataclass(frozen=True)
class _Mixer:
    files: Sequence[tuple[AdapterFile, float]]
    way: Way
    keep: Keep
    opened: Opened

    def module(self, place: Place, rows: list[Row]) -> Parts | None:
        """Return what the files together make of a module; None where they cancel out."""
        held = [(file, file.read(place), w) for file, w in self.files if place in file.places]
        name = ".".join(place)
        biases = [(p.factors["diff_b"], w) for _, p, w in held if "diff_b" in p.factors]
        weights = [one for one in held if one[1].factors.keys() - {"diff_b"}]
        parts: dict[str, Tensor] = {}
        if biases:
            changes = [bias.float() for bias, _ in biases]
            parts["diff_b"] = self.way.joined(changes, [w for _, w in biases], f"{name}.bias")
        if not weights:
            return Parts(parts, None, "whole") if parts else None
        cut = self._cut(place, weights)
        if not isinstance(cut, Cut):
            return Parts(parts | {"diff": cut}, None, "whole")
        if not cut.norm:
            return Parts(parts, None, "whole") if parts else None
        ranks = [file.rank(place) for file, *_ in weights]
        before = sum(rank for rank in ranks if rank) if None not in ranks else None
        rows.append(Row.of(name, before, cut))
        lora = output.lora(cut.up, cut.down)
        return Parts({**lora.factors, **parts}, lora.alpha, lora.kind)

    def _cut(self, place: Place, held: Sequence[tuple[AdapterFile, Parts, float]]) -> Cut | Tensor:
        import torch

        shape = self.opened.names.shape(place)
        if self.way.method in ("concat", "svd") and all(parts.plain for _, parts, _ in held):
            pairs = [parts.pair(shape) for _, parts, _ in held]
            ups = [up * w for (up, _), (*_, w) in zip(pairs, held, strict=True)]
            up, down = torch.cat(ups, 1), torch.cat([down for _, down in pairs])
            if self.way.method == "concat":
                return Cut(up, down, product_norm(up, down), 0.0)
            return cut_factors(up, down, self.keep)
        if self.way.method == "concat" and len(shape) > 1:
            other = next((file, parts) for file, parts, _ in held if not parts.plain)
            raise UserError(
                f"{other[0].path}: {other[0].places[place]} is {other[1].kind}, whose factors "
                "cannot stand beside others: choose --method svd with a rank"
            )
        changes = [
            file.change(place, parts, self.opened.weight(place, parts)) for file, parts, _ in held
        ]
        joined = self.way.joined(changes, [w for *_, w in held], ".".join(place))
        return cut_matrix(joined, self.keep) if len(shape) > 1 else joined
