"""Stage 1: the toybox's CLIP, trained contrastively; its text tower is the base's text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from tunekit.toybox import world
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


def shift(pixels: torch.Tensor, number: int, seed: int) -> torch.Tensor:
    """Move the batch by up to 3 px and vary brightness a little: judges must not be brittle."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    dx, dy = torch.randint(0, 7, (2,), generator=generator).tolist()
    padded = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    gain = 1 + 0.1 * torch.randn(pixels.shape[0], 1, 1, 1, generator=generator)
    noise = 0.04 * torch.randn(pixels.shape, generator=generator)
    return (padded[:, :, dy : dy + 64, dx : dx + 64] * gain + noise).clamp(-1, 1)


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


def _swapped(facts: dict[str, Any], rng: np.random.Generator) -> list[str]:
    """Four captions that differ in one word: three in the subject, one in the colour if told."""
    caption, colour = facts["caption"], facts["colour"]
    others = rng.permutation([w for w in world.FULL.subjects if w != facts["subject"]])
    told = [caption.replace(facts["subject"], str(w), 1) for w in others[:4]]
    if colour and colour in caption:
        other = str(rng.choice([c for c in world.FULL.colours if c != colour]))
        told[3] = caption.replace(colour, other, 1)
    return told


@torch.no_grad()
def _pooled(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    different = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    unique = list(different)
    rows = []
    for start in range(0, len(unique), 256):
        ids = tokenizer(unique[start : start + 256], padding="max_length", truncation=True,
                        max_length=LENGTH, return_tensors="pt").input_ids  # fmt: skip
        with torch.autocast(device().type, torch.bfloat16):
            rows.append(model.text_model(ids.to(device())).pooler_output.float().cpu())
    return torch.cat(rows)[[different[c] for c in captions]]


def train_vision(work: Path, data: Pictures, steps: int, batch: int = 128, seed: int = 6) -> Path:
    """Train the vision tower on, against the locked text tower (Zhai et al. 2022, LiT).

    Contrast among random pictures is soon won by place and style; here each picture must also
    choose its own caption before four that differ in the subject or the colour alone. The text
    tower stays as it is, since the denoiser has learned its features.
    """
    from transformers import CLIPModel

    tokenizer = load_tokenizer(work / "tokenizer")
    model: CLIPModel = CLIPModel.from_pretrained(work / "clip", attn_implementation="eager")
    model.to(device()).train()
    model.text_model.requires_grad_(False)
    stage = Stage(work / "clip-vision-training", {"clip": model}, Frugal([model], lr=1e-3), steps,
                  ema=0.998)  # fmt: skip
    rows = np.array([i for i, f in enumerate(data.facts) if f["figures"] == 1])
    rng = np.random.default_rng(seed)
    own = _pooled(model, tokenizer, [data.facts[i]["caption"] for i in rows])
    others = _pooled(
        model, tokenizer, [c for i in rows for c in _swapped(data.facts[i], rng)]
    ).view(len(rows), 4, -1)

    def step(number: int) -> dict[str, torch.Tensor]:
        at = np.fromiter(batches(len(rows), batch, number, seed), np.int64)
        pixels = shift(to_tensor(data.pixels[rows[at]]), number, seed).to(device())
        with torch.autocast(device().type, torch.bfloat16):
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        seen = F.normalize(seen.float(), dim=-1)
        texts = F.normalize(model.text_projection(own[at].to(device())), dim=-1)
        wrong = F.normalize(model.text_projection(others[at].to(device())), dim=-1)
        scale = model.logit_scale.exp()
        logits = scale * seen @ texts.T
        hard = scale * torch.einsum("bd,bkd->bk", seen, wrong)
        same = torch.arange(batch, device=logits.device)
        by_picture = F.cross_entropy(torch.cat([logits, hard], 1), same)
        with torch.no_grad():
            hit = (logits.diagonal()[:, None] > hard).all(1).float().mean()
        return {"loss": by_picture + F.cross_entropy(logits.T, same), "hit": hit}

    stage.run(step, batch)
    model.load_state_dict(stage.averaged("clip"))
    model.eval().save_pretrained(work / "clip")
    return work / "clip"
