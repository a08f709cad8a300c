"""Who judges: the encoders of one evaluation, chosen by the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tunekit.evaluation.embedders import Clip, SubjectEncoder

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from tunekit.schema import Evaluate


class Likeness(Protocol):
    """What embeds pictures so that their cosine tells how much they are alike."""

    @property
    def what(self) -> str:
        """What kind of encoder it is, in words."""

    @property
    def source(self) -> str:
        """What the recipe called it."""

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit rows [N, D] for N pictures."""


class StyleEncoder:
    """Tells manners apart: half CLIP, half statistics of the subject encoder's first features.

    The cosine of two rows is the mean of two cosines. CLIP's picture embedding knows the styles
    that have words. The mean and standard deviation of each channel of the first hidden state know
    edges, texture and palette wherever they stand in the picture, words or not: style as Gatys et
    al. (CVPR 2016) and Huang and Belongie (ICCV 2017, "AdaIN") see it. Each alone misses styles
    the other tells (`benchmarks/style_judge.py`).
    """

    what = "style encoder"

    def __init__(self, subject: SubjectEncoder, clip: Clip) -> None:
        self.subject = subject
        self.clip = clip
        self.source = f"{subject.source}, {clip.source}"

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit rows [N, D] for N pictures of any sizes, float32 on the CPU."""
        import torch

        halves = [self.subject.texture(images), self.clip.embed_images(images)]
        return torch.cat(halves, dim=1) / 2**0.5


@dataclass(frozen=True)
class Judges:
    """The encoders: `likeness` tells the subject or style, `clip` prompts and whole pictures."""

    likeness: Likeness
    clip: Clip


def load_judges(evaluate: Evaluate, device: torch.device | str = "cpu") -> Judges:
    """Load the judges that a recipe names; raises UserError for what cannot be loaded."""
    subject = SubjectEncoder.load(evaluate.subject_encoder, device)
    clip = Clip.load(evaluate.clip, device)
    likeness: Likeness = StyleEncoder(subject, clip) if evaluate.kind == "style" else subject
    return Judges(likeness, clip)
