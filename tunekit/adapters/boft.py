"""Butterfly orthogonal finetuning: turns one after the other, of outputs ever further apart.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", in the
form of LyCORIS: m factors of small blocks mix what one factor of large blocks would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.adapters._rotation import RotationAdapter, RotationSettings
from tunekit.schema import AdapterSettings, also

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


class BoftSettings(RotationSettings):
    """What `adapter: {kind: boft}` takes."""

    kind: Literal["boft"] = Field("boft", description="Butterfly orthogonal finetuning (BOFT).")
    factors: int = Field(
        2,
        ge=1,
        le=12,
        description="How many turns follow each other, 1 to 12; widths are multiples of "
        "block_size * 2^(factors - 1).",
        json_schema_extra=also("boft_n_butterfly_factor", "boft_m"),
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.block_size % 2:
            raise ValueError(f"block_size {self.block_size} is odd: factors pair halves of blocks")
        return self

    def unit(self) -> int:
        return self.block_size << (self.factors - 1)

    def shape(self, width: int) -> tuple[int, ...]:
        return (self.factors, width // self.block_size)


class Boft(RotationAdapter):
    """Turns of blocks, factor after factor."""

    Settings: ClassVar[type[AdapterSettings]] = BoftSettings

    @staticmethod
    def turned(turns: Tensor, rows: Tensor) -> Tensor:
        from tunekit.changes.deltas import butterfly

        return butterfly(turns, rows)

    @classmethod
    def algorithm(cls) -> str:
        return cls.kind
