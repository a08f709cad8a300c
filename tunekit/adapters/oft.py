"""Orthogonal finetuning: every layer's outputs are turned, block by block.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", in the form of
LyCORIS' diag-oft: R W x with R block-diagonal, its blocks Cayley transforms of skew matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tunekit.adapters._rotation import RotationAdapter, RotationSettings
from tunekit.schema import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor


class OftSettings(RotationSettings):
    """What `adapter: {kind: oft}` takes."""

    kind: Literal["oft"] = Field("oft", description="Orthogonal finetuning (OFT).")


class Oft(RotationAdapter):
    """Turns of blocks of neighbouring outputs."""

    Settings: ClassVar[type[AdapterSettings]] = OftSettings

    @staticmethod
    def turned(turns: Tensor, rows: Tensor) -> Tensor:
        from tunekit.changes.deltas import rotate

        return rotate(turns, rows)

    @classmethod
    def algorithm(cls) -> str:
        return "diag-oft"
