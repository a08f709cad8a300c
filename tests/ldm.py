"""A Stable Diffusion folder as one file in the naming of its first release (latent-diffusion, ldm).

There the U-Net is a list of input blocks, a middle block and a list of output blocks, each block a
list of layers; the autoencoder has levels of blocks; the text encoder is CLIP's or OpenCLIP's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tunekit import families
from tunekit.schema import Base

Names = Iterator[tuple[str, str]]  # of a module: in diffusers, in ldm

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def single_file(folder: Path, path: Path, *, open_clip: bool = False, half: bool = False) -> Path:
    """Write the model in `folder` to one file at `path`, as people download them.

    open_clip: with the text encoder in OpenCLIP's naming, as Stable Diffusion 2.x has it.
    """
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    text = _open_clip(pipe.text_encoder) if open_clip else _clip(pipe.text_encoder)
    tensors = {
        **_named("model.diffusion_model.", pipe.unet, _unet(pipe.unet)),
        **_named("first_stage_model.", pipe.vae, _vae(pipe.vae)),
        **{f"cond_stage_model.{name}": tensor for name, tensor in text.items()},
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,  # they hold the like
    }
    if half:
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def single_file_xl(folder: Path, path: Path, marks: tuple[str, ...] = ()) -> Path:
    """Write the Stable Diffusion XL in `folder` to one file at `path`, as people download them.

    marks: names of empty tensors by which some tell what they predict.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    both = [*_clip(pipe.text_encoder).items()]
    both = [(f"embedders.0.{name}", tensor) for name, tensor in both]
    both += [(f"embedders.1.{k}", t) for k, t in _open_clip(pipe.text_encoder_2).items()]
    tensors = {
        **_named("model.diffusion_model.", pipe.unet, _unet(pipe.unet)),
        **_named("first_stage_model.", pipe.vae, _vae(pipe.vae)),
        **{f"conditioner.{name}": tensor for name, tensor in both},
        **{name: torch.empty(0) for name in marks},
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def single_file_flow(folder: Path, path: Path, alone: bool = False) -> Path:
    """Write a transformer's base in `folder` to one file at `path`, as ComfyUI's users have them.

    alone: the transformer without a prefix, and nothing else, as it was first released.
    """
    family: Any = families.load(Base(model=str(folder)))
    denoiser = family.denoiser.state_dict()
    tensors = {}
    for theirs, pieces in family.file_table("transformer", family.denoiser).items():
        rows = torch.cat([denoiser[p.module][p.first : p.last] for p in pieces])
        tensors[theirs if alone else f"model.diffusion_model.{theirs}"] = rows
    if not alone:
        tensors |= _named("first_stage_model.", family.vae, _vae(family.vae))
        for name, encoder in family.text_encoders.items():
            clip = "clip_g" if name == "text_encoder_2" else "clip_l"
            kind = "t5xxl" if "T5" in type(encoder).__name__ else clip
            for key, tensor in encoder.state_dict().items():
                level = "" if kind == "t5xxl" or key.startswith("text_") else "text_model."
                tensors[f"text_encoders.{kind}.transformer.{level}{key}"] = tensor
    tied = "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"
    save_file({n: t.contiguous().clone() for n, t in tensors.items() if n != tied}, path)
    return path


def _named(prefix: str, module: nn.Module, names: Names) -> dict[str, Tensor]:
    left = module.state_dict()
    named = {}
    for ours, theirs in names:
        for key in [key for key in left if key.startswith(f"{ours}.")]:
            named[prefix + theirs + key.removeprefix(ours)] = left.pop(key)
    assert not left, f"without an ldm name: {sorted(left)[:3]}"
    return {
        # The autoencoder's attention was made of convolutions.
        name: t[..., None, None] if ".attn_1." in name and t.ndim == 2 else t
        for name, t in named.items()
    }


def _inside(ours: str, theirs: str, parts: dict[str, str]) -> Names:
    return ((f"{ours}.{one}", f"{theirs}.{other}") for one, other in parts.items())


def _unet(unet: Any) -> Names:
    yield from {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items()
    if hasattr(unet, "add_embedding"):
        yield "add_embedding.linear_1", "label_emb.0.0"
        yield "add_embedding.linear_2", "label_emb.0.2"
    count = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from _unet_layer(f"down_blocks.{i}", j, f"input_blocks.{count}")
            count += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{count}.0.op"
            count += 1
    yield from _inside("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _inside("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)
    count = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield from _unet_layer(f"up_blocks.{i}", j, f"output_blocks.{count}")
            count += 1
        if block.upsamplers:  # follows the last block's other layers
            layer = 2 if hasattr(block, "attentions") else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{count - 1}.{layer}.conv"


def _unet_layer(block: str, j: int, theirs: str) -> Names:
    yield from _inside(f"{block}.resnets.{j}", f"{theirs}.0", _UNET_RESNET)
    yield f"{block}.attentions.{j}", f"{theirs}.1"


def _vae(vae: Any) -> Names:
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
        mid, theirs = f"{half}.mid_block", f"{half}.mid"
        yield from _inside(f"{mid}.resnets.0", f"{theirs}.block_1", _VAE_RESNET)
        yield from _inside(f"{mid}.attentions.0", f"{theirs}.attn_1", _VAE_ATTENTION)
        yield from _inside(f"{mid}.resnets.1", f"{theirs}.block_2", _VAE_RESNET)
    for i, block in enumerate(vae.encoder.down_blocks):
        for j in range(len(block.resnets)):
            ours, theirs = f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}"
            yield from _inside(ours, theirs, _VAE_RESNET)
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
    blocks = vae.decoder.up_blocks
    for i, block in enumerate(blocks):
        level = len(blocks) - 1 - i  # counted from the finest
        for j in range(len(block.resnets)):
            ours, theirs = f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{level}.block.{j}"
            yield from _inside(ours, theirs, _VAE_RESNET)
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv"


def _clip(encoder: nn.Module) -> dict[str, Tensor]:
    state = encoder.state_dict()
    places = len(state["embeddings.position_embedding.weight"])
    state["embeddings.position_ids"] = torch.arange(places)[None]  # a buffer of its time
    return {f"transformer.text_model.{name}": tensor for name, tensor in state.items()}


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): t for k, t in encoder.state_dict().items()}
    named = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
    }
    if "text_projection.weight" in state:
        named["text_projection"] = state["text_projection.weight"].T
        named["logit_scale"] = torch.ones(())  # for comparing with pictures
    for end in ("weight", "bias"):
        named[f"ln_final.{end}"] = state[f"final_layer_norm.{end}"]
        for i in range(encoder.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            for one, other in _inside(ours, theirs, _OPEN_CLIP):
                named[f"{other}.{end}"] = state[f"{one}.{end}"]
            parts = [state[f"{ours}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            named[f"{theirs}.attn.in_proj_{end}"] = torch.cat(parts)
    return {f"model.{name}": tensor for name, tensor in named.items()}
