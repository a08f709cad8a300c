"""How the denoiser is computed in training: whole, or by parts that are computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError

if TYPE_CHECKING:
    from tunekit.families.base import Family
    from tunekit.schema import Train


def arrange(family: Family, train: Train) -> None:
    """Prepare the denoiser for a training's passes.

    Gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"):
    activations inside the denoiser's blocks are computed again in the backward pass, with the same
    random numbers, so that the gradient is the same to the bit. Raises UserError where the denoiser
    cannot.
    """
    denoiser: Any = family.denoiser
    able = getattr(denoiser, "_supports_gradient_checkpointing", False)
    if train.gradient_checkpointing and not able:
        raise UserError(
            f"train.gradient_checkpointing: {type(denoiser).__name__}, the denoiser of "
            f"{family.label}, has no blocks to compute twice: leave it out"
        )
    if train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    elif able:
        denoiser.disable_gradient_checkpointing()
