"""What a U-Net's modules are called in its first release (latent-diffusion, ldm).

There it is a list of input blocks, a middle block and a list of output blocks, each a list of
layers; kohya's names for SDXL follow it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)(?:\.(?P<rest>.+))?"
)


def unet_name(module: str, config: Mapping[str, Any]) -> str:
    """Return what ldm calls a module of a UNet2DConditionModel with this configuration.

    Every block must have as many layers (`layers_per_block` is a number).
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    found = _BLOCK.fullmatch(module)
    if found is None:
        return module
    kind, layer, rest = found["kind"], int(found["layer"]), found["rest"]
    inner = _RESNET.get(rest, rest) if kind == "resnets" else rest
    end = f".{inner}" if inner is not None else ""
    if found["side"] is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}{end}"
    layers = config["layers_per_block"]
    assert isinstance(layers, int), "blocks of different sizes have no ldm names"
    before = int(found["block"]) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + before + layers}.0{end.replace('.conv', '.op')}"
    if kind == "upsamplers":  # follows the last layers of its block
        attention = "CrossAttn" in config["up_block_types"][int(found["block"])]
        return f"output_blocks.{before + layers}.{2 if attention else 1}{end}"
    place = 1 if kind == "attentions" else 0
    if found["side"] == "down":
        return f"input_blocks.{1 + before + layer}.{place}{end}"
    return f"output_blocks.{before + layer}.{place}{end}"
