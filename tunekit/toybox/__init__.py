"""The toybox: the pocket latent diffusion model that ships with tunekit, and its world."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def model_path() -> Path:
    """Folder of the bundled base: a diffusers StableDiffusionPipeline, 64 px, fp16."""
    return WEIGHTS / "model"


def clip_path() -> Path:
    """Folder of the bundled CLIP: a transformers CLIPModel for 64 px pictures."""
    return WEIGHTS / "clip"


def subject_encoder_path() -> Path:
    """Folder of the bundled subject encoder: a transformers ResNetModel for 64 px pictures."""
    return WEIGHTS / "subject"
