"""Weights in which a client holds the rows of several of ours: factors joined, and taken apart.

The first releases of transformers ask for query, key and value with one matrix; ours do so with
three. Rows of a product up @ down are rows of up, so that nothing is lost either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The factors whose rows are the weight's rows; of the others every part needs the whole.
_BY_ROW = frozenset({"up", "diff", "diff_b", "hada_w1_a", "hada_w2_a", "magnitude"})
_SHARED = frozenset({"down", "mid", "hada_w1_b", "hada_w2_b", "alpha"})


@dataclass(frozen=True)
class Piece:
    """The rows `first` to `last` (excluded) of the weight of `module`."""

    module: str
    first: int
    last: int


@dataclass(frozen=True)
class Joint:
    """A client's weight, whose rows are pieces of ours. name: dotted, in the client's model."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Our modules, in the order of their first rows."""
        return tuple(dict.fromkeys(piece.module for piece in self.pieces))

    @property
    def kohya(self) -> str:
        """Its name in sd-scripts' files."""
        return f"lora_unet_{self.name.replace('.', '_')}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its names in files, that of sd-scripts first; the dotted ones are ComfyUI's."""
        under = self.name.replace(".", "_")
        return self.kohya, f"diffusion_model.{self.name}", self.name, f"lycoris_{under}"

    def rows(self, module: str, whole: Tensor) -> Tensor:
        """Return a module's rows of what has all of them, in the module's own order."""
        import torch

        found, start = [], 0
        for piece in self.pieces:
            end = start + piece.last - piece.first
            if piece.module == module:
                found.append((piece.first, whole[start:end]))
            start = end
        if start != len(whole):
            raise ValueError(f"it has {len(whole)} rows, and {self.name} has {start}")
        return torch.cat([rows for _, rows in sorted(found, key=lambda one: one[0])])


def by_module(joints: Sequence[Joint]) -> dict[str, Joint]:
    """Return what holds the rows of each of our modules."""
    return {module: joint for joint in joints for module in joint.modules}


def by_name(joints: Sequence[Joint]) -> dict[str, Joint]:
    """Return joints by whatever files call them."""
    return {name: joint for joint in joints for name in joint.spellings}


def join(
    joint: Joint, held: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float]
) -> tuple[dict[str, Tensor], float]:
    """Return one low-rank product for those of several modules, and what it is multiplied with.

    held: module -> "down" [r, in] and "up" [out, r], or kernels, and perhaps "diff_b" [out].
    scales: what each product is multiplied with. The ranks add up, but for modules with the same
    down, and each up stands beside zeros; the rows of modules that are not held are zero.
    """
    import torch

    columns: dict[str, tuple[int, int]] = {}
    downs: list[Tensor] = []
    for module in (name for name in joint.modules if name in held):
        down = held[module]["down"]
        twin = next((m for m in columns if _equal(held[m]["down"], down)), None)
        start = sum(map(len, downs))
        columns[module] = columns[twin] if twin is not None else (start, start + len(down))
        downs += [] if twin is not None else [down]
    rank, scale = sum(map(len, downs)), scales[next(iter(columns))]
    ups, shifts = [], []
    for piece in joint.pieces:
        own = held.get(piece.module)
        like = held[next(iter(columns))]["up"]
        rows = like.new_zeros(piece.last - piece.first, rank, *like.shape[2:])
        if own is not None:
            first, last = columns[piece.module]
            share, up = scales[piece.module] / scale, own["up"][piece.first : piece.last]
            up = up if share == 1 else up.float() * share
            rows = rows.to(up.dtype)
            rows[:, first:last] = up
        ups.append(rows)
        bias = None if own is None else own.get("diff_b")
        shifts.append(like.new_zeros(len(rows)) if bias is None else bias[piece.first : piece.last])
    made = {"down": torch.cat(downs), "up": torch.cat(ups)}
    if any("diff_b" in own for own in held.values()):
        made["diff_b"] = torch.cat(shifts)
    return made, scale


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def separate(joint: Joint, factors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the factors of each of our modules, of the factors of all that a client holds in one.

    factors: by the names of `tunekit.factors.group`. Ranks that a module has nothing of are cut out
    of its product, its alpha with them. Modules that do not change are left out, unless none does.
    Raises ValueError for kinds of which no rows can be told apart, and for another number of rows.
    """
    if len(joint.pieces) == 1:
        return {joint.modules[0]: dict(factors)}
    if strange := sorted(factors.keys() - _BY_ROW - _SHARED):
        raise ValueError(
            f"{strange[0]} acts on all rows of {joint.name} together, and this base holds them as "
            + " and ".join(joint.modules)
        )
    parts = {}
    for module in joint.modules:
        own = {f: joint.rows(module, t) if f in _BY_ROW else t for f, t in factors.items()}
        parts[module] = _narrowed(own) if own.keys() >= {"down", "up"} else own
    changing = {
        module: own
        for module, own in parts.items()
        if any(bool(own[f].any()) for f in ("up", "diff", "diff_b", "hada_w1_a") if f in own)
    }
    return changing or parts


def _narrowed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return factors without the ranks of which up has nothing; all of them where it has none."""
    used = own["up"].flatten(2).any(-1).any(0) if own["up"].ndim > 2 else own["up"].any(0)
    kept = int(used.sum())
    if "mid" in own or not 0 < kept < len(used):
        return own
    less = {**own, "up": own["up"][:, used], "down": own["down"][used]}
    if "alpha" in own:
        less["alpha"] = own["alpha"] * (kept / len(used))
    return less
