"""What a tool that lowers ranks tells: what is kept of every module, and of all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from tunekit.files.cut import Cut

_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One module. before, rank: its ranks (None: the change has no rank of its own). norm: of its
    change; lost: of what was cut off it; kept: the share of the squared norm that is left."""

    name: str
    before: int | None
    rank: int
    norm: float
    lost: float
    kept: float

    @classmethod
    def of(cls, name: str, before: int | None, cut: Cut) -> Row:
        """Return the row of a module's cut."""
        return cls(name, before, cut.rank, cut.norm, cut.lost, cut.kept)

    def told(self) -> str:
        """Return the row for people."""
        was = "" if self.before is None else f"{self.before} -> "
        return f"  {self.name}: rank {was}{self.rank}, keeps {self.kept:.2%}, of {self.norm:.3g}"


@dataclass(frozen=True)
class Report:
    """What was written to `path`. said: what was done, in words. remarks: what is worth telling.

    left_out: norms of what no adapter of this form holds, by name.
    """

    path: Path
    said: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    left_out: tuple[tuple[str, float], ...] = ()

    @property
    def norm(self) -> float:
        """The Frobenius norm of the whole change."""
        return math.hypot(*(row.norm for row in self.rows))

    @property
    def lost(self) -> float:
        """That of all that was cut off the modules."""
        return math.hypot(*(row.lost for row in self.rows))

    @property
    def kept(self) -> float:
        """The share of the squared norm that is kept."""
        return 1 - (self.lost / self.norm) ** 2 if self.norm else 1.0

    def lines(self) -> list[str]:
        """Return it for people: of the modules those that lose most."""
        ranks = sorted({row.rank for row in self.rows})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [*self.remarks, f"{self.path}: {self.said}"]
        if self.rows:
            off = self.lost / self.norm if self.norm else 0.0
            lines.append(
                f"{len(self.rows)} modules of rank {span} keep {self.kept:.2%} of the squared norm "
                f"of the change (relative error {off:.2e})"
            )
            worst = sorted(self.rows, key=lambda row: row.kept)
            lines += [row.told() for row in worst[:_SHOWN]]
            if len(worst) > _SHOWN:
                lines.append(f"  and {len(worst) - _SHOWN} modules that keep more (--json)")
        if self.left_out:
            norm = math.hypot(*(size for _, size in self.left_out))
            most = max(self.left_out, key=lambda one: one[1])
            lines.append(
                f"left out: {len(self.left_out)} tensors that changed, such as {most[0]}; their "
                f"change has the norm {norm:.3g}, that of all in the file {self.norm:.3g}"
            )
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        told = asdict(self) | {"path": str(self.path), "kept": self.kept}
        return told | {"norm": self.norm, "lost": self.lost}
