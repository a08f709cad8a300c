"""Low-rank Hadamard product: a change of rank up to r * r from two pairs of factors.

Hyeon-Woo et al. 2021, "FedPara", as LyCORIS has it (Yeh et al. 2023), by the peft library. A layer
computes W x + (alpha / rank) ((w1_a w1_b) * (w2_a w2_b)) x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunekit.adapters._lycoris import LycorisAdapter, LycorisSettings
from tunekit.schema import AdapterSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LohaSettings(LycorisSettings):
    """What `adapter: {kind: loha}` takes."""

    kind: Literal["loha"] = Field("loha", description="Low-rank Hadamard product (LoHa).")


class Loha(LycorisAdapter):
    """LoHa layers of peft inside the family's own modules."""

    Settings: ClassVar[type[AdapterSettings]] = LohaSettings
    FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    @classmethod
    def config(cls, settings: Any, **shared: Any) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(module_dropout=settings.dropout, init_weights=False, **shared)

    @classmethod
    def draw(cls, factor: str, first: Tensor, held: set[str], random: torch.Generator) -> None:
        # LyCORIS' own: with peft's smaller numbers the product hardly moves at usual rates.
        spread = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}[factor]
        first.zero_()
        if spread:
            first.normal_(std=spread, generator=random)
