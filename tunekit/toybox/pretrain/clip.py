"""Stage 1: the toybox's CLIP, trained contrastively; its text tower is the base's text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from tunekit.toybox.pretrain.common import Frugal, Stage, batches, device
from tunekit.toybox.pretrain.pictures import Pictures
from tunekit.toybox.pretrain.words import LENGTH, load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

# CLIP's own image statistics are those of photographs; the toybox maps 0..255 to -1..1.
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 64},
    "resample": 3, "do_center_crop": True, "crop_size": {"height": 64, "width": 64},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": True,
}  # fmt: skip


def build(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A CLIPModel with 128-wide towers of 4 layers for 64 px pictures and 32 tokens."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": LENGTH,
        "projection_dim": 128, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "projection_dim": 128,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def train(work: Path, data: Pictures, steps: int, batch: int = 128, seed: int = 1) -> Path:
    """Train on pictures and captions; gives the folder of the finished CLIP."""
    tokenizer = load_tokenizer(work / "tokenizer")
    model = build(tokenizer, seed).to(device()).train()
    stage = Stage(
        work / "clip-training", {"clip": model}, Frugal([model], lr=2e-3), steps, ema=0.998
    )
    tokens = torch.tensor(
        tokenizer([f["caption"] for f in data.facts], padding="max_length", truncation=True,
                  max_length=LENGTH).input_ids
    )  # fmt: skip

    def step(number: int) -> dict[str, torch.Tensor]:
        rows = np.fromiter(batches(len(data), batch, number, seed), np.int64)
        out = model(input_ids=tokens[rows].to(device()),
                    pixel_values=to_tensor(data.pixels[rows]).to(device()))  # fmt: skip
        logits = out.logits_per_text
        same = torch.arange(batch, device=logits.device)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        with torch.no_grad():
            hit = (logits.argmax(1) == same).float().mean()
        return {"loss": loss, "hit": hit}

    stage.run(step, batch)
    model.load_state_dict(stage.averaged("clip"))
    folder = work / "clip"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    return folder
