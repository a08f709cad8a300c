"""How the denoiser is computed in training: whole, by parts that are computed twice, or compiled.

None of it changes what is computed; drawing is always whole and not compiled, so that samples of
the training and later pictures come from the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.families.base import Family
    from tunekit.schema import Train

Predict = Callable[..., "Tensor"]


def check(train: Train) -> None:
    """Raise UserError where this machine cannot compile though the recipe asks for it."""
    if not train.compile:
        return
    import torch

    # The smallest thing that needs the whole way, down to the compiler of the language below.
    compiled = torch.compile(lambda x: x.sin() + x)
    try:
        compiled(torch.zeros(8))
    except RuntimeError as error:  # of which all of the compiler's are
        raise UserError(_uncompiled(error)) from None


def arrange(family: Family, train: Train) -> Predict:
    """Prepare the denoiser for a training's passes and return what computes `Family.predict`.

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
    return _compiled(family) if train.compile else family.predict


def _compiled(family: Family) -> Predict:
    import torch
    from torch._dynamo.exc import TorchDynamoException

    made = torch.compile(family.predict)

    def predict(*given: Any) -> Tensor:
        try:
            return made(*given)
        except TorchDynamoException as error:
            raise UserError(_uncompiled(error)) from None

    return predict


def _uncompiled(error: Exception) -> str:
    line = " ".join(str(error).split())[:200]
    return (
        f"train.compile: torch cannot compile here: {line}; install a C++ compiler (on a GPU, "
        "Triton), or leave it out"
    )
