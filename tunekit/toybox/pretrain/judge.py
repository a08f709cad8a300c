"""Stage 3: the judge and the subject encoder, two small ResNets that never train the base.

The judge names subject, colour, place and style of a picture; docs/toybox.md's table is its
verdict. The subject encoder puts pictures of one individual close together, whatever the place,
pose and style, and other individuals far (supervised contrastive loss, Khosla et al. 2020).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tunekit.toybox import world
from tunekit.toybox.pretrain.clip import PREPROCESSOR, shift, to_tensor
from tunekit.toybox.pretrain.common import Frugal, Stage, batches, device
from tunekit.toybox.pretrain.pictures import Pictures

if TYPE_CHECKING:
    from transformers import ResNetModel

HEADS: dict[str, tuple[str, ...]] = {
    "subject": world.FULL.subjects,
    "colour": world.FULL.colours,
    "place": world.FULL.places,
    "style": world.FULL.styles,
}


def backbone(seed: int) -> ResNetModel:
    """A ResNet of four basic stages, 32 to 256 channels; pooled output [B, 256, 1, 1]."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(seed)
    return ResNetModel(
        ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1],
                     layer_type="basic")
    )  # fmt: skip


class Judge(nn.Module):
    """Names the four attributes of a picture: one linear head an attribute on a ResNet."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.backbone = backbone(seed)
        self.heads = nn.ModuleDict({k: nn.Linear(256, len(v)) for k, v in HEADS.items()})

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels [B, 3, 64, 64] in -1..1 to logits [B, words] by attribute."""
        features = self.backbone(pixels).pooler_output.flatten(1)
        return {k: head(features) for k, head in self.heads.items()}


def train_judge(work: Path, data: Pictures, steps: int, batch: int = 64, seed: int = 3) -> Path:
    """Train the judge on single-figure renders; gives its weights file."""
    rows = np.array([i for i, f in enumerate(data.facts) if f["figures"] == 1])
    labels = {k: torch.tensor([words.index(data.facts[i][k]) for i in rows])
              for k, words in HEADS.items()}  # fmt: skip
    judge = Judge(seed).to(device()).train()
    stage = Stage(work / "judge-training", {"judge": judge}, Frugal([judge], lr=2e-3), steps,
                  ema=0.99)  # fmt: skip

    def step(number: int) -> dict[str, torch.Tensor]:
        at = np.fromiter(batches(len(rows), batch, number, seed), np.int64)
        pixels = shift(to_tensor(data.pixels[rows[at]]), number, seed).to(device())
        out = judge(pixels)
        losses = {k: F.cross_entropy(v, labels[k][at].to(v.device)) for k, v in out.items()}
        return {"loss": torch.stack(list(losses.values())).sum(),
                **{k: v.detach() for k, v in losses.items()}}  # fmt: skip

    stage.run(step, batch)
    judge.load_state_dict(stage.averaged("judge"))
    from safetensors.torch import save_model

    (work / "judge").mkdir(exist_ok=True)
    save_model(judge.eval().half(), str(work / "judge" / "model.safetensors"))
    return work / "judge" / "model.safetensors"


def train_subject(work: Path, data: Pictures, steps: int, batch: int = 128, seed: int = 4) -> Path:
    """Train the subject encoder on four pictures of each individual; gives its folder."""
    model = backbone(seed).to(device()).train()
    stage = Stage(work / "subject-training", {"subject": model}, Frugal([model], lr=2e-3), steps,
                  ema=0.99)  # fmt: skip
    individuals = len(data) // 4

    def step(number: int) -> dict[str, torch.Tensor]:
        who = np.fromiter(batches(individuals, batch // 4, number, seed), np.int64)
        rows = (who[:, None] * 4 + np.arange(4)).reshape(-1)
        pixels = shift(to_tensor(data.pixels[rows]), number, seed).to(device())
        rows_out = F.normalize(model(pixels).pooler_output.flatten(1), dim=1)
        logits = rows_out @ rows_out.T / 0.1
        itself = torch.eye(batch, dtype=torch.bool, device=logits.device)
        names = torch.arange(batch, device=logits.device) // 4
        alike = (names[:, None] == names[None]) & ~itself
        logp = logits.masked_fill(itself, -1e9).log_softmax(1)
        loss = -(logp * alike).sum(1).div(alike.sum(1)).mean()
        with torch.no_grad():
            best = logits.masked_fill(itself, -1e9).argmax(1)
            hit = (names[best] == names).float().mean()
        return {"loss": loss, "hit": hit}

    stage.run(step, batch)
    model.load_state_dict(stage.averaged("subject"))
    folder = work / "subject"
    model.eval().half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**PREPROCESSOR, "image_processor_type": "ViTImageProcessor",
                    "size": {"height": 64, "width": 64}, "do_center_crop": False}, indent=2)
    )  # fmt: skip
    return folder
