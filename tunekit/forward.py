"""How the denoiser is computed in training: whole, by parts computed twice, or compiled by parts.

None of it changes what is computed; drawing is always whole and not compiled, so that samples of
the training and later pictures come from the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from tunekit.families.base import Family
    from tunekit.schema import Train

# Shapes and widths for which one block may be compiled anew; past it, torch goes on uncompiled
# without a word. A denoiser has a few widths, a data set a few buckets.
_MOST_VARIANTS = 256


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
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"train.compile: torch cannot compile here: {line}; install a C++ compiler (on a GPU, "
            "Triton), or leave it out"
        ) from None


def checkpoint(family: Family, train: Train) -> None:
    """Have the denoiser compute activations twice, or not, as `train.gradient_checkpointing` says.

    Gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"):
    activations inside the denoiser's blocks are computed again in the backward pass, with the same
    random numbers, so that the gradient is the same to the bit.

    Raises UserError where the denoiser cannot.
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
    elif getattr(denoiser, "is_gradient_checkpointing", False):
        denoiser.disable_gradient_checkpointing()


def arrange(family: Family, train: Train) -> Callable[[], AbstractContextManager[None]]:
    """Prepare the denoiser for a training's passes; a step is computed within what this returns.

    Compiled are the blocks that the denoiser repeats, as diffusers names them. One of them takes
    seconds where the whole takes minutes; and compiled as a whole, torch 2.13 loses gradients of a
    U-Net's middle on the CPU.

    Raises UserError where the denoiser cannot.
    """
    checkpoint(family, train)
    forwards = _compiled(family) if train.compile else {}
    return lambda: _in_place(forwards)


def _compiled(family: Family) -> dict[nn.Module, Callable[..., Any]]:
    """Return what computes each repeated block, once compiled: at its first call."""
    import torch
    from torch._dynamo import config

    names = getattr(family.denoiser, "_repeated_blocks", None) or ()
    blocks = [block for block in family.denoiser.modules() if type(block).__name__ in names]
    if not blocks:
        raise UserError(
            f"train.compile: {type(family.denoiser).__name__}, the denoiser of {family.label}, has "
            "no blocks that diffusers compiles: leave it out"
        )
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    # Dropout draws what it draws uncompiled.
    options: dict[str, Any] = {"fallback_random": True}
    return {block: torch.compile(block.forward, options=options) for block in blocks}


@contextlib.contextmanager
def _in_place(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute with other functions, for a while."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
