"""Low-rank Kronecker product: a change made of one small matrix repeated under another.

LyCORIS (Yeh et al. 2023), by the peft library. A layer computes W x + (alpha / rank) (w1 (x) w2) x,
where a half that is large is a product of two factors of the rank.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunekit.adapters._lycoris import LycorisAdapter, LycorisSettings
from tunekit.schema import AdapterSettings, also

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LokrSettings(LycorisSettings):
    """What `adapter: {kind: lokr}` takes."""

    kind: Literal["lokr"] = Field("lokr", description="Low-rank Kronecker product (LoKr).")
    factor: int | None = Field(
        None,
        ge=2,
        le=1024,
        description="Size of the first matrix, 2 to 1024, where it divides a layer's width, else "
        "the divisor below it; null: near the square root of the width, which trains the fewest "
        "numbers.",
        json_schema_extra=also("decompose_factor", "lokr_factor"),
    )
    decompose_both: bool = Field(
        False,
        description="Whether the first matrix is a product of two factors too, where it is larger "
        "than they are.",
    )


class Lokr(LycorisAdapter):
    """LoKr layers of peft inside the family's own modules."""

    Settings: ClassVar[type[AdapterSettings]] = LokrSettings
    FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

    @classmethod
    def config(cls, settings: Any, **shared: Any) -> Any:
        from peft import LoKrConfig

        return LoKrConfig(
            module_dropout=settings.dropout,
            decompose_factor=settings.factor or -1,
            decompose_both=settings.decompose_both,
            init_weights=False,
            **shared,
        )

    @classmethod
    def draw(cls, factor: str, first: Tensor, held: set[str], random: torch.Generator) -> None:
        from torch import nn

        if factor in ("lokr_w2", "lokr_w2_b"):
            first.zero_()
        else:
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=random)

    def settle(self, factors: dict[str, Tensor], alpha: float, rank: int) -> float:
        if {"lokr_w1", "lokr_w2"} <= factors.keys():
            # Readers find no rank in two whole matrices, and then multiply with nothing.
            factors["lokr_w2"] *= alpha / rank
            return float(rank)
        return alpha

    def network_args(self) -> str:
        return json.dumps({"algo": self.kind, "factor": str(self._settings.factor or -1)})
