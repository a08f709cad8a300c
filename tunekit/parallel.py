"""How the gradients of several processes come together: whole copies (DDP), or parts (FSDP2).

What is held in parts is a DTensor; `whole` and `part_as` lead from it and to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = ("_repeated_blocks", "_no_split_modules")  # where diffusers names a denoiser's blocks


class _Computed(nn.Module):
    """A function of parameters that stand elsewhere, as the module that DDP asks for."""

    def __init__(self, parameters: Sequence[nn.Parameter], compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self._compute = compute

    def forward(self, *values: Any) -> Tensor:
        return self._compute(*values)


def averaged(
    parameters: Sequence[nn.Parameter], compute: Callable[..., Tensor]
) -> nn.parallel.DistributedDataParallel:
    """Return `compute`, after whose backward pass gradients are the mean over all processes.

    Every process starts with the parameters of the first. Parameters that no process has used keep
    no gradient. Sums are made in the same order in every step, the first one after a stop too:
    with unused parameters DDP never arranges its buckets anew.
    """
    return nn.parallel.DistributedDataParallel(
        _Computed(parameters, compute),
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


def share_out(denoiser: nn.Module) -> None:
    """Leave each process a part of every weight of a denoiser, whole only while it is used.

    The blocks that diffusers names come one after the other (Zhao et al. 2023, "PyTorch FSDP").
    Parameters are other objects afterwards. Gradients are the mean over all processes.
    """
    from torch.distributed.fsdp import fully_shard

    names = {name for where in _LIBRARY for name in getattr(denoiser, where, None) or ()}
    inner = [module for module in denoiser.modules() if module is not denoiser]
    for module in reversed(inner):  # those inside others first
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=True)
    fully_shard(denoiser, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; where processes hold parts of it, all of them have to ask."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else cast("Tensor", full())


def part_as(tensor: Tensor, own: Tensor) -> Tensor:
    """Return of a whole tensor, which every process has, the part that `own` is of another."""
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(torch.device(mesh.device_type))
    return distribute_tensor(moved, mesh, cast("Any", own).placements, src_data_rank=None)
