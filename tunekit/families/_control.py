"""ControlNets: networks beside a denoiser that hold it to a picture. Zhang et al. 2023."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.families._parts import _from_folder, class_of
from tunekit.modelfolder import ModelFolder, read_json
from tunekit.safefile import check_sizes

if TYPE_CHECKING:
    from torch import nn

    from tunekit.families.base import Family

_NAME = "controlnet"
# What a ControlNet must have as its denoiser has it.
_SHARED = (
    "in_channels block_out_channels cross_attention_dim addition_embed_type joint_attention_dim "
    "pooled_projection_dim"
).split()


def load(family: Family, path: Path) -> nn.Module:
    """Return the ControlNet in a folder, frozen, in the family's format and on its device.

    Raises UserError for a folder that is none, holds no safetensors, carries code, or belongs to
    another kind of base.
    """
    if not (path / "config.json").is_file():
        raise UserError(
            f"controlnet: {path} is no folder with a config.json; name a ControlNet that diffusers "
            "saved on this disk"
        )
    config = read_json(path / "config.json")
    check_sizes(path / "config.json", config)
    folder = ModelFolder(path, str(path), {}, {_NAME: config})
    folder.refuse_code()
    if config.get("_class_name") != family.controlnet:
        raise UserError(
            f"controlnet: {path} is {config.get('_class_name', 'of no named class')}, and "
            f"{family.label} takes {family.controlnet or 'none'}"
        )
    folder.bring(["."], ["."], None)
    with warnings.catch_warnings():
        # What diffusers says of its own code, which it moved.
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated")
        module = _from_folder(class_of(family.controlnet), folder, _NAME, family.dtype, None, "")
    own: Any = family.denoiser.config
    held: Any = module.config
    for key in _SHARED:
        ours, its = getattr(own, key, None), getattr(held, key, None)
        as_lists = [list(value) if isinstance(value, tuple) else value for value in (ours, its)]
        if None not in as_lists and as_lists[0] != as_lists[1]:
            raise UserError(
                f"controlnet: {path} was made for another base: its {key} is {its}, that of "
                f"{family.label} is {ours}"
            )
    return module.to(family.device).requires_grad_(False).eval()
