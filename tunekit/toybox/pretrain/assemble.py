"""Puts the trained parts together as the folders that the package ships, in fp16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _half(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        tensors = {k: v.half().contiguous() if v.is_floating_point() else v
                   for k, v in load_file(path).items()}  # fmt: skip
        save_file(tensors, path, {"format": "pt"})


def _widely_read_names(folder: Path) -> None:
    """Give the text encoder the `text_model.` level that every other reader expects.

    transformers 5 saves CLIPTextModel without it and reads both.
    """
    path = folder / "model.safetensors"
    named = {k if k.startswith("text_model.") else f"text_model.{k}": v
             for k, v in load_file(path).items()}  # fmt: skip
    save_file(named, path, {"format": "pt"})


def assemble(work: Path, target: Path) -> Path:
    """Write `target/{model,clip,subject,judge}`; gives the pipeline folder."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from tunekit.toybox.pretrain.unet import scheduler
    from tunekit.toybox.pretrain.words import load_tokenizer

    model = target / "model"
    if model.exists():
        shutil.rmtree(model)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
        tokenizer=load_tokenizer(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float32).save_pretrained(model)
    _widely_read_names(model / "text_encoder")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, model / "tokenizer" / name)
    for part in ("clip", "subject", "judge"):
        if (work / part).exists():
            shutil.copytree(work / part, target / part, dirs_exist_ok=True)
    _half(target)
    for config in target.rglob("*.json"):
        text = config.read_text()
        if "_name_or_path" in text and config.name != "tokenizer.json":
            data = json.loads(text)
            data.pop("_name_or_path", None)  # a path of the machine that trained it
            config.write_text(json.dumps(data, indent=2) + "\n")
    return model


def unpack(work: Path) -> None:
    """Put the shipped parts where stages leave theirs, so that a later stage goes on from them.

    What is in `work` already stays. Stages compute in fp32; halved again, parts that no stage
    touched are bit by bit what they were.
    """
    from tunekit.toybox import WEIGHTS

    parts = {name: WEIGHTS / name for name in ("clip", "subject", "judge")}
    parts |= {name: WEIGHTS / "model" / name for name in ("vae", "unet", "tokenizer")}
    for name, shipped in parts.items():
        if not (work / name).exists():
            shutil.copytree(shipped, work / name)
